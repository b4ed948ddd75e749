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
from typing import Literal

import numpy as np
import numpy.typing as npt

from clada_export.runtime import Engine
from clada_export.verify.cases import DECODE, Case
from clada_export.verify.eager import ReferenceModel
from clada_export.verify.numbers import ParityNumbers, common_prefix, compare_logits
from clada_export.verify.precision import EXACT, Rounding
from clada_export.verify.report import Check

DENSE_TOLERANCE = 3e-4
FLIP_KL_SHARE = 0.25
FLIP_KL_FLOOR = 1e-6
FLIP_SHARE = 1e-2
DENSE = np.float32(np.inf)

Rows = list[npt.NDArray[np.float32]]


def tolerance(largest_logit: float) -> float:
    """The largest allowed difference of two float32 logits."""
    return DENSE_TOLERANCE * max(1.0, largest_logit / 50.0)


def run_engine(engine: Engine, case: Case, decode_loads: npt.NDArray[np.float32]) -> tuple[Rows, Rows]:
    """Prompt dense, then the rest of every row token by token under the given loads.

    Args:
        decode_loads: float32 [DECODE].

    Returns:
        For each row: the logits of the last prompt token and of every decoded token [DECODE + 1, V], and the active neurons of
        the decoded tokens [layers, DECODE] (empty if the engine does not report them).
    """
    output = engine.prefill(case.prompts)
    logits, active = [output.logits.copy()], []
    for step in range(DECODE):
        tokens = np.array([row[len(row) - DECODE + step] for row in case.rows])
        output = engine.step(tokens, decode_loads[step])
        logits.append(output.logits.copy())
        if output.active is not None:
            active.append(output.active.copy())
    rows = [np.stack([step[index] for step in logits]) for index in range(len(case.rows))]
    counts = [
        np.stack([step[index] for step in active], axis=1) if active else np.zeros((0, DECODE)) for index in range(len(rows))
    ]
    return rows, counts  # type: ignore[return-value]


def dense_parity(
    engine: Engine,
    case: Case,
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
    whole = engine.logits([list(row) for row in case.rows], "dense")
    steps, _ = run_engine(engine, case, np.full(DECODE, DENSE))
    ends = [len(row) for row in wanted] if settled is None else list(settled)
    # Entry 0 of the decoded part is the last prompt token.
    decoded = [max(0, end - (len(row) - DECODE - 1)) for end, row in zip(ends, wanted, strict=True)]
    tails = [row[-DECODE - 1 :] for row in wanted]
    return [
        dense_check(f"dense parity, prompt ({case.name})", whole, wanted, rounding, ends),
        dense_check(f"dense parity, decode ({case.name})", steps, tails, rounding, decoded),
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
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    rounding: Rounding = EXACT,
    settled: Sequence[int] | None = None,
) -> Check:
    """Greedy tokens at load = +inf equal the eager model's.

    Where the eager model's two best logits are closer than twice the tolerance, either token is right; a row that parts there
    is compared up to that point, and counted as a tie.

    Args:
        settled: for each row, its new tokens included, how many leading positions come before a tie of experts.
    """
    length = len(wanted[0])
    found = greedy_tokens(engine, prompts, length, "dense")
    prefixes = [common_prefix(mine, list(theirs)) for mine, theirs in zip(found, wanted, strict=True)]
    closest = 2 * max(DENSE_TOLERANCE, rounding.logits)
    # A token comes from the position before it.
    apart = [False if settled is None else settled[i] < len(prompts[i]) + prefix for i, prefix in enumerate(prefixes)]
    ties = [prefix < length and (apart[i] or gaps[i][prefix] <= closest) for i, prefix in enumerate(prefixes)]
    passed = all(prefix == length or tie for prefix, tie in zip(prefixes, ties, strict=True))
    why = "" if passed else f"greedy tokens part from the eager model's after {min(prefixes)} of {length} tokens"
    numbers = {"prompts": len(prompts), "tokens": length, "equal_prefix": prefixes, "ties": sum(ties)}
    return Check("dense parity, greedy tokens", passed, numbers, {"equal_prefix": float(length)}, why)


def greedy_tokens(
    engine: Engine, prompts: Sequence[Sequence[int]], length: int, load: Literal["auto", "dense"]
) -> list[list[int]]:
    """`length` greedy tokens of each prompt, in batches that the engine takes."""
    width = engine.max_batch or len(prompts)
    found = []
    for start in range(0, len(prompts), width):
        part = [list(prompt) for prompt in prompts[start : start + width]]
        found += engine.generate(part, length, load=load, eos_token_id=[]).tokens
    return found


def sparse_parity(
    engine: Engine,
    case: Case,
    reference: ReferenceModel,
    loads: npt.NDArray[np.float32],
    dense: Sequence[npt.NDArray[np.float32]],
    rounding: Rounding = EXACT,
    settled: Sequence[int] | None = None,
) -> Check:
    """The engine at finite loads against the eager model with reference FFNs: logits, and which rows flipped a neuron.

    Args:
        loads: float32 [DECODE], the load of every decoded token.
        dense: for each row the untouched model's logits [T, V]: what the sparse model's distance is measured by.
        settled: as in `dense_parity`; later positions count as if a neuron had flipped.
    """
    found, found_active = run_engine(engine, case, loads)
    costs = []
    same_found, same_wanted, later_found, later_wanted = [], [], [], []
    flips = decisions = 0
    for index, row in enumerate(case.rows):
        prompt = len(row) - DECODE
        run = reference.run(row, np.concatenate([np.full(prompt, DENSE), loads]))
        wanted, counts = run.logits[-DECODE - 1 :], run.active[:, prompt:]
        costs.append(compare_logits(wanted[1:], dense[index][-DECODE:]).kl)
        differ = np.abs(found_active[index] - counts)
        flips += int(differ.sum())
        decisions += int(counts.shape[1]) * engine.sparse_neurons
        changed = np.flatnonzero(differ.sum(axis=0))
        # Entry 0 is the last prompt token; decoded token t is entry t + 1.
        first = int(changed[0]) + 1 if len(changed) else DECODE + 1
        if settled is not None:
            first = min(first, max(0, settled[index] - (prompt - 1)))
        same_found.append(found[index][:first])
        same_wanted.append(wanted[:first])
        later_found.append(found[index][first:])
        later_wanted.append(wanted[first:])
    same = compare_logits(np.concatenate(same_found), np.concatenate(same_wanted))
    later = compare_logits(np.concatenate(later_found), np.concatenate(later_wanted))
    share = flips / max(decisions, 1)
    bounds = {
        "max_abs": 2 * max(tolerance(same.largest_logit), rounding.logits),
        "kl_after_a_flip": max(FLIP_KL_SHARE * float(np.mean(costs)), FLIP_KL_FLOOR, rounding.sparse_kl),
        "flipped_share": max(FLIP_SHARE, rounding.flipped_share),
    }
    return _sparse_check(case.name, same, later, flips, share, bounds)


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
