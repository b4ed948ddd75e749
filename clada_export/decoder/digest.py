"""What tells the weights of one decoder from those of every other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PIECE = 1 << 24
"""Elements that are hashed at once, where they have to be copied first."""


def weights_digest(model: nn.Module, used: Callable[[Tensor], None] = lambda tensor: None) -> str:
    """The sha256 of a model's state dict: names, types, shapes and bytes, in the order of the names.

    Tensors that share their memory (tied embeddings) are hashed once. No tensor is copied as a whole.

    Args:
        model: the model, on any device.
        used: told of each tensor that was read.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    first_name: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first_name:
            digest.update(f"= {first_name[key]}\n".encode())
            continue
        first_name[key] = name
        for piece in pieces(tensor.detach()):
            data: Any = piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(memoryview(data))
        used(tensor)
    return digest.hexdigest()


def pieces(tensor: Tensor, most: int = _PIECE) -> Iterator[Tensor]:
    """A tensor in pieces along its first axis, views of it, each of about `most` elements at most.

    What is done to a piece at a time needs no memory as large as the tensor.
    """
    if tensor.dim() == 0 or tensor.numel() <= most:
        yield tensor
        return
    yield from torch.split(tensor, max(1, most * tensor.shape[0] // tensor.numel()))


def state(model: nn.Module) -> tuple[tuple[str, int, int], ...] | None:
    """What changes whenever PyTorch changes a weight: of each its name, where it is, and how often it was written to.

    A write that PyTorch does not see (through NumPy, or through `.data`) does not show. None where a weight does not count its
    writes: it was made in inference mode.
    """
    try:
        return tuple((name, item.data_ptr(), item._version) for name, item in sorted(model.state_dict(keep_vars=True).items()))
    except RuntimeError:
        return None
