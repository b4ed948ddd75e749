"""Dense parity and sparse parity: the engine's numbers are the model's numbers.

Tolerances, for float32 logits:

* Dense parity: 3e-4. Eager float32 differs from eager float64 by up to 7e-5 on SmolLM2-135M, and from ONNX Runtime's
  dense graph by up to 8e-5; sums in another order account for the rest. It grows with the largest logit beyond 50, as rounding
  does.
* Sparse parity: twice that, as long as both sides ran the same neurons. A neuron whose score is within rounding of the
  threshold may run on one side only; it changes the row's hidden state by about its (small) contribution, which flips others
  in the layers and, through the cache, in the tokens after it. So flips are counted from the numbers of active neurons, the
  share of flipped decisions is held to 1e-2, and from the first flip on the engine may be no further from the reference (mean
  KL) than a quarter of what sparsity itself costs there. On SmolLM2-135M a first flip draws up to 2e-3 of all decisions after
  it, at about a tenth of the cost; a threshold or score that is wrong by some percent flips more than 1e-2, and a score of
  something else costs all of it.

An engine that computes in 16 bits can't meet these. It may be three times as far from float32 as eager PyTorch in the same type
is, in each of the numbers, on the same tokens (`precision.Rounding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from clada_export.verify.cases import DECODE
from clada_export.verify.eager import Best, SparseRun
from clada_export.verify.engine_runs import CaseRun, GreedyRun
from clada_export.verify.numbers import ParityNumbers, common_prefix, compare_logits
from clada_export.verify.precision import EXACT, Rounding
from clada_export.verify.report import Check

DENSE_TOLERANCE = 3e-4
FLIP_KL_SHARE = 0.25
FLIP_KL_FLOOR = 1e-6
FLIP_SHARE = 1e-2


def tolerance(largest_logit: float) -> float:
    """The largest allowed difference of two float32 logits."""
    return DENSE_TOLERANCE * max(1.0, largest_logit / 50.0)


def dense_parity(
    run: CaseRun,
    wanted: Sequence[npt.NDArray[np.float32]],
    rounding: Rounding = EXACT,
    settled: Sequence[int] | None = None,
) -> list[Check]:
    """Prompt in one pass, and prompt then decode, both at load = +inf.

    Args:
        wanted: for each row the untouched model's logits [T, V].
        rounding: what the engine's type may cost.
        settled: for each row how many leading positions are compared; all if None (`clada_export.verify.mixture`).
    """
    ends = [len(row) for row in wanted] if settled is None else list(settled)
    # Entry 0 of the decoded part is the last prompt token.
    decoded = [max(0, end - (len(row) - DECODE - 1)) for end, row in zip(ends, wanted, strict=True)]
    tails = [row[-DECODE - 1 :] for row in wanted]
    name = run.case.name
    return [
        dense_check(f"dense parity, prompt ({name})", run.whole, wanted, rounding, ends),
        dense_check(f"dense parity, decode ({name})", run.dense.logits, tails, rounding, decoded),
    ]


def dense_check(
    name: str,
    found: Sequence[npt.NDArray[np.float32]],
    wanted: Sequence[npt.NDArray[np.float32]],
    rounding: Rounding = EXACT,
    settled: Sequence[int] | None = None,
) -> Check:
    """Logits [T, V] of rows against those of the untouched model.

    Args:
        settled: for each row how many leading positions are held to the tolerance; the others only to a mean KL.
    """
    ends = [len(row) for row in wanted] if settled is None else settled
    first, later = (
        compare_logits(
            np.concatenate([row[part(end)] for row, end in zip(found, ends, strict=True)]),
            np.concatenate([row[part(end)] for row, end in zip(wanted, ends, strict=True)]),
        )
        for part in (lambda end: slice(0, end), lambda end: slice(end, None))
    )
    bounds = {"max_abs": max(tolerance(first.largest_logit), rounding.logits)}
    values = first.to_dict()
    faults = []
    if not first.max_abs <= bounds["max_abs"]:
        faults.append(
            f"logits differ by up to {first.max_abs:.3g}; allowed {bounds['max_abs']:.3g} ({first.positions} positions)"
        )
    if later.positions:
        bounds["kl_after_a_tie"], values["kl_after_a_tie"] = rounding.sparse_kl, later.kl
        if not later.kl <= rounding.sparse_kl:
            faults.append(f"after a tie of experts, KL is {later.kl:.3g} nats; allowed {rounding.sparse_kl:.3g}")
    return Check(name, not faults, values, bounds, "; ".join(faults))


def greedy_parity(
    run: GreedyRun, wanted: Sequence[Best], rounding: Rounding = EXACT, settled: Sequence[int] | None = None
) -> Check:
    """Greedy tokens at load = +inf equal the eager model's.

    The eager model is asked for its best token after each part of the engine's text; up to where they first differ that text is
    the one that it would have written itself. Where its two best logits are closer than twice the tolerance, either token is
    right; a row that parts there is compared up to that point, and counted as a tie.

    Args:
        wanted: for each prompt what the eager model says at the engine's tokens.
        settled: for each row, its new tokens included, how many leading positions come before a tie of experts.
    """
    length = len(run.dense[0])
    prefixes = [common_prefix(list(mine), best.tokens) for mine, best in zip(run.dense, wanted, strict=True)]
    closest = 2 * max(DENSE_TOLERANCE, rounding.logits)
    # A token comes from the position before it.
    apart = [False if settled is None else settled[i] < len(run.prompts[i]) + prefix for i, prefix in enumerate(prefixes)]
    ties = [prefix < length and (apart[i] or wanted[i].gaps[prefix] <= closest) for i, prefix in enumerate(prefixes)]
    passed = all(prefix == length or tie for prefix, tie in zip(prefixes, ties, strict=True))
    why = "" if passed else f"greedy tokens part from the eager model's after {min(prefixes)} of {length} tokens"
    numbers = {"prompts": len(run.prompts), "tokens": length, "equal_prefix": prefixes, "ties": sum(ties)}
    return Check("dense parity, greedy tokens", passed, numbers, {"equal_prefix": float(length)}, why)


def sparse_parity(
    run: CaseRun,
    reference: Sequence[SparseRun],
    neurons: int,
    dense: Sequence[npt.NDArray[np.float32]],
    rounding: Rounding = EXACT,
    settled: Sequence[int] | None = None,
) -> Check:
    """The engine at finite loads against the eager model with reference FFNs: logits, and which rows flipped a neuron.

    Args:
        reference: for each row the run of the reference, of at least its last DECODE + 1 positions.
        neurons: of all sparse layers together.
        dense: for each row the untouched model's logits [T, V]: what the sparse model's distance is measured by.
        settled: as in `dense_parity`; later positions count as if a neuron had flipped.
    """
    costs = []
    same_found, same_wanted, later_found, later_wanted = [], [], [], []
    flips = decisions = 0
    for index, row in enumerate(run.case.rows):
        prompt = len(row) - DECODE
        found = run.sparse.logits[index]
        wanted, counts = reference[index].logits[-DECODE - 1 :], reference[index].active[:, -DECODE:]
        costs.append(compare_logits(wanted[1:], dense[index][-DECODE:]).kl)
        differ = np.abs(run.sparse.active[index] - counts)
        flips += int(differ.sum())
        decisions += int(counts.shape[1]) * neurons
        changed = np.flatnonzero(differ.sum(axis=0))
        # Entry 0 is the last prompt token; decoded token t is entry t + 1.
        first = int(changed[0]) + 1 if len(changed) else DECODE + 1
        if settled is not None:
            first = min(first, max(0, settled[index] - (prompt - 1)))
        same_found.append(found[:first])
        same_wanted.append(wanted[:first])
        later_found.append(found[first:])
        later_wanted.append(wanted[first:])
    same = compare_logits(np.concatenate(same_found), np.concatenate(same_wanted))
    later = compare_logits(np.concatenate(later_found), np.concatenate(later_wanted))
    share = flips / max(decisions, 1)
    bounds = {
        "max_abs": 2 * max(tolerance(same.largest_logit), rounding.logits),
        "kl_after_a_flip": max(FLIP_KL_SHARE * float(np.mean(costs)), FLIP_KL_FLOOR, rounding.sparse_kl),
        "flipped_share": max(FLIP_SHARE, rounding.flipped_share),
    }
    return _sparse_check(run.case.name, same, later, flips, share, bounds)


def _sparse_check(
    name: str, same: ParityNumbers, later: ParityNumbers, flips: int, share: float, bounds: dict[str, float]
) -> Check:
    faults = []
    if not same.max_abs <= bounds["max_abs"]:
        faults.append(f"with the same neurons, logits differ by up to {same.max_abs:.3g}; allowed {bounds['max_abs']:.3g}")
    if not later.kl <= bounds["kl_after_a_flip"]:
        faults.append(f"after a flipped neuron, KL is {later.kl:.3g} nats; allowed {bounds['kl_after_a_flip']:.3g}")
    if not share <= bounds["flipped_share"]:
        faults.append(f"{flips} neurons flipped ({share:.3g} of all decisions); allowed {bounds['flipped_share']:.3g}")
    numbers = {"same_neurons": asdict(same), "after_a_flip": asdict(later), "flipped": flips, "flipped_share": share}
    return Check(f"sparse parity ({name})", not faults, numbers, bounds, "; ".join(faults))
