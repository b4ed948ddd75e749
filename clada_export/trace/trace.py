"""The trace stage: eager model in, one ONNX graph for prompt and decode out (`transformers.exporters`)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.rewriter import _basics, _matcher
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_for_generation, prepare_for_export

from clada_export.decoder.ffn import plain_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from graph_passes.naming import name_interface
from graph_passes.positions import ShiftPositions

SAMPLE_BATCH, SAMPLE_TOKENS, SAMPLE_PADDING = 2, 8, 3
"""The traced example: two rows, so that the batch stays dynamic, the second with padding, so that the mask is an input."""

AUTO = torch.export.Dim.AUTO


@dataclass(frozen=True)
class TracedModel:
    """The graph with its interface named: `input_ids`, `attention_mask`, `position_ids` where the model takes them, the cache.

    Its weights share memory with the eager model wherever the exporter leaves them as they are.
    """

    graph: ir.Model
    fusions: str | None


def trace(decoder: TorchDecoder, *, fusions: str | None = "cpu") -> TracedModel:
    """Export a decoder with dynamic batch, sequence and past length; its FFNs as plain ones, whatever weighs their neurons.

    Args:
        decoder: float32, float16 or bfloat16; the graph computes in its type.
        fusions: `ort_fusions` of the exporter: `cpu` for ONNX Runtime on the CPU, None for plain ONNX.

    Raises:
        UnsupportedModelError: the model keeps a cache that is not keys and values, or the exporter can't trace it; says why.
    """
    with plain_ffns(decoder.model):
        return _trace(decoder, fusions)


def _trace(decoder: TorchDecoder, fusions: str | None) -> TracedModel:
    inputs, component = _sample(decoder)
    shapes = _dynamic_shapes(component, inputs)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=fusions)  # type: ignore[arg-type]
    name = decoder.name
    with _quiet(), _early_reject():
        try:
            exported = OnnxExporter().export(component, inputs, config=config)  # type: ignore[no-untyped-call,arg-type]
        except (
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            NotImplementedError,
            torch.onnx.errors.OnnxExporterError,
        ) as error:
            raise UnsupportedModelError(f"{name}: transformers.exporters can't trace it: {_first_line(error)}") from error
    graph: ir.Model = exported.program
    report = name_interface(graph)
    # A name that was not settled is the exporter's own, with dots where its arguments are nested.
    strange = [str(value.name) for value in graph.graph.inputs if str(value.name).startswith("input.")]
    if unresolved := list(dict.fromkeys((*report.unresolved, *strange))):
        raise UnsupportedModelError(f"{name}: its cache has inputs that are neither keys nor values: {', '.join(unresolved)}")
    if report.truncated_layers:
        raise UnsupportedModelError(
            f"{name}: layers {report.truncated_layers} drop tokens in the traced graph: their sliding window is shorter than "
            f"{SAMPLE_TOKENS + 2} tokens"
        )
    ShiftPositions(decoder.first_position)(graph)
    return TracedModel(graph, fusions)


def _sample(decoder: TorchDecoder) -> tuple[dict[str, Any], nn.Module]:
    """The inputs of a step that goes on with several tokens from a past: the general case of prompt and decode."""
    size = decoder.vocab_size
    low = 3 if size > 8 else 0
    ids = torch.arange(SAMPLE_BATCH * SAMPLE_TOKENS).reshape(SAMPLE_BATCH, SAMPLE_TOKENS) % (size - low) + low
    mask = torch.ones_like(ids)
    mask[-1, :SAMPLE_PADDING] = 0
    with _quiet():
        try:
            parts = decompose_for_generation(
                decoder.model,
                {"input_ids": ids, "attention_mask": mask},
                multi_token_decode=True,
            )
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{decoder.name}: a step with a cache can't be captured: {_first_line(error)}"
            ) from error
    if "decode" not in parts:
        raise UnsupportedModelError(f"{decoder.name}: it has no decode step; parts found: {', '.join(parts)}")
    component, inputs = parts["decode"]
    cache = inputs.get("past_key_values")
    if not isinstance(cache, DynamicCache) or not all(_has_keys_and_values(layer) for layer in cache.layers):
        raise UnsupportedModelError(
            f"{decoder.name}: its cache ({type(cache).__name__}) is not made of keys and values of every layer"
        )
    return dict(inputs), component


def _has_keys_and_values(layer: object) -> bool:
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("keys", "values"))


def _dynamic_shapes(component: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Mark the axes that vary and no others: batch and length. All other axes then are numbers, and tracing is faster."""
    _, used, _ = prepare_for_export(component, dict(inputs))
    register_cache_pytrees_for_model(component)  # type: ignore[arg-type]

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            # Keys and values are [batch, heads, past, head_dim]; a count that a layer keeps is a scalar.
            axes = (0, 2) if value.dim() == 4 else tuple(range(min(value.dim(), 2)))
            return dict.fromkeys(axes, AUTO)
        if isinstance(value, DynamicCache):
            children, _ = torch.utils._pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
            return [of_nested(child) for child in children]
        return None

    def of_nested(child: Any) -> Any:
        if isinstance(child, list | tuple):
            return type(child)(of_nested(item) for item in child)
        if isinstance(child, dict):
            return {key: of_nested(item) for key, item in child.items()}
        return of(child)

    return {key: of(value) for key, value in used.items()}


@contextlib.contextmanager
def _early_reject() -> Iterator[None]:
    """Make onnxscript's matcher skip, without a look at the graph, nodes that can't begin a pattern of several outputs.

    It lists the whole graph once a node and rule before it compares the first operator, which makes the exporter's optimiser
    quadratic in the number of nodes (half of an export of 30 layers). The outcome is the same; see
    `docs/decisions/0003-tracing.md`.
    """
    original = _matcher.SimplePatternMatcher.match

    def match(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            first = self.pattern.output_nodes[0].op_identifier()
            if first is not None and first != node.op_identifier():
                return _basics.MatchResult().fail("another operator")
        return original(self, model, graph, node, **options)

    _matcher.SimplePatternMatcher.match = match  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        _matcher.SimplePatternMatcher.match = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to itself: they go to the log at debug level when something fails."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    spoken = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if os.environ.get("CLADA_DEBUG"):
            logging.getLogger(__name__).warning("%s", spoken.getvalue())


def _first_line(error: BaseException) -> str:
    """What went wrong first: the exporter wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
