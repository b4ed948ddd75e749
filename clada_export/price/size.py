"""How large a model is, as far as the price of an export depends on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
from torch import nn

from graph_passes.matchers.common import fixed_size

FLOAT32 = 4


class FFNSize(Protocol):
    """An FFN, of a PyTorch model or of a graph."""

    @property
    def hidden_size(self) -> int:
        """Numbers of its input and output."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Neurons."""
        ...

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        ...


@dataclass(frozen=True)
class ModelSize:
    """Counts of elements; a weight that is used in two places counts once.

    Attributes:
        parameters: of all weights.
        used: those that a token is multiplied with: all but an embedding that is only looked up. Routed experts count whole.
        largest: of the largest weight.
        ffn: of the FFNs that can be made sparse.
        widest: of the largest of these.
        layers: how many these are.
        vocabulary: tokens that logits are of; 0 if it is not known.
        stored: *bytes* of the weight files.
        graph: whether the model is an ONNX graph, whose weights are taken from its file.
    """

    parameters: int
    used: int
    largest: int
    ffn: int
    widest: int
    layers: int
    vocabulary: int
    stored: int
    graph: bool = False

    @property
    def float32_bytes(self) -> int:
        """Of all weights in float32, the type that exports compute in."""
        return self.parameters * FLOAT32

    @classmethod
    def of_model(cls, model: nn.Module, ffns: Iterable[FFNSize], stored: int) -> ModelSize:
        """Of a model of transformers, with weights or on the meta device.

        Args:
            stored: bytes of its weight files.
        """
        sizes = {id(weight): weight.numel() for weight in model.parameters()}
        inputs, outputs = (_weight(model, name) for name in ("get_input_embeddings", "get_output_embeddings"))
        looked_up = 0 if inputs is None or inputs is outputs else sizes.get(id(inputs), 0)
        total = sum(sizes.values())
        widths = [_elements(ffn) for ffn in ffns]
        vocabulary = 0 if outputs is None else int(outputs.shape[0])
        return cls(total, total - looked_up, max(sizes.values(), default=0), *_ffns(widths), vocabulary, stored)

    @classmethod
    def of_files(cls, ffns: Iterable[FFNSize], vocabulary: int, stored: int) -> ModelSize:
        """Of the files of an ONNX model, which holds its weights in float32."""
        widths = [_elements(ffn) for ffn in ffns]
        elements = stored // FLOAT32
        return cls(elements, elements, max(widths, default=0), *_ffns(widths), vocabulary, stored, graph=True)

    @classmethod
    def of_graph(cls, model: ir.Model, matches: Iterable[FFNSize]) -> ModelSize:
        """Of an ONNX graph; no weight is read."""
        values = [value.const_value for value in model.graph.initializers.values()]
        tensors = [tensor for tensor in values if tensor is not None and tensor.dtype.is_floating_point()]
        sizes = [tensor.size for tensor in tensors]
        stored = sum(int(tensor.size * tensor.dtype.itemsize) for tensor in tensors)
        widths = [_elements(match) for match in matches]
        return cls(sum(sizes), sum(sizes), max(sizes, default=0), *_ffns(widths), _vocabulary(model), stored, graph=True)


def _weight(model: nn.Module, ask: str) -> Any:
    try:
        return getattr(getattr(model, ask)(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None


def _elements(ffn: FFNSize) -> int:
    return ffn.hidden_size * ffn.intermediate_size * (3 if ffn.gated else 2)


def _ffns(widths: list[int]) -> tuple[int, int, int]:
    return sum(widths), max(widths, default=0), len(widths)


def _vocabulary(model: ir.Model) -> int:
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    shape = None if logits is None else logits.shape
    return (fixed_size(shape[-1]) or 0) if shape is not None and len(shape) else 0
