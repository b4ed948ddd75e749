"""What a 16-bit type may cost: measured on eager PyTorch in that type, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import VerificationError
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.eager import ReferenceModel, SparseRun, dense_rows
from clada_export.verify.numbers import compare_logits

Float32 = npt.NDArray[np.float32]

CONSTANTS_SHARE = 0.1 / 3.0
"""Of `Rounding`, for a 16-bit graph whose values are widened to float32: a tenth of what eager PyTorch in the type differs.

What is rounded there are the graph's own constants. Eager PyTorch in bfloat16 differs by 0.58 for a logit of text on
SmolLM2-135M; a root of attention's scale that was rounded (0.35352 for 0.35355), and nothing else, made 5e-3.
"""

FACTOR = 3.0
"""How much further from float32 than eager PyTorch in its own type an engine may be: it rounds in other places."""


@dataclass(frozen=True)
class Rounding:
    """Bounds that a type adds to those of float32: the largest difference of a logit (dense), the mean KL(float32, rounded) of
    the sparse model, and the share of neurons that rounding alone flips."""

    logits: float = 0.0
    sparse_kl: float = 0.0
    flipped_share: float = 0.0

    def worst(self, other: Rounding) -> Rounding:
        """The larger of each."""
        return Rounding(
            max(self.logits, other.logits),
            max(self.sparse_kl, other.sparse_kl),
            max(self.flipped_share, other.flipped_share),
        )

    def times(self, share: float) -> Rounding:
        """A share of each."""
        return Rounding(self.logits * share, self.sparse_kl * share, self.flipped_share * share)


EXACT = Rounding()


class RoundedModel:
    """The eager model in a 16-bit type, dense and with reference FFNs.

    Args:
        decoder: float32, its weights rounded to the type already.
        dtype: `float16` or `bfloat16`.
    """

    def __init__(self, decoder: Decoder, plan: SparsityPlan, dtype: str) -> None:
        self._dtype = dtype
        self._decoder = require_torch(decoder, f"verification in {dtype}").in_dtype(dtype)
        self._reference = ReferenceModel(self._decoder, plan)

    def run_all(
        self, rows: Sequence[Sequence[int]], loads: Sequence[Float32], last: int, keep: Callable[[Float32], Float32]
    ) -> list[RoundedRun]:
        """Run rows, dense and with reference FFNs.

        Args:
            loads: for each row the load of every token, float32 [T].
            last: of how many tokens at the end of each row logits of the sparse run are wanted.
            keep: puts logits where they may wait.

        Raises:
            VerificationError: the type does not hold the model's numbers.
        """
        dense = dense_rows(self._decoder, rows, lambda index, logits: keep(self._finite(logits)))
        sparse = self._reference.run_all(rows, loads, last=last, keep=keep)
        return [RoundedRun(*runs) for runs in zip(dense, sparse, strict=True)]

    def _finite(self, logits: Float32) -> Float32:
        if not np.isfinite(logits).all():
            # A bound from these would allow anything.
            raise VerificationError(
                f"eager PyTorch gives logits that are not finite in {self._dtype}; export with another type"
            )
        return logits


@dataclass(frozen=True)
class RoundedRun:
    """A row in a 16-bit type: the logits [T, V] of the dense model, and the run with reference FFNs."""

    dense: Float32
    sparse: SparseRun


def measure_rounding(
    rounded: Sequence[RoundedRun], exact: Sequence[SparseRun], dense: Sequence[Float32], steps: int, neurons: int
) -> Rounding:
    """What the type may cost on some rows.

    Args:
        exact: the float32 model with reference FFNs; the logits of at least the last `steps` tokens.
        dense: for each row the float32 model's logits [T, V].
        steps: how many tokens at the end of each row ran sparse.
        neurons: of all sparse layers together.
    """
    logits, kl, flips, decisions = 0.0, [], 0, 0
    for found, wanted, whole in zip(rounded, exact, dense, strict=True):
        logits = max(logits, compare_logits(found.dense, whole).max_abs)
        kl.append(compare_logits(found.sparse.logits[-steps:], wanted.logits[-steps:]).kl)
        flips += int(np.abs(found.sparse.active - wanted.active)[:, -steps:].sum())
        decisions += steps * neurons
    return Rounding(FACTOR * logits, FACTOR * float(np.mean(kl)), FACTOR * flips / max(decisions, 1))
