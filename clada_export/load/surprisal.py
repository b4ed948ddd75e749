"""Surprisal and entropy, from raw logits: one formula for NumPy (the runtime) and PyTorch (calibration).

Running an engine must not import torch, so nothing here does: a tensor is asked for what it can do. What differs is the type of
the sums: float64 for arrays, which are one step of a batch, and float32 for tensors, which are whole texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from clada_export.load.values import Array

if TYPE_CHECKING:
    from torch import Tensor


@overload
def surprisal_entropy(
    logits: npt.NDArray[np.floating],
    tokens: npt.ArrayLike,
    log_sum_exp: npt.NDArray[np.floating] | None = None,
    entropy: npt.NDArray[np.floating] | None = None,
) -> tuple[Array, Array]: ...


@overload
def surprisal_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]: ...


def surprisal_entropy(logits: Any, tokens: Any, log_sum_exp: Any = None, entropy: Any = None) -> tuple[Any, Any]:
    """Surprisal of the chosen tokens and entropy of the distribution, both in nats (`docs/load-signal.md`).

    S = LSE(z) - z[x] and H = LSE(z) - sum softmax(z) z, at temperature 1.

    Args:
        logits: z, raw: an array [B, V], or a tensor [.., V].
        tokens: x, [B] or int64 [..], the tokens that were taken from them.
        log_sum_exp, entropy: [B], arrays, if the graph gave them: then only the tokens' own logits are read.

    Returns:
        (S, H), shaped as `tokens`. Of arrays float64, and NaN for a row with a logit that is not finite; of tensors float32.

    Raises:
        ValueError: the shapes of arrays do not belong together.
    """
    if not isinstance(logits, np.ndarray):
        values = logits.float()
        chosen = values.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return _signals(values.logsumexp(-1), chosen, (values.softmax(-1) * values).sum(-1))
    tokens = np.asarray(tokens, dtype=np.int64)
    if logits.ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"logits [B, V] and tokens [B] are wanted; the shapes are {logits.shape} and {tokens.shape}")
    if log_sum_exp is not None and entropy is not None:
        return _given(logits, tokens, log_sum_exp, entropy)
    return _of_array(logits, tokens)


def _signals(log_sum_exp: Any, chosen: Any, mean: Any) -> tuple[Any, Any]:
    """(S, H), which do not change if a constant is added to all logits of a row.

    Args:
        chosen: the logit of the token that was taken; mean: of the logits, under their softmax. All of one shape.
    """
    return log_sum_exp - chosen, (log_sum_exp - mean).clip(min=0.0)


def _of_array(logits: npt.NDArray[np.floating], tokens: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Of logits [B, V] shifted by each row's maximum."""
    finite = np.isfinite(logits).all(axis=1)
    shifted = np.where(finite[:, None], logits, 0.0).astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    mean = np.einsum("bv,bv->b", weights, shifted) / total
    surprisal, entropy = _signals(np.log(total), shifted[np.arange(len(tokens)), tokens], mean)
    return np.where(finite, surprisal, np.nan), np.where(finite, entropy, np.nan)


def _given(
    logits: npt.NDArray[np.floating],
    tokens: npt.NDArray[np.int64],
    log_sum_exp: npt.NDArray[np.floating],
    entropy: npt.NDArray[np.floating],
) -> tuple[Array, Array]:
    """What the graph has summed already; both of its numbers are finite where every logit is."""
    if log_sum_exp.shape != tokens.shape or entropy.shape != tokens.shape:
        raise ValueError(f"log_sum_exp and entropy [B] are wanted; the shapes are {log_sum_exp.shape} and {entropy.shape}")
    known = np.isfinite(entropy) & np.isfinite(log_sum_exp)
    chosen = np.where(known, logits[np.arange(len(tokens)), tokens], 0.0).astype(np.float64)
    surprisal = np.where(known, log_sum_exp.astype(np.float64) - chosen, np.nan)
    return surprisal, np.where(known, entropy.astype(np.float64), np.nan)
