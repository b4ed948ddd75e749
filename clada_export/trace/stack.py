"""The layers of a decoder, and which of them are alike: what is traced once and then repeated."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clada_export.decoder.model_config import text_config

INTERNALS = frozenset(vars(nn.Module()))
"""What every module has; parameters, buffers and parts are looked at by themselves."""

BLOCKS = 2
"""Blocks of alike layers that are traced: the second is repeated, and only if it is the first over again."""


class WholeError(Exception):
    """This decoder has to be traced as a whole; says why."""


@dataclass(frozen=True)
class Stack:
    """The layers that a decoder runs one after the other.

    After `first` layers, `period` layers come again and again, to the end of the stack.

    Attributes:
        path: of the module that holds them; a layer's path is this, a dot and its number.
        depth: how many there are.
    """

    path: str
    depth: int
    first: int
    period: int

    @property
    def traced(self) -> int:
        """How many layers are traced: the first ones, two blocks, and the last ones, which may differ as a graph.

        The last ones are what is left over when whole blocks are taken away, at least one.
        """
        return self.first + BLOCKS * self.period + (self.depth - self.first - 1) % self.period + 1

    @property
    def repeats(self) -> int:
        """How many blocks are added to those that are traced."""
        return (self.depth - self.traced) // self.period


def find_stack(model: nn.Module) -> Stack:
    """Find the layers, and their period.

    Raises:
        WholeError: there is no one list of the decoder's layers, or they are not alike in a period short enough to save work.
    """
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise WholeError("its configuration does not say how many layers it has")
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(path, list(module)) for path, module in lists if len(module) == depth]
    if len(stacks) != 1:
        raise WholeError(f"it has {len(stacks)} lists of {depth} modules, where one was expected")
    _require_plain(model)
    path, layers = stacks[0]
    kinds = _kinds(layers, config)
    found = [Stack(path, depth, first, period) for period in range(1, depth) if (first := _first(kinds, period)) is not None]
    best = min(found, key=lambda stack: stack.traced, default=None)
    if best is None or best.repeats < 1:
        raise WholeError(f"its {depth} layers are not alike in a period that comes more than {BLOCKS} times")
    return best


def _require_plain(model: nn.Module) -> None:
    """Stand-ins are made for plain parameters of one type."""
    parameters = list(model.parameters())
    if strange := next((type(item).__name__ for item in parameters if type(item) is not nn.Parameter), None):
        raise WholeError(f"it has parameters of the class {strange}")
    if len({item.dtype for item in parameters}) > 1:
        raise WholeError("its parameters are of several types")


def _first(kinds: Sequence[int], period: int) -> int | None:
    """From which layer on, not the very first, the kinds have this period; None if nothing is left to repeat."""
    first = len(kinds) - period
    while first > 1 and kinds[first - 1] == kinds[first - 1 + period]:
        first -= 1
    return first if len(kinds) - first > BLOCKS * period else None


def _kinds(layers: Sequence[nn.Module], config: Any) -> list[int]:
    """The number of each layer's kind: of the first layer that is like it."""
    lists = [value for value in _settings(config) if isinstance(value, list | tuple) and len(value) == len(layers)]
    last: dict[int, int] = {}
    kinds: list[int] = []
    for index, layer in enumerate(layers):

        def is_like(other: int, index: int = index, layer: nn.Module = layer) -> bool:
            same = all(values[other] == values[index] for values in lists)
            return same and _alike(layers[other], layer, other, index)

        # Like the first and the last one: an attribute is a layer's number in all of them, or in none.
        kinds.append(next((kind for kind in last if is_like(kind) and is_like(last[kind])), index))
        last[kinds[-1]] = index
    return kinds


def _settings(config: Any) -> list[Any]:
    return list(vars(config).values()) if hasattr(config, "__dict__") else []


def _alike(one: nn.Module, other: nn.Module, index: int, other_index: int) -> bool:
    """Whether two layers do the same with weights of the same shapes; numbers of theirs may be the layers' own."""
    if type(one) is not type(other) or one.training != other.training:
        return False
    if [name for name, _ in one.named_children()] != [name for name, _ in other.named_children()]:
        return False
    if not _same_tensors(one._parameters, other._parameters, values=False):
        return False
    if not _same_tensors(one._buffers, other._buffers, values=True):
        return False
    mine, theirs = _attributes(one), _attributes(other)
    if mine.keys() != theirs.keys():
        return False
    if not all(_same(mine[name], theirs[name], one, other, (index, other_index)) for name in mine):
        return False
    return all(_alike(*pair, index, other_index) for pair in zip(one.children(), other.children(), strict=True))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in INTERNALS}


def _same_tensors(one: Mapping[str, Tensor | None], other: Mapping[str, Tensor | None], *, values: bool) -> bool:
    if one.keys() != other.keys():
        return False
    return all(_same_tensor(one[name], other[name], values=values) for name in one)


def _same_tensor(one: Tensor | None, other: Tensor | None, *, values: bool) -> bool:
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype, one.stride()) != (other.shape, other.dtype, other.stride()):
        return False
    return not values or one is other or torch.equal(one, other)


def _same(one: Any, other: Any, mine: nn.Module, theirs: nn.Module, numbers: tuple[int, int]) -> bool:
    """Whether two attributes say the same: equal values, numbers that count the layers, or methods of their own modules."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, int) and not isinstance(one, bool):
        return bool(one == other or one - numbers[0] == other - numbers[1])
    if isinstance(one, Tensor):
        return _same_tensor(one, other, values=True)
    if isinstance(one, types.MethodType):
        return one.__func__ is other.__func__ and one.__self__ is mine and other.__self__ is theirs
    if isinstance(one, functools.partial):
        parts = ((one.func, other.func), (one.args, other.args), (one.keywords, other.keywords))
        return all(_same(a, b, mine, theirs, numbers) for a, b in parts)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_same(a, b, mine, theirs, numbers) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], mine, theirs, numbers) for key in one)
    return bool(one == other)
