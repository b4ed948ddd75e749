"""Whether there is room for an export, asked before the work."""

from __future__ import annotations

from pathlib import Path

from clada_export.calibration.choose import AUTO
from clada_export.decoder.model_config import text_config_of
from clada_export.decoder.spool import spool_folder
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.files.capacity import available_memory, disk
from clada_export.methods import get_policy
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.weights_form import FORMS
from clada_export.price.model import ITEMS, Work, output_bytes, resident
from clada_export.price.size import FLOAT32, ModelSize
from clada_export.price.work import work_of
from clada_export.source.model import SourceModel

CERTAIN = 0.95
"""Of the least that an export writes: what is refused would not have worked, whatever a graph pass spares."""


def size_of(source: SourceModel) -> ModelSize:
    """The size of a loaded model."""
    stored = sum(file.bytes for file in source.files.values())
    if source.graph is None:
        return ModelSize.of_model(source.decoder.module, source.decoder.ffns, stored)
    return ModelSize.of_files(source.decoder.ffns, source.decoder.vocab_size, stored)


def require_room(source: SourceModel, output: Path, options: ExportOptions, given: SparsityPlan | None) -> str | None:
    """Hold what an export needs against what is there, once the source is loaded.

    A disk is arithmetic: what can't be written is refused. Memory is an estimate, so that it is only told.

    Args:
        output: the folder to make.
        given: what `--plan` read, or None.

    Returns:
        What to tell of the memory, or of a disk that may not do; None if all is well.

    Raises:
        UsageError: the engine does not fit on the disk of the output; says how much it takes and how much there is.
    """
    size, work, pruned = size_of(source), work_of(options), _pruned(options, given)
    told = []
    try:
        free = disk(output.parent).free
    except OSError:
        free = None
    if free is not None:
        least, likely = _least(source, size, work, pruned), output_bytes(size, work)
        if free < CERTAIN * least:
            raise UsageError(
                f"{output}: the engine takes {_gb(least)} and its disk has {_gb(free)} free; make room, or give another "
                "folder with --output" + (_narrower(source, size, work, pruned, free))
            )
        if free < likely:
            told.append(f"the disk of {output} has {_gb(free)} free, and the engine may take {_gb(likely)}")
    copies = work.workers * size.float32_bytes
    if copies and spool_folder(copies) is None:
        told.append(f"{work.workers} workers take {_gb(copies)} of disk for the weights, and no folder for them has so much")
    left = available_memory()
    needed = resident(size, work, left)
    if left is not None and needed > left:
        told.append(f"about {_gb(needed)} of memory are needed beside the weights, and {_gb(left)} are available")
    return "; ".join(told) or None


def _pruned(options: ExportOptions, given: SparsityPlan | None) -> bool:
    """Whether neurons may be left out of the engine."""
    if given is not None:
        return given.prune is not None
    return options.prune is not None or options.policy == AUTO or get_policy(options.policy, options.settings).prunes


def _least(source: SourceModel, size: ModelSize, work: Work, pruned: bool) -> int:
    """Bytes that the engine takes whatever is calibrated."""
    if work.form is not None:
        # The narrowest that may be chosen.
        forms = [work.form] if work.weights in FORMS else list(FORMS.values())
        return round(size.ffn * min(form.weight_bytes("ffn") for form in forms))
    item = ITEMS[work.dtype]
    ffn = 0 if pruned else size.ffn * item
    if work.target != "ort":
        return ffn
    config = source.decoder.config
    # Of a model of text and images only the part about text is compiled.
    alone = source.graph is not None or text_config_of(config) is config
    return ffn + (size.parameters - size.ffn) * FLOAT32 if alone else ffn


def _narrower(source: SourceModel, size: ModelSize, work: Work, pruned: bool, free: int) -> str:
    """A hint at a type that would fit."""
    for dtype, item in ITEMS.items():
        if work.form is None and item < ITEMS[work.dtype]:
            least = _least(source, size, Work(work.target, dtype), pruned)
            if free > least / CERTAIN:
                return f"; with --dtype {dtype} it would take {_gb(least)}"
    return ""


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
