"""Find the feed-forward layers of an eager model by their structure, whatever the model is called.

An FFN's name is the module path of its *down* projection (`model.layers.0.mlp.down_proj`): the one name that the eager model
and the exported graph share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clada_export.errors import UnsupportedModelError
from clada_export.reference import activate
from graph_passes.op import ACTIVATIONS


@dataclass(frozen=True)
class FFNLayout:
    """The attribute names of one way to write an FFN. `inputs` is (gate, up), a packed (gate_up,) or (up,)."""

    inputs: tuple[str, ...]
    down: str
    activation: str
    gated: bool


LAYOUTS = (
    FFNLayout(("gate_proj", "up_proj"), "down_proj", "act_fn", gated=True),
    FFNLayout(("gate_up_proj",), "down_proj", "activation_fn", gated=True),
    FFNLayout(("c_fc",), "c_proj", "act", gated=False),
    FFNLayout(("fc1",), "fc2", "activation_fn", gated=False),
)


@dataclass(frozen=True)
class EagerFFN:
    """One FFN of the eager model: hidden_size d, intermediate_size f, n = 2 (gated) or 1 input rows a neuron."""

    name: str
    layout: FFNLayout
    inputs: tuple[nn.Module, ...]
    down: nn.Module
    activation: str
    hidden_size: int
    intermediate_size: int

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.layout.gated

    @property
    def has_bias(self) -> bool:
        """Whether any of the projections has a bias."""
        return any(getattr(module, "bias", None) is not None for module in (*self.inputs, self.down))

    def w_in(self) -> Tensor:
        """A new float32 tensor [f, n, d], neuron-major."""
        weights = [_rows(module) for module in self.inputs]
        if self.gated and len(weights) == 1:
            weights = list(weights[0].chunk(2, dim=0))
        return torch.stack(weights, dim=1).float()

    def w_out(self) -> Tensor:
        """The down projection [f, d], one row a neuron, float32 (may share memory with the model)."""
        return _rows(self.down).t().float()

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(gate_bias [f] or None, up_bias [f] or None, down_bias [d] or None), zeros where only others exist."""
        if not self.has_bias:
            return None, None, None
        f, d = self.intermediate_size, self.hidden_size
        found = [_bias(module, f if len(self.inputs) == self.input_rows else f * 2) for module in self.inputs]
        if self.gated and len(found) == 1:
            found = list(found[0].chunk(2))
        down = _bias(self.down, d)
        return (found[0], found[1], down) if self.gated else (None, found[0], down)

    @property
    def input_rows(self) -> int:
        """n: 2 for a gated FFN, else 1."""
        return 2 if self.gated else 1


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


def _rows(module: nn.Module) -> Tensor:
    """A projection's weight as [out, in]: `nn.Linear` keeps it so, `Conv1D` of GPT-2 transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.t() if _is_conv1d(module) else weight).detach()


def _bias(module: nn.Module, size: int) -> Tensor:
    bias = getattr(module, "bias", None)
    return bias.detach().float() if isinstance(bias, Tensor) else torch.zeros(size)


def _is_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf") and not isinstance(module, nn.Linear)


def _is_projection(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return False
    weight = getattr(module, "weight", None)
    return (isinstance(module, nn.Linear) or _is_conv1d(module)) and isinstance(weight, Tensor) and weight.dim() == 2


def recognise_activation(function: object) -> str | None:
    """The contract's name of an activation, found by its values on a grid; None when it is none of them."""
    if not callable(function):
        return None
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float32)
    with torch.no_grad():
        try:
            found = function(grid)
        except (TypeError, RuntimeError):
            return None
    if not isinstance(found, Tensor) or found.shape != grid.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(found, activate(name, grid), rtol=0, atol=2e-6):
            return name
    return None


def _moe_parents(model: nn.Module) -> Iterator[str]:
    """The paths of modules that route tokens to experts."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            yield path


def find_eager_ffns(model: nn.Module) -> EagerFFNs:
    """Find every dense FFN of `model`.

    Returns:
        The FFNs in module order, and those that stay dense with the reason: routed experts, an activation that the op does
        not have, sizes that do not fit together.
    """
    found: list[EagerFFN] = []
    skipped: list[SkippedFFN] = []
    moe = list(_moe_parents(model))
    skipped += [SkippedFFN(path, "mixture of experts: routed experts are left dense") for path in moe]
    for path, module in model.named_modules():
        layout = next((item for item in LAYOUTS if _fits(module, item)), None)
        if layout is None or any(path.startswith(f"{parent}.experts") for parent in moe):
            continue
        name = f"{path}.{layout.down}" if path else layout.down
        inputs = tuple(getattr(module, item) for item in layout.inputs)
        down = getattr(module, layout.down)
        activation = recognise_activation(_activation_of(module, layout))
        if activation is None:
            skipped.append(SkippedFFN(name, f"its activation is not one of {', '.join(ACTIVATIONS)}"))
            continue
        d, f = _rows(down).shape
        rows = sum(_rows(item).shape[0] for item in inputs)
        if rows != f * (2 if layout.gated else 1) or any(_rows(item).shape[1] != d for item in inputs):
            skipped.append(SkippedFFN(name, f"its projections do not fit together: {rows} rows in, {f} columns out"))
            continue
        found.append(EagerFFN(name, layout, inputs, down, activation, d, f))
    return EagerFFNs(tuple(found), tuple(skipped))


def require_ffns(model: nn.Module) -> EagerFFNs:
    """`find_eager_ffns`, but at least one.

    Raises:
        UnsupportedModelError: no dense FFN was found; lists what was seen and why it does not count.
    """
    ffns = find_eager_ffns(model)
    if not ffns.found:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in ffns.skipped[:4]) or "no module looks like one"
        raise UnsupportedModelError(f"{type(model).__name__}: no feed-forward layer that could be compiled ({reasons})")
    return ffns


def _activation_of(module: nn.Module, layout: FFNLayout) -> object:
    return getattr(module, layout.activation, None)


def _fits(module: nn.Module, layout: FFNLayout) -> bool:
    names = (*layout.inputs, layout.down)
    return all(_is_projection(getattr(module, name, None)) for name in names) and hasattr(module, layout.activation)
