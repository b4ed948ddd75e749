"""One feed-forward layer of an eager model, and its weights in the op's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

PACKINGS = ("halves", "swapped_halves", "interleaved", "swapped_interleaved")
"""How gate and up lie in one projection: gate then up, up then gate, in turns from the gate, in turns from up."""


@dataclass(frozen=True)
class EagerFFN:
    """One FFN of the eager model: hidden_size d, intermediate_size f, n = 2 (gated) or 1 input rows a neuron.

    Attributes:
        name: the module path of the *down* projection (`model.layers.0.mlp.down_proj`): the one name that the eager model and
            the exported graph share.
        inputs: the projections of x: (gate, up), one that packs both, or (up,).
        packing: one of `PACKINGS`, where one projection packs both; None elsewhere.
    """

    name: str
    inputs: tuple[nn.Module, ...]
    down: nn.Module
    activation: str
    gated: bool
    hidden_size: int
    intermediate_size: int
    packing: str | None = None

    @property
    def has_bias(self) -> bool:
        """Whether any of the projections has a bias."""
        return any(getattr(module, "bias", None) is not None for module in (*self.inputs, self.down))

    def w_in(self) -> Tensor:
        """A new float32 tensor [f, n, d], neuron-major."""
        return torch.stack(self.input_rows(), dim=1).float()

    def input_rows(self) -> tuple[Tensor, ...]:
        """(gate, up) or (up,), each [f, d], in the model's type and memory."""
        if self.packing is not None:
            return unpack(weight_rows(self.inputs[0]), self.packing, 0)
        return tuple(weight_rows(module) for module in self.inputs)

    def w_out(self) -> Tensor:
        """The down projection [f, d], one row a neuron, float32 (may share memory with the model)."""
        return weight_rows(self.down).t().float()

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(gate_bias [f] or None, up_bias [f] or None, down_bias [d] or None), zeros where only others exist."""
        if not self.has_bias:
            return None, None, None
        f, d = self.intermediate_size, self.hidden_size
        found = [_bias(module, f if self.packing is None else f * 2) for module in self.inputs]
        if self.packing is not None:
            found = list(unpack(found[0], self.packing, 0))
        down = _bias(self.down, d)
        return (found[0], found[1], down) if self.gated else (None, found[0], down)


@dataclass(frozen=True)
class SkippedFFN:
    """An FFN that stays dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class EagerFFNs:
    """What `find_eager_ffns` found."""

    found: tuple[EagerFFN, ...]
    skipped: tuple[SkippedFFN, ...]


class ScoredFFN(nn.Module):
    """An FFN whose hidden activations are weighed by scores, unless `plain` is set: then it is the FFN alone."""

    plain = False


@contextmanager
def plain_ffns(model: nn.Module) -> Iterator[None]:
    """Let every `ScoredFFN` of a model be a plain FFN, as searches for FFNs want to see it."""
    scored = [module for module in model.modules() if isinstance(module, ScoredFFN)]
    before = [module.plain for module in scored]
    for module in scored:
        module.plain = True
    try:
        yield
    finally:
        for module, plain in zip(scored, before, strict=True):
            module.plain = plain


def on_copy(ffns: Sequence[EagerFFN], model: nn.Module, copy: nn.Module) -> tuple[EagerFFN, ...]:
    """The same FFNs in a copy of their model, in whatever type it is."""
    paths = {id(module): path for path, module in model.named_modules()}

    def there(module: nn.Module) -> nn.Module:
        return copy.get_submodule(paths[id(module)])

    return tuple(replace(ffn, inputs=tuple(there(module) for module in ffn.inputs), down=there(ffn.down)) for ffn in ffns)


def unpack(packed: Tensor, packing: str, dim: int) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of the axis `dim` (0 or -1) of a packed projection's weight, bias or result."""
    if packing in ("halves", "swapped_halves"):
        first, second = packed.chunk(2, dim=dim)
    else:
        steps = [(slice(start, None, 2), ...) if dim == 0 else (..., slice(start, None, 2)) for start in (0, 1)]
        first, second = packed[steps[0]], packed[steps[1]]
    return (second, first) if packing.startswith("swapped") else (first, second)


def is_projection(module: object) -> bool:
    """Whether a module multiplies by a matrix: `nn.Linear`, or the `Conv1D` of GPT-2."""
    if not isinstance(module, nn.Module):
        return False
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or _is_conv1d(module)) and isinstance(weight, Tensor) and weight.dim() == 2


def weight_rows(module: nn.Module) -> Tensor:
    """A projection's weight as [out, in]: `nn.Linear` keeps it so, `Conv1D` of GPT-2 transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.t() if _is_conv1d(module) else weight).detach()


def _bias(module: nn.Module, size: int) -> Tensor:
    bias = getattr(module, "bias", None)
    return bias.detach().float() if isinstance(bias, Tensor) else torch.zeros(size)


def _is_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf") and not isinstance(module, nn.Linear)
