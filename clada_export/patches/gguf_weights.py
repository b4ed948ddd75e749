"""Let transformers read the weights of a GGUF file when their turn comes, and what describes them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as reading

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="gguf_weights",
    package="transformers",
    made_for="5.23.0",
    reason="It unpacks every tensor of a GGUF file into memory before it places the first one, by one core; parses all "
    "that describes the file anew for the configuration, the weights and the tokenizer; and makes the map of names for every "
    "module.",
    until="all architectures go through transformers.integrations.gguf (GGUF_ARCHS), with blocks unpacked as they are placed",
)

Unpack = Callable[[Any], Tensor]
"""Takes a tensor of gguf's reader, gives its values: float32, in PyTorch's order of axes."""
GiveBack = Callable[[Tensor], None]

private: Any = reading
_PROCESSORS = frozenset(
    getattr(reading, name)
    for name in (
        "TensorProcessor",
        "LlamaTensorProcessor",
        "BloomTensorProcessor",
        "MambaTensorProcessor",
        "NemotronTensorProcessor",
        "Gemma2TensorProcessor",
        "Lfm2TensorProcessor",
    )
)
"""Those that make one weight of one tensor, under its name. The others gather or split experts, and are left as they are."""


class WeightOnDemand:
    """A weight that transformers takes for a slice of a safetensors file: read where it is asked for all of it."""

    def __init__(self, make: Callable[[], Tensor], shape: tuple[int, ...]) -> None:
        self._make, self._shape = make, shape

    def __getitem__(self, index: Any) -> Tensor:
        """The weight; `index` is an ellipsis."""
        return self._make()

    def get_dtype(self) -> str:
        """As safetensors calls float32."""
        return "F32"

    def get_shape(self) -> list[int]:
        """As it is stored: some are given another."""
        return list(self._shape)


@contextmanager
def gguf_weights(unpack: Unpack, give_back: GiveBack) -> Iterator[None]:
    """Let transformers get weights that are unpacked when they are placed.

    Args:
        unpack: reads one tensor.
        give_back: told of what `unpack` gave, where it was used only to make the weight of it.
    """
    original: Any = private.load_gguf_checkpoint
    parsed: dict[str, dict[str, Any]] = {}

    def described(path: str) -> dict[str, Any]:
        if path not in parsed:
            parsed[path] = original(path)
        return {name: dict(part) for name, part in parsed[path].items()}

    def load(path: Any, return_tensors: bool = False, model_to_load: Any = None, torch_dtype: Any = None) -> dict[str, Any]:
        result = described(str(path))
        if not return_tensors:
            return result
        import gguf

        reader = gguf.GGUFReader(path)
        kind = private.TENSOR_PROCESSORS.get(private.read_field(reader, "general.architecture")[0], private.TensorProcessor)
        if kind not in _PROCESSORS:
            whole: dict[str, Any] = original(path, True, model_to_load, torch_dtype)
            return whole
        processor = kind(config=result["config"])
        with _one_name_map():
            names = private.get_gguf_hf_weights_map(model_to_load, processor)

        def weight(tensor: Any) -> WeightOnDemand:
            def make() -> Tensor:
                values = unpack(tensor)
                array = values.numpy()
                made = processor.process(weights=array, name=tensor.name, tensor_key_mapping=names, parsed_parameters=result)
                if made.weights is not array:
                    values, used = torch.from_numpy(np.copy(made.weights)), values
                    give_back(used)
                return values if torch_dtype is None else values.to(torch_dtype)

            return WeightOnDemand(make, shape_of(tensor))

        result["tensors"] = {names[tensor.name]: weight(tensor) for tensor in reader.tensors if tensor.name in names}
        return result

    vars(reading)["load_gguf_checkpoint"] = load
    try:
        yield
    finally:
        vars(reading)["load_gguf_checkpoint"] = original


@contextmanager
def _one_name_map() -> Iterator[None]:
    """Let gguf's map of names be made once: transformers makes one for every module of the model."""
    import gguf

    original = gguf.get_tensor_name_map
    vars(gguf)["get_tensor_name_map"] = cache(original)
    try:
        yield
    finally:
        vars(gguf)["get_tensor_name_map"] = original


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor of gguf's reader in PyTorch's order."""
    shape: npt.NDArray[np.uint64] = tensor.shape
    return tuple(int(length) for length in reversed(shape.tolist()))
