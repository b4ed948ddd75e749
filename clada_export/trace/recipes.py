"""How constants of a traced graph came from the weights: recorded while the exporter folds and packs, followed again later."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

Array = npt.NDArray[Any]
Rename = Callable[[str], str]
"""From the name of a weight to that of its like in another layer."""

SMALL = 8192
"""Elements up to which constants are folded whatever the operator, and computed at once; larger ones when they are read."""


@dataclass(frozen=True)
class Weight:
    """A parameter, by its name in the eager model."""

    name: str


@dataclass(frozen=True)
class Step:
    """A call of NumPy whose arguments hold recipes where arrays were that came from weights."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


Recipe = Weight | Step


class Recorded(np.ndarray):
    """An array that remembers what was done to the weights it came from; None once that was lost.

    NumPy's functions and the methods below are recorded. Whatever else makes an array of it makes one without a recipe.
    """

    recipe: Recipe | None

    @classmethod
    def of(cls, array: Array, recipe: Recipe) -> Recorded:
        """A view of the array that has a recipe."""
        recorded = array.view(cls)
        recorded.recipe = recipe
        return recorded

    def __array_finalize__(self, source: object) -> None:
        self.recipe = None

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return _record(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _record(function, args, kwargs)

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return _record(np.ndarray.astype, (self, *args), kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        return _record(np.ndarray.reshape, (self, *args), kwargs)

    def transpose(self, *args: Any) -> Any:
        return _record(np.ndarray.transpose, (self, *args), {})

    def __getitem__(self, key: Any) -> Any:
        return _record(np.ndarray.__getitem__, (self, key), {})

    def view(self, *args: Any, **kwargs: Any) -> Any:
        is_class = bool(args) and isinstance(args[0], type) and issubclass(args[0], np.ndarray)
        same_type = not kwargs and len(args) == 1 and not is_class and np.dtype(args[0]) == self.dtype
        return self if same_type else super().view(*args, **kwargs)


def _record(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call it on plain arrays, and let what it returns know how it was made."""
    result = function(*_plain(args), **_plain(dict(kwargs)))
    if not isinstance(result, np.ndarray) or not _known(args) or not _known(kwargs):
        return result
    recorded = result.view(Recorded) if result.base is not None else _in_own_memory(result)
    recorded.recipe = Step(function, _recipes(tuple(args)), _recipes(dict(kwargs)))
    return recorded


def _in_own_memory(array: Array) -> Recorded:
    """The same elements if they are few; many are zeros, as those of large stand-ins are, in pages that are never touched.

    The memory is no array's: NumPy would take such an array for the base of what `np.asarray` makes of this one, and the
    recipe would be out of reach.
    """
    memory = bytearray(array.tobytes()) if array.size <= SMALL else mmap.mmap(-1, array.nbytes)
    return np.ndarray.__new__(Recorded, array.shape, array.dtype, memory)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)


def _plain(value: Any) -> Any:
    return _map(value, lambda item: np.ndarray.view(item, np.ndarray) if isinstance(item, Recorded) else item)


def _recipes(value: Any) -> Any:
    return _map(value, lambda item: item.recipe if isinstance(item, Recorded) else item)


def _known(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_known(item) for item in value)
    if isinstance(value, Mapping):
        return all(_known(item) for item in value.values())
    return not isinstance(value, Recorded) or value.recipe is not None


class StandIn(TorchTensor):
    """The constant of a parameter of which only the shape is known: what is computed from it is recorded.

    Args:
        tensor: what the parameter was traced with.
        weight: the parameter's name in the eager model.
    """

    def __init__(self, tensor: Tensor, weight: str) -> None:
        super().__init__(tensor, name=weight)
        self.weight = weight

    def numpy(self) -> Array:
        """See `ir.TensorProtocol`."""
        return Recorded.of(super().numpy(), Weight(self.weight))


def recipe_of(tensor: ir.TensorProtocol | None) -> Recipe | None:
    """How a constant of the graph came from weights; None if, as far as was seen, it did not."""
    if isinstance(tensor, StandIn):
        return Weight(tensor.weight)
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, np.ndarray) and not isinstance(raw, Recorded) and isinstance(raw.base, Recorded):
        # What `np.asarray` and its like return of a recorded array is a view of the same elements, or it is another array.
        seen = raw.base
        raw = seen if (seen.shape, seen.strides, seen.dtype) == (raw.shape, raw.strides, raw.dtype) else None
    return raw.recipe if isinstance(raw, Recorded) else None


def weights_in(recipe: Recipe) -> tuple[str, ...]:
    """The names of the weights that it starts from, in their order; one that is used twice comes twice."""
    if isinstance(recipe, Weight):
        return (recipe.name,)
    found: list[str] = []

    def look(item: Any) -> None:
        if isinstance(item, Weight | Step):
            found.extend(weights_in(item))

    _map((recipe.arguments, dict(recipe.options)), look)
    return tuple(found)


def renamed(recipe: Recipe, rename: Rename) -> Recipe:
    """The same steps from other weights."""
    if isinstance(recipe, Weight):
        return Weight(rename(recipe.name))

    def change(item: Any) -> Any:
        return renamed(item, rename) if isinstance(item, Weight | Step) else item

    return Step(recipe.function, _map(recipe.arguments, change), _map(dict(recipe.options), change))


def same_recipe(one: object, other: object) -> bool:
    """Whether two recipes are the same steps from the same weights."""
    if isinstance(one, Step) and isinstance(other, Step):
        same = one.function == other.function
        return same and same_recipe(one.arguments, other.arguments) and same_recipe(one.options, other.options)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_recipe(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_recipe, one, other))
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    return type(one) is type(other) and one == other


def constant(recipe: Recipe, like: ir.TensorProtocol, name: str, weights: Mapping[str, Tensor]) -> ir.TensorProtocol:
    """The constant that the recipe gives of real weights; none is copied before it is read, but for small ones.

    Args:
        like: the constant of the stand-ins, which has the type and shape.
        weights: of the eager model, by name.
    """
    if isinstance(recipe, Weight):
        return TorchTensor(weights[recipe.name], name=name)
    follow = partial(_follow, recipe, name, weights)
    if like.size <= SMALL:
        return follow()
    return ir.LazyTensor(follow, dtype=like.dtype, shape=ir.Shape(like.shape.numpy()), name=name)


def _follow(recipe: Recipe, name: str, weights: Mapping[str, Tensor]) -> ir.TensorProtocol:
    def result(item: Any) -> Any:
        if isinstance(item, Weight):
            return TorchTensor(weights[item.name]).numpy()
        if isinstance(item, Step):
            return item.function(*_map(item.arguments, result), **_map(dict(item.options), result))
        return item

    return ir.Tensor(result(recipe), name=name)


def is_lost(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a constant that is not known to come from weights may do so: what was recorded ended, or it is large and zero."""
    if recipe_of(tensor) is not None or tensor is None:
        return False
    if isinstance(getattr(tensor, "raw", None), Recorded):
        return True
    return tensor.size > SMALL and not np.any(tensor.numpy())
