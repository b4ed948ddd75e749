"""A local folder, or one that came from the Hub: config.json, weight files, and what describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from clada_export.decoder.residency import Residency
from clada_export.decoder.spool import Spool
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.files.json_files import read_json
from clada_export.source.causal_lm import decoder_config, finished, load_causal_lm
from clada_export.source.config_file import Stored
from clada_export.source.description import check_vocabulary, digests, folder_tokenizer, license_of
from clada_export.source.mixtures import folder_layout
from clada_export.source.model import SourceModel, SourceRequest
from clada_export.source.weight_files import check_config_file, check_safetensors, weight_files

_UNKNOWN = "unknown"


def load_folder(request: SourceRequest) -> SourceModel:
    """The model of a local folder; see `read_folder`."""
    request.refuse_revision(request.model, "folder")
    name = request.path.resolve().name
    return read_folder(request, request.path, name=name, kind="folder", place=str(request.path))


def read_folder(
    request: SourceRequest, folder: Path, *, name: str, kind: str, place: str, revision: str | None = None
) -> SourceModel:
    """The model that lies in a folder.

    Args:
        name, kind, revision: of the result.
        place: what a message about the weights calls it.

    Raises:
        UsageError, UnsupportedModelError, BackendError: see `clada_export.source.load.load_source`.
    """
    check_config_file(folder)
    weights = weight_files(folder, request.allow_pickle)
    if weights[0].suffix == ".bin":
        source_dtype, stored = _UNKNOWN, Stored.at_most(sum(file.stat().st_size for file in weights))
    else:
        source_dtype, stored = check_safetensors(weights)
    # Of a layout that is imported, transformers does not know the type that the config names.
    described_by: dict[str, Any] = {}
    spool = Spool()
    if (layout := folder_layout(folder)) is not None:
        model: PreTrainedModel = finished(layout.load(folder, weights, stored, request.dtype), str(folder), spool)
        config = described_by["config"] = model.config
        named: Any = read_json(folder / "config.json").get("torch_dtype", request.dtype)
    else:
        config = decoder_config(folder, request.trust_remote_code)
        named = config.dtype or request.dtype
        model = load_causal_lm(
            str(folder),
            place,
            config,
            stored,
            spool,
            import_experts=request.import_experts,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
            use_safetensors=weights[0].suffix != ".bin",
            weights_only=True,
        )
    warnings: list[str] = []
    tokenizer = folder_tokenizer(folder, name, warnings, trust_remote_code=request.trust_remote_code, **described_by)
    check_vocabulary(model, tokenizer, warnings)
    decoder = TorchDecoder(model, residency=Residency(model, spool))
    return SourceModel(
        decoder=decoder,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        kind=kind,
        path=folder,
        files=digests(folder, weights),
        weights_digest=decoder.weights_digest(),
        license=license_of(folder, config, warnings),
        source_dtype=str(named).removeprefix("torch.") if source_dtype == _UNKNOWN else source_dtype,
        warnings=warnings,
    )
