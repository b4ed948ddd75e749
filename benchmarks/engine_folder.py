"""Make a folder with a graph into an engine folder that the package's runtime opens."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from clada_export import __version__
from clada_export.artifact.manifest import Manifest, file_record, write_manifest
from clada_export.plan.plan import SparsityPlan
from clada_export.source.load import SourceModel
from clada_export.targets.common import MODEL_NAME, cache_tensors, tensor_spec
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION


def write_engine_manifest(
    folder: Path, source: SourceModel, graph: ir.Model, plan: SparsityPlan, *, library: str | None = None
) -> None:
    """Write the configuration and the manifest beside what is in the folder already, float32 for ONNX Runtime.

    Args:
        graph: what was written as `MODEL_NAME`.
        library: the name of the op's library in the folder; None for a graph without the op.
    """
    source.decoder.config.save_pretrained(folder)
    manifest = Manifest(
        tool_version=__version__,
        source={**source.record(), "files": {}},
        target="ort",
        op={"domain": DOMAIN, "name": OP_TYPE, "version": OP_VERSION},
        plan=plan.to_dict(),
        load_signal=plan.load,
        inputs=tuple(tensor_spec(value) for value in graph.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in graph.graph.outputs),
        dtype="float32",
        cache=cache_tensors(graph),
        versions={},
        library=library,
        model=MODEL_NAME,
        tokenizer=(folder / "tokenizer_config.json").is_file(),
    )
    write_manifest(folder, manifest.with_files({path.name: file_record(path) for path in sorted(folder.iterdir())}))
