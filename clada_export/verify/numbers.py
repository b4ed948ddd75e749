"""Numbers that compare two sets of logits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

LARGEST_LOG = 700.0
"""e^700 is the largest perplexity that is told; float64 ends at e^709."""


@dataclass(frozen=True)
class ParityNumbers:
    """`found` against `wanted`, over all positions.

    Attributes:
        positions: rows compared.
        max_abs, mean_abs: of the logits' differences.
        relative: norm of the difference / norm of `wanted`.
        cosine: the lowest of all positions.
        kl: mean KL(wanted || found) of the softmax, nats.
        top1: share of positions with the same best token.
        largest_logit: max abs of `wanted`, for scale.
    """

    positions: int
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    kl: float
    top1: float
    largest_logit: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Natural log of the softmax over the last axis, in float64."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result


def compare_logits(found: Logits, wanted: Logits) -> ParityNumbers:
    """Compare logits [positions, V].

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"logits of shape {found.shape} against {wanted.shape}")
    if not len(found):
        return ParityNumbers(0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    if not np.isfinite(found).all():
        # A NaN would make every maximum below NaN or, worse, vanish in a comparison.
        return ParityNumbers(len(found), np.inf, np.inf, np.inf, -1.0, np.inf, 0.0, float(np.abs(wanted).max()))
    difference = found.astype(np.float64) - wanted
    norms = np.linalg.norm(found.astype(np.float64), axis=-1) * np.linalg.norm(wanted.astype(np.float64), axis=-1)
    cosine = (found.astype(np.float64) * wanted).sum(-1) / np.maximum(norms, 1e-300)
    log_wanted, log_found = log_softmax(wanted), log_softmax(found)
    kl = (np.exp(log_wanted) * (log_wanted - log_found)).sum(-1)
    return ParityNumbers(
        positions=len(found),
        max_abs=float(np.abs(difference).max()),
        mean_abs=float(np.abs(difference).mean()),
        relative=float(np.linalg.norm(difference) / max(float(np.linalg.norm(wanted.astype(np.float64))), 1e-300)),
        cosine=float(cosine.min()),
        kl=float(max(kl.mean(), 0.0)),
        top1=float((found.argmax(-1) == wanted.argmax(-1)).mean()),
        largest_logit=float(np.abs(wanted).max()),
    )


def perplexity(nll: float) -> float:
    """exp(mean nll), at most e^700; nll in nats a token."""
    return math.exp(min(nll, LARGEST_LOG))


def perplexity_rise(difference: float) -> float:
    """exp(mean difference of nll) - 1, at most e^700: how far perplexity rises, as a share."""
    return math.expm1(min(difference, LARGEST_LOG))


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences share from the start."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
