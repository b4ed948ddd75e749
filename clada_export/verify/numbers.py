"""Numbers that compare two sets of logits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

NUMBERS_AT_ONCE = 1 << 21
"""Logits that are compared together: in float64, with what is made of them, a hundred megabytes."""
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
    parts = [
        _sums(found[start : start + rows], wanted[start : start + rows])
        for rows in (max(1, NUMBERS_AT_ONCE // found.shape[-1]),)
        for start in range(0, len(found), rows)
    ]
    whole = {name: sum(part[name] for part in parts) for name in ("abs", "square", "wanted_square", "kl", "top1")}
    return ParityNumbers(
        positions=len(found),
        max_abs=max(part["max_abs"] for part in parts),
        mean_abs=whole["abs"] / found.size,
        relative=math.sqrt(whole["square"]) / max(math.sqrt(whole["wanted_square"]), 1e-300),
        cosine=min(part["cosine"] for part in parts),
        kl=max(whole["kl"] / len(found), 0.0),
        top1=whole["top1"] / len(found),
        largest_logit=max(part["largest_logit"] for part in parts),
    )


def _sums(found: Logits, wanted: Logits) -> dict[str, float]:
    """Of some positions, in float64."""
    left, right = found.astype(np.float64), wanted.astype(np.float64)
    difference = left - right
    squares = np.einsum("pv,pv->p", right, right)
    norms = np.sqrt(np.einsum("pv,pv->p", left, left) * squares)
    cosine = np.einsum("pv,pv->p", left, right) / np.maximum(norms, 1e-300)
    square = np.einsum("pv,pv->", difference, difference)
    np.abs(difference, out=difference)
    return {
        "max_abs": float(difference.max()),
        "abs": float(difference.sum()),
        "square": float(square),
        "wanted_square": float(squares.sum()),
        "cosine": float(cosine.min()),
        "kl": float(divergence(right, left).sum()),
        "top1": float((found.argmax(-1) == wanted.argmax(-1)).sum()),
        "largest_logit": float(np.abs(wanted).max()),
    }


def divergence(wanted: npt.NDArray[np.floating], found: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """KL(wanted || found) of the softmax over the last axis of logits, nats, in float64."""
    log_wanted, log_found = log_softmax(wanted), log_softmax(found)
    log_found -= log_wanted
    np.exp(log_wanted, out=log_wanted)
    result: npt.NDArray[np.float64] = -np.einsum("...v,...v->...", log_wanted, log_found)
    return result


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
