"""What tells the weights of one decoder from those of every other."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """The sha256 of a model's state dict: names, types, shapes and bytes, in the order of the names.

    Tensors that share their memory (tied embeddings) are hashed once.

    Args:
        model: the model, on any device.

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
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()
