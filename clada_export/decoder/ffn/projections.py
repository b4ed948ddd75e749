"""The weight matrices of an FFN as [out, in] views, however the model stores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.ffn.layer import unpack
from clada_export.decoder.spool import Spool, room
from clada_export.op.reference import activate


@dataclass(frozen=True)
class FFNProjection:
    """One of gate, up and down. `weight` [out, in] and `bias` [out] (or None) share memory with the model."""

    name: str
    weight: Tensor
    bias: Tensor | None

    def write(self, weight: Tensor) -> None:
        """Put float32 [out, in] into the model, in the model's type."""
        self.weight.copy_(weight)


def projections(ffn: EagerFFN) -> tuple[FFNProjection, ...]:
    """Gate (if there is one), up and down, in this order; a packed gate_up is given as its two halves."""
    return (*_inputs(ffn), _whole("down", ffn.down))


def parameters(ffn: EagerFFN) -> Iterator[nn.Parameter]:
    """The weights, then the biases that pruning may change (gate and up)."""
    for module in (*ffn.inputs, ffn.down):
        assert isinstance(module.weight, nn.Parameter)
        yield module.weight
    for module in ffn.inputs:
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            yield bias


class Snapshot:
    """The parameters of some FFNs as they are now, to go back to. They lie in a file: they are most of a model.

    Raises:
        UsageError: there is no room on the disk for them.
    """

    def __init__(self, ffns: Sequence[EagerFFN]) -> None:
        owned = {id(item): item for ffn in ffns for item in parameters(ffn)}
        spool = Spool()
        spool.reserve(room((item.numel(), item.element_size()) for item in owned.values()))
        self._values = [(item, spool.copy(item.detach())) for item in owned.values()]
        # They are read once, if ever.
        spool.pages(value for _, value in self._values).rest()

    def restore(self) -> None:
        """Put them back, in place."""
        with torch.no_grad():
            for item, value in self._values:
                item.copy_(value)


def hidden(ffn: EagerFFN, x: Tensor) -> Tensor:
    """The input of the down projection, [.., f], for x [.., d], with the weights as they are now."""
    values: list[Tensor] = [module(x) for module in ffn.inputs]
    if not ffn.gated:
        return activate(ffn.activation, values[0])
    gate, up = values if ffn.packing is None else unpack(values[0], ffn.packing, -1)
    return activate(ffn.activation, gate) * up


def _inputs(ffn: EagerFFN) -> tuple[FFNProjection, ...]:
    names = ("gate", "up") if ffn.gated else ("up",)
    whole = [_whole(name, module) for name, module in zip(names, ffn.inputs, strict=False)]
    if ffn.packing is None:
        return tuple(whole)
    weights = unpack(whole[0].weight, ffn.packing, 0)
    biases: tuple[Tensor | None, ...] = (None, None) if whole[0].bias is None else unpack(whole[0].bias, ffn.packing, 0)
    return tuple(FFNProjection(name, weight, bias) for name, weight, bias in zip(names, weights, biases, strict=True))


def _whole(name: str, module: nn.Module) -> FFNProjection:
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    # An FFN that is no nn.Linear is GPT-2's Conv1D, which keeps its weight as [in, out].
    rows = weight if isinstance(module, nn.Linear) else weight.t()
    return FFNProjection(name, rows.detach(), bias.detach() if isinstance(bias, torch.Tensor) else None)
