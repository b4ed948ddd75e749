"""Drift: how far the sparse engine is from the dense model on text, run as deployed (prompt dense, decode by the load)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.verify.engine_runs import DriftRun
from clada_export.verify.numbers import log_softmax, perplexity, perplexity_rise
from clada_export.verify.report import Check


def drift_numbers(run: DriftRun, dense: Sequence[npt.NDArray[np.float32]], neurons: int) -> dict[str, Any]:
    """How far the decoded tokens are from the dense model's logits.

    Args:
        dense: the untouched model's logits [T, V] of every row.
        neurons: of all sparse layers together.

    Returns:
        `tokens`, `dense_ppl`, `ppl`, `ppl_increase` and its standard error, `kl`, `top1`, `sparsity`, mean `load`.
    """
    nll, dense_nll, kl, top1 = [], [], [], []
    index = np.arange(len(run.rows))
    # The first token after the prompt comes from a dense pass.
    for place, logits in list(enumerate(run.logits, run.prompt))[1:]:
        tokens = np.array([row[place] for row in run.rows])
        found, wanted = log_softmax(logits), log_softmax(np.stack([row[place - 1] for row in dense]))
        nll.append(-found[index, tokens])
        dense_nll.append(-wanted[index, tokens])
        top1.append(found.argmax(-1) == wanted.argmax(-1))
        kl.append((np.exp(wanted) * (wanted - found)).sum(-1))
    difference = np.concatenate(nll) - np.concatenate(dense_nll)
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return {
        "tokens": len(difference),
        "dense_ppl": perplexity(float(np.concatenate(dense_nll).mean())),
        "ppl": perplexity(float(np.concatenate(nll).mean())),
        "ppl_increase": perplexity_rise(mean),
        "ppl_increase_standard_error": error,
        "kl": float(np.concatenate(kl).mean()),
        "top1": float(np.concatenate(top1).mean()),
        "sparsity": 1.0 - float(np.mean(run.active)) / neurons if run.active.size else None,
        "mean_load": float(np.mean(run.loads)),
    }


def drift_check(numbers: dict[str, Any], limits: dict[str, float]) -> Check:
    """Hold drift to the plan's budget.

    The budget was met on all held-out windows in one pass; here a part of them is decoded token by token, so it may be exceeded
    by half of it and by two standard errors. A plan by sparsity alone has no limit, and its drift is reported.

    Args:
        limits: `ppl_increase` and/or `kl`; empty for none.
    """
    faults = []
    bounds: dict[str, float] = {}
    if "ppl_increase" in limits:
        bound = 1.5 * limits["ppl_increase"] + 2 * numbers["ppl_increase_standard_error"]
        bounds["ppl_increase"] = bound
        if not numbers["ppl_increase"] <= bound:
            faults.append(f"perplexity rises by {numbers['ppl_increase']:.2%}; allowed {bound:.2%}")
    if "kl" in limits:
        bounds["kl"] = 2 * limits["kl"]
        if not numbers["kl"] <= bounds["kl"]:
            faults.append(f"KL is {numbers['kl']:.3g} nats a token; allowed {bounds['kl']:.3g}")
    return Check("drift", not faults, numbers, bounds, "; ".join(faults))
