"""A decoder with fewer layers and without weights, to be traced in the place of the whole one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from clada_export.trace.recipes import SMALL
from clada_export.trace.stack import Stack


@contextmanager
def shortened(model: nn.Module, stack: Stack) -> Iterator[None]:
    """Let the model have only the layers that are traced, and stand-ins for its parameters; afterwards it is as it was.

    Its configuration still speaks of all layers: what the others are computed from it does not change.
    """
    parent, name = _parent(model, stack.path)
    layers = parent._modules[name]
    assert isinstance(layers, nn.ModuleList)
    parent._modules[name] = nn.ModuleList(list(layers)[: stack.traced])
    try:
        with _without_weights(model):
            yield
    finally:
        parent._modules[name] = layers


def weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters by every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    where, _, name = path.rpartition(".")
    return model.get_submodule(where), name


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    """Stand-ins in the place of parameters; those that are one stay one."""
    places = [(module, name, value) for module in model.modules() for name, value in module._parameters.items()]
    stand_ins: dict[int, nn.Parameter] = {}
    for module, name, value in places:
        if value is not None:
            if id(value) not in stand_ins:
                stand_ins[id(value)] = _stand_in(value, len(stand_ins))
            module._parameters[name] = stand_ins[id(value)]
    try:
        yield
    finally:
        for module, name, value in places:
            module._parameters[name] = value


def _stand_in(parameter: nn.Parameter, number: int) -> nn.Parameter:
    """A parameter of the same shape, strides and type.

    Large ones are zeros that take no memory, as nobody writes to their pages. Small ones are unlike each other, for the
    exporter makes one constant of those that are equal.
    """
    sizes = zip(parameter.shape, parameter.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in sizes) if parameter.numel() else 0
    memory = torch.from_numpy(np.zeros(extent * parameter.element_size(), np.uint8)).view(parameter.dtype)
    stand_in = memory.as_strided(parameter.shape, parameter.stride())
    if parameter.numel() <= SMALL and parameter.dtype.is_floating_point:
        stand_in.copy_(_distinct(parameter.numel(), number).reshape(parameter.shape))
    return nn.Parameter(stand_in, requires_grad=False)


def _distinct(count: int, number: int) -> Tensor:
    """`count` values, unlike those of other numbers, which float16 and bfloat16 hold exactly: 128 in each power of two."""
    codes = np.random.default_rng(number).integers(0, 2048, count)
    codes[:1] = number % 2048
    values = (1 + (codes % 128) / 128) * 2.0 ** (codes // 128 % 8 - 4) * np.where(codes < 1024, 1, -1)
    return torch.from_numpy(values)
