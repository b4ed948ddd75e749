"""The peer: the dense model as `transformers.exporters` gives it to ONNX Runtime (`ort_fusions="cpu"`), without the tool's op.

It is written with a manifest whose plan has no layers, so that the same runtime runs it: same session options, same threads,
same hand-over of the cache, same Python around it. Only the graph differs.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from benchmarks.engine_folder import write_engine_manifest
from clada_export.decoder.torch_decoder import require_torch
from clada_export.load.signal import LoadSignal
from clada_export.plan.plan import SparsityPlan
from clada_export.source.load import load_source
from clada_export.targets.common import MODEL_NAME
from clada_export.trace.trace import trace


def write_peer(model: str, folder: Path) -> None:
    """Export the dense model into a new folder.

    Raises:
        UsageError, UnsupportedModelError: the model can't be loaded or traced.
    """
    source = load_source(model)
    graph = trace(require_torch(source.decoder, "tracing"), fusions="cpu").graph
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    ir.save(graph, part / MODEL_NAME, external_data=MODEL_NAME + ".data")
    if source.decoder.generation_config is not None:
        source.decoder.generation_config.save_pretrained(part)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(part)
    plan = SparsityPlan("dense peer", "gate", "threshold", (), LoadSignal(), {"weights_digest": source.weights_digest})
    write_engine_manifest(part, source, graph, plan)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.peer", description="export the dense peer")
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    write_peer(options.model, options.output)
    return 0
