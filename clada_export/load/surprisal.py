"""Surprisal, entropy and load for PyTorch logits.

The runtime has twins over NumPy: `clada_export.load.meter` and, with every rule, `clada_export.load.controllers`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.load.controllers import LOAD_LIMIT
from clada_export.load.signal import LoadSignal


def surprisal_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """S = LSE(z) - z[x] and H = LSE(z) - sum softmax(z) z, in nats, from raw logits (`docs/load-signal.md`).

    Args:
        logits: [.., V], temperature 1, before any sampling rule.
        tokens: int64 [..], the token that was taken from each distribution.

    Returns:
        (S, H), float32 [..].
    """
    logits = logits.float()
    log_sum = logits.logsumexp(-1)
    surprisal = log_sum - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = log_sum - (logits.softmax(-1) * logits).sum(-1)
    return surprisal, entropy.clamp(min=0.0)


def load_from(signal: LoadSignal, surprisal: Tensor, entropy: Tensor) -> Tensor:
    """The load by rule `exp` and the calibrated statistics: float32, in standard deviations, clipped to -4..4."""
    s = (surprisal - signal.surprisal_mean) / signal.surprisal_std
    h = (entropy - signal.entropy_mean) / signal.entropy_std
    return torch.clamp(signal.surprisal_weight * s + signal.entropy_weight * h, -LOAD_LIMIT, LOAD_LIMIT)
