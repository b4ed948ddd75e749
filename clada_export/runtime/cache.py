"""The state between two runs of a graph: tensors that are handed on, and keys and values that grow in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from clada_export.artifact.manifest import CacheTensor

ROOM = 128
"""Columns that are made room for beyond those of the first run."""
ROUND = 256
"""Room is a multiple of so many columns."""


@dataclass
class State:
    """What one batch has come to. It is changed by each run, and belongs to one continuation.

    Attributes:
        handed: by input name, tensors that a run makes anew.
        room: columns that a key or value which grows in place has memory for.
        used: columns that it holds.
        buffers: by input name, that memory.
        binding: of inputs and outputs to this state's memory; None before the first run, and where nothing grows in place.
    """

    handed: dict[str, ort.OrtValue]
    room: int = 0
    used: int = 0
    buffers: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    binding: ort.IOBinding | None = None


def grow(state: State, growing: Sequence[CacheTensor], batch: int, columns: int) -> bool:
    """Make room for so many columns; whether the memory is other memory than before.

    Room doubles, so that a token is copied once or twice in all, however long the text becomes.
    """
    if columns <= state.room:
        return False
    wanted = max(2 * state.room, columns + ROOM)
    state.room = -(-wanted // ROUND) * ROUND
    for tensor in growing:
        assert tensor.in_place is not None
        shape = [batch, *(size if isinstance(size, int) else 0 for size in tensor.shape[1:])]
        shape[tensor.in_place] = state.room
        # Zeros are pages that nothing has touched yet: room costs no memory before it is used.
        new = np.zeros(shape, np.dtype(tensor.dtype))
        if state.used:
            held = (slice(None),) * tensor.in_place + (slice(0, state.used),)
            new[held] = state.buffers[tensor.past][held]
        state.buffers[tensor.past] = new
    return True


def bind(binding: ort.IOBinding, state: State, growing: Sequence[CacheTensor]) -> None:
    """Let past and present of each growing tensor be its buffer."""
    for tensor in growing:
        value = ort.OrtValue.ortvalue_from_numpy(state.buffers[tensor.past])
        binding.bind_ortvalue_input(tensor.past, value)
        binding.bind_ortvalue_output(tensor.present, value)


def sizes(tensors: Sequence[CacheTensor], batch: int) -> Mapping[str, list[int]]:
    """The shape of each tensor before the first run: axes that grow have a length of 0."""
    return {tensor.past: [batch, *(0 if isinstance(axis, str) else axis for axis in tensor.shape[1:])] for tensor in tensors}
