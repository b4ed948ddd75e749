"""The arrays of a sparsity plan (routers, neuron orders, adapters), which JSON does not hold: a safetensors file beside it."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from clada_export.errors import UsageError
from clada_export.foreign import PLAN_ARRAYS, reading
from clada_export.plan.layer import LayerPlan
from graph_passes.op import ContractError
from graph_passes.router import Router

PLAN_TENSORS = "plan.safetensors"
"""Beside a plan or an export's manifest: routers and neuron orders, if the plan has any."""


@dataclass(frozen=True)
class LayerTensors:
    """The arrays of one FFN's plan.

    Attributes:
        router: scores the granules.
        neurons: those that the engine holds, in their new order, int64 [f'].
        adapters: for gate and up (or both in one) and down, each as the model stores it [m, n], what fine-tuning adds to it:
            left [m, rank] and right [rank, n], float32, whose product it is; empty without fine-tuning.
    """

    router: Router | None = None
    neurons: np.ndarray | None = None
    adapters: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there are no arrays."""
        return self.router is None and self.neurons is None and not self.adapters


def named_arrays(arrays: Mapping[str, LayerTensors]) -> dict[str, np.ndarray]:
    """The arrays by their names in a file: `LAYER.neurons`, `LAYER.router.0.weight`, `LAYER.adapter.0.left`, ..."""
    named: dict[str, np.ndarray] = {}
    for name, tensors in sorted(arrays.items()):
        if tensors.neurons is not None:
            named[f"{name}.neurons"] = np.ascontiguousarray(tensors.neurons, dtype=np.int64)
        if tensors.router is not None:
            for index, (weight, bias) in enumerate(zip(tensors.router.weights, tensors.router.biases, strict=True)):
                named[f"{name}.router.{index}.weight"] = np.ascontiguousarray(weight, dtype=np.float32)
                if bias is not None:
                    named[f"{name}.router.{index}.bias"] = np.ascontiguousarray(bias, dtype=np.float32)
        for index, (left, right) in enumerate(tensors.adapters):
            named[f"{name}.adapter.{index}.left"] = np.ascontiguousarray(left, dtype=np.float32)
            named[f"{name}.adapter.{index}.right"] = np.ascontiguousarray(right, dtype=np.float32)
    return named


def tensors_digest(arrays: Mapping[str, LayerTensors]) -> str:
    """The sha256 of the arrays: names, types, shapes and bytes, in the order of the names."""
    return arrays_digest(named_arrays(arrays))


def arrays_digest(named: Mapping[str, np.ndarray]) -> str:
    """The sha256 of arrays by name, as `tensors_digest`."""
    digest = hashlib.sha256()
    for name, array in sorted(named.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, arrays: Mapping[str, LayerTensors], weights_digest: str) -> None:
    """Write arrays.

    Args:
        weights_digest: of the model that they are for; goes into the file's metadata.
    """
    save_file(named_arrays(arrays), path, metadata={"weights_digest": weights_digest})


def load_tensors(path: Path, layers: Sequence[LayerPlan], digest: str) -> dict[str, LayerTensors]:
    """Read the arrays that `layers` ask for.

    Args:
        digest: `tensors_digest` of what was written.

    Raises:
        UsageError: no such file, a damaged one, one of another plan or model, or arrays that do not fit their layers.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UsageError(f"{path}: the plan's routers are in this file, and it is missing; copy it beside the plan") from None
    except OSError as error:
        raise UsageError(f"{path}: the plan's routers can't be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):  # a pipe would have us wait
        raise UsageError(f"{path}: the plan's routers can't be read: it is not a regular file")
    with reading(PLAN_ARRAYS, path):
        named = load_file(path)
    if (found := arrays_digest(named)) != digest:
        raise UsageError(
            f"{path}: its arrays have digest {found[:16]}..., and the plan says {digest[:16]}...: they belong to another plan"
        )
    return tensors_of_layers(str(path), layers, named)


def tensors_of_layers(path: str, layers: Sequence[LayerPlan], named: Mapping[str, np.ndarray]) -> dict[str, LayerTensors]:
    """The arrays of those layers that have any, from `named_arrays`.

    Args:
        path: where they come from, for the message.

    Raises:
        UsageError: arrays that are missing, or do not fit their layer.
    """
    found = {layer.name: _layer_tensors(path, layer, named) for layer in layers}
    return {name: item for name, item in found.items() if not item.empty}


def _layer_tensors(path: str, layer: LayerPlan, named: Mapping[str, np.ndarray]) -> LayerTensors:
    neurons = _array(path, layer, named, "neurons", np.int64)
    if neurons is None and (layer.reordered or layer.kept_neurons is not None):
        raise UsageError(f"{path}: holds no order of neurons for {layer.name!r}; it belongs to another model")
    if neurons is not None:
        inside = neurons.size and neurons.min() >= 0 and neurons.max() < layer.intermediate_size
        if neurons.shape != (layer.width,) or not inside or len(np.unique(neurons)) != len(neurons):
            raise UsageError(
                f"{path}: {layer.name!r}: the order of neurons has shape {list(neurons.shape)}; wanted {layer.width} different "
                f"ones of 0 to {layer.intermediate_size - 1}"
            )
    return LayerTensors(_router(path, layer, named), neurons, _adapters(path, layer, named))


def _router(path: str, layer: LayerPlan, named: Mapping[str, np.ndarray]) -> Router | None:
    form = layer.router
    if form is None:
        return None
    weights: list[np.ndarray] = []
    biases: list[np.ndarray | None] = []
    # As many as the file has: how many the plan says sizes nothing.
    while (weight := _array(path, layer, named, f"router.{len(weights)}.weight", np.float32)) is not None:
        biases.append(_array(path, layer, named, f"router.{len(weights)}.bias", np.float32))
        weights.append(weight)
    if len(weights) != form.layers:
        found = f"a router of {len(weights)} layers" if weights else "no router"
        raise UsageError(
            f"{path}: holds {found} for {layer.name!r}, and the plan says {form.layers}; it belongs to another model"
        )
    try:
        router = Router(
            tuple(weights), tuple(biases), form.hidden, form.output, form.normalise, form.scale, form.k, form.dense_rows
        )
    except ContractError as error:
        raise UsageError(f"{path}: {layer.name!r}: {error}") from error
    wanted = (layer.hidden_size, layer.scored)
    if (router.hidden_size, router.granules) != wanted:
        raise UsageError(
            f"{path}: the router of {layer.name!r} takes {router.hidden_size} values and scores {router.granules} granules; "
            f"this layer has {wanted[0]} and {wanted[1]}. It was made for another model"
        )
    return router


def _adapters(path: str, layer: LayerPlan, named: Mapping[str, np.ndarray]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """As many pairs as there are; whether their shapes are those of the weights is seen when they are added to them."""
    if layer.adapter_rank is None:
        return ()
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    while (left := _array(path, layer, named, f"adapter.{len(pairs)}.left", np.float32)) is not None:
        right = _array(path, layer, named, f"adapter.{len(pairs)}.right", np.float32)
        ranks = [left.shape[1:], None if right is None else right.shape[:1]]
        if right is None or left.ndim != 2 or right.ndim != 2 or ranks != [(layer.adapter_rank,)] * 2:
            raise UsageError(
                f"{path}: {layer.name!r}: adapter {len(pairs)} is no pair of matrices of rank {layer.adapter_rank}"
            )
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise UsageError(f"{path}: {layer.name!r}: adapter {len(pairs)} has a value that is not finite")
        pairs.append((left, right))
    if not pairs:
        raise UsageError(f"{path}: holds no adapters for {layer.name!r}; it belongs to another model")
    return tuple(pairs)


def _array(path: str, layer: LayerPlan, named: Mapping[str, np.ndarray], name: str, dtype: type) -> np.ndarray | None:
    array = named.get(f"{layer.name}.{name}")
    if array is not None and array.dtype != dtype:
        raise UsageError(f"{path}: {layer.name}.{name} has type {array.dtype}; wanted {np.dtype(dtype)}")
    return array
