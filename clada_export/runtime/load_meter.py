"""The load signal: how surprising the last token was and how unsure the model is, in standard deviations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clada_export.plan import LoadSignal

LOAD_LIMIT = 4.0
"""The load is clipped to [-LOAD_LIMIT, LOAD_LIMIT]."""


def surprisal_entropy(
    logits: npt.NDArray[np.floating], tokens: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Surprisal of the chosen tokens and entropy of the distribution, both in nats.

    S = LSE(z) - z[x] and H = LSE(z) - sum softmax(z) z, at temperature 1, in float64, shifted by the row's maximum.

    Args:
        logits: z, [B, V], raw.
        tokens: x, [B], the tokens that were taken from them.

    Returns:
        (S [B], H [B]); NaN for a row with a logit that is not finite.

    Raises:
        ValueError: the shapes do not belong together.
    """
    chosen = np.asarray(tokens, dtype=np.int64)
    if logits.ndim != 2 or chosen.shape != logits.shape[:1]:
        raise ValueError(f"logits [B, V] and tokens [B] are wanted; the shapes are {logits.shape} and {chosen.shape}")
    finite = np.isfinite(logits).all(axis=1)
    shifted = np.where(finite[:, None], logits, 0.0).astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    log_total = np.log(total)
    surprisal = log_total - shifted[np.arange(len(chosen)), chosen]
    entropy = log_total - np.einsum("bv,bv->b", weights, shifted) / total
    surprisal[~finite] = np.nan
    entropy[~finite] = np.nan
    return surprisal, entropy


class LoadMeter:
    """Turns logits and the tokens taken from them into the load of the next step.

    Args:
        signal: statistics and weights, from the manifest.
    """

    def __init__(self, signal: LoadSignal) -> None:
        self.signal = signal

    def update(self, logits: npt.NDArray[np.floating], tokens: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """The load of each row.

        Args:
            logits: [B, V], raw, from the pass before.
            tokens: [B], taken from them.

        Returns:
            [B] float32 within [-4, 4]; +inf (dense) for a row with a logit that is not finite.
        """
        surprisal, entropy = surprisal_entropy(logits, tokens)
        signal = self.signal
        load = signal.surprisal_weight * (surprisal - signal.surprisal_mean) / signal.surprisal_std
        load += signal.entropy_weight * (entropy - signal.entropy_mean) / signal.entropy_std
        load = np.clip(load, -LOAD_LIMIT, LOAD_LIMIT)
        return np.where(np.isnan(load), np.inf, load).astype(np.float32)
