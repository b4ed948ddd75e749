"""Low-rank changes of an FFN's weights, as in LoRA (arXiv 2106.09685): what fine-tuning leaves behind, small enough to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.plan.tensors import LayerTensors


@dataclass(frozen=True)
class AdaptedWeight:
    """One weight matrix that can be adapted: the module's own array, [m, n] as the model stores it."""

    layer: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The array as it is now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def adapted_weights(ffn: EagerFFN) -> tuple[AdaptedWeight, ...]:
    """The matrices of an FFN in the order of its adapters: gate and up (or both in one), then down."""
    return tuple(AdaptedWeight(ffn.name, module) for module in (*ffn.inputs, ffn.down))


def require_own_weights(ffns: Sequence[EagerFFN]) -> None:
    """Refuse FFNs that share their weights: each would change the other's.

    Raises:
        UsageError: names two of them.
    """
    owners: dict[int, str] = {}
    for ffn in ffns:
        for item in adapted_weights(ffn):
            other = owners.setdefault(id(item.weight), ffn.name)
            if other != ffn.name:
                raise UsageError(
                    f"--finetune: {other} and {ffn.name} share their weights, so neither can be trained for itself"
                )


def check_adapters(ffns: Sequence[EagerFFN], arrays: Mapping[str, LayerTensors], origin: str = "plan") -> None:
    """Compare the shapes of all adapters with those of the weights.

    Raises:
        UsageError: adapters that do not fit the layer; names it.
    """
    for ffn in ffns:
        pairs = arrays[ffn.name].adapters if ffn.name in arrays else ()
        if not pairs:
            continue
        shapes = [list(item.weight.shape) for item in adapted_weights(ffn)]
        found = [[left.shape[0], right.shape[1]] for left, right in pairs]
        if found != shapes:
            raise UsageError(
                f"{origin}: {ffn.name}: the adapters are for weights of shapes {found}, and this layer's are {shapes}. They "
                "were made for another model"
            )


def apply_adapters(ffns: Sequence[EagerFFN], arrays: Mapping[str, LayerTensors]) -> bool:
    """Add the adapters to the weights, in place, in float32: weight + left @ right.

    Returns:
        Whether there were any.

    Raises:
        UsageError: adapters that do not fit the layer, or are so large that the sum is not finite; names the layer, and nothing
            has changed.
    """
    check_adapters(ffns, arrays)
    changes: list[tuple[Tensor, Tensor]] = []
    for ffn in ffns:
        pairs = arrays[ffn.name].adapters if ffn.name in arrays else ()
        for item, pair in zip(adapted_weights(ffn), pairs, strict=False):
            change = _product(*pair)
            if not bool(torch.isfinite(item.weight.float() + change).all()):
                raise UsageError(f"{ffn.name}: with the adapters added, a weight is not finite")
            changes.append((item.weight, change))
    with torch.no_grad():
        for weight, change in changes:
            weight.copy_(weight.float() + change)
    return bool(changes)


def _product(left: np.ndarray, right: np.ndarray) -> Tensor:
    return torch.from_numpy(left) @ torch.from_numpy(right)
