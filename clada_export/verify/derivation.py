"""The constants of the op, derived by verification's own path.

From the source's weights and the contract (`docs/sparse-ffn-op.md`) alone, in NumPy: nothing here is shared with what
calibration scores neurons with or what the export writes, so that a fault there is a difference here.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from clada_export.decoder.ffn import EagerFFN
from clada_export.op.reference import SparseFFNTensors
from graph_passes.op import SHADOW_BLOCK

Float32 = npt.NDArray[np.float32]

LEVELS = 16
"""Of a 4-bit copy: a block of weights is cut into one step less."""
WEIGHTS_AT_ONCE = 1 << 17
"""Half a megabyte: a processor's cache holds them and what is made of them on the way."""
LARGEST_HALF = np.float32(np.finfo(np.float16).max)


def down_row_norms(w_out: Float32) -> Float32:
    """The L2 norm of each neuron's down row [f], of `w_out` [f, d]: |h_j| times it is the norm of what neuron j adds to y.

    Summed in float64, rounded once.
    """
    wide = w_out.astype(np.float64)
    norms: Float32 = np.sqrt(np.einsum("fd,fd->f", wide, wide)).astype(np.float32)
    return norms


def four_bit_copy(w_in: Float32) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """The copy that score `shadow` reads: each block of 32 weights of a row as its minimum and 15 steps up to its maximum.

    Args:
        w_in: [f, n, d].

    Returns:
        `shadow` int8 [f, n, d/2], weight i of a block in the low four bits of byte i and weight i + 16 in its high ones;
        `shadow_scale` float16 [f, n, d/32, 2]: (step, minimum), rounded before the nearest level is chosen.
    """
    f, n, d = w_in.shape
    blocks = w_in.reshape(f, n, d // SHADOW_BLOCK, SHADOW_BLOCK)
    shadow = np.empty((*blocks.shape[:-1], SHADOW_BLOCK // 2), np.uint8)
    scale = np.empty((*blocks.shape[:-1], 2), np.float16)
    rows = max(1, WEIGHTS_AT_ONCE // (n * d))

    def copy(start: int) -> None:
        part = slice(start, start + rows)
        _copy_blocks(blocks[part], shadow[part], scale[part])

    # NumPy lets other threads run while it computes.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(copy, range(0, f, rows)):
            pass
    return shadow.reshape(f, n, d // 2).view(np.int8), scale


def _copy_blocks(weights: Float32, shadow: npt.NDArray[np.uint8], scale: npt.NDArray[np.float16]) -> None:
    """Fill in the copy of some blocks [.., 32]."""
    half = SHADOW_BLOCK // 2
    lowest, highest = weights.min(axis=-1), weights.max(axis=-1)
    scale[..., 0] = np.minimum((highest - lowest) / np.float32(LEVELS - 1), LARGEST_HALF)
    scale[..., 1] = np.clip(lowest, -LARGEST_HALF, LARGEST_HALF)
    step, minimum = (scale[..., which, None].astype(np.float32) for which in (0, 1))
    place = weights - minimum
    # A block of equal weights has no step; all its weights are its minimum.
    np.divide(place, np.where(step > 0, step, np.float32(np.inf)), out=place)
    level = np.clip(np.rint(place, out=place), 0, LEVELS - 1, out=place).astype(np.uint8)
    np.bitwise_or(level[..., :half], np.left_shift(level[..., half:], 4), out=shadow)


def derive_tensors(
    ffn: EagerFFN, score: str, threshold: tuple[float, ...], neurons: npt.NDArray[np.int64] | None
) -> SparseFFNTensors:
    """All constant inputs that the op should have for an FFN.

    Args:
        score: of the op.
        threshold: the plan's, one value or one a granule.
        neurons: int64 [f'], the neurons that the engine holds, in its order; None for all as they are.
    """
    w_in, w_out = ffn.w_in(), ffn.w_out()
    gate_bias, up_bias, down_bias = ffn.biases()
    if neurons is not None:
        order = torch.from_numpy(neurons)
        w_in, w_out = w_in[order], w_out[order]
        gate_bias, up_bias = (None if bias is None else bias[order] for bias in (gate_bias, up_bias))
    scale = shadow = shadow_scale = None
    if score in ("exact", "shadow"):
        scale = torch.from_numpy(down_row_norms(w_out.float().numpy()))
    if score == "shadow":
        shadow, shadow_scale = (torch.from_numpy(array) for array in four_bit_copy(w_in.float().numpy()))
    return SparseFFNTensors(
        w_in=w_in,
        w_out=w_out,
        threshold=torch.tensor(threshold, dtype=torch.float32),
        neuron_scale=scale,
        shadow=shadow,
        shadow_scale=shadow_scale,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    )
