"""Drift: how far the sparse engine is from the dense model on text, run as deployed (prompt dense, decode by the load)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.runtime import Engine, LoadMeter
from clada_export.verify.numbers import common_prefix, log_softmax, perplexity, perplexity_rise
from clada_export.verify.parity import greedy_tokens
from clada_export.verify.report import Check

DRIFT_PROMPT = 32


def measure_drift(engine: Engine, rows: Sequence[Sequence[int]], dense: Sequence[npt.NDArray[np.float32]]) -> dict[str, Any]:
    """Decode the rows token by token under the automatic load and compare with the dense model's logits.

    Args:
        rows: token sequences of one length; the first `DRIFT_PROMPT` tokens are the prompt.
        dense: the untouched model's logits [T, V] of every row.

    Returns:
        `tokens`, `dense_ppl`, `ppl`, `ppl_increase` and its standard error, `kl`, `top1`, `sparsity`, mean `load`.
    """
    meter = LoadMeter(engine.manifest.load_signal)
    length = len(rows[0])
    start = min(DRIFT_PROMPT, length // 2)
    output = engine.prefill([list(row[:start]) for row in rows])
    nll, dense_nll, kl, top1, active, loads = [], [], [], [], [], []
    for place in range(start, length):
        tokens = np.array([row[place] for row in rows])
        if place > start:
            found = log_softmax(output.logits)
            wanted = log_softmax(np.stack([logits[place - 1] for logits in dense]))
            rows_index = np.arange(len(rows))
            nll.append(-found[rows_index, tokens])
            dense_nll.append(-wanted[rows_index, tokens])
            kl.append((np.exp(wanted) * (wanted - found)).sum(-1))
            top1.append(found.argmax(-1) == wanted.argmax(-1))
        load = meter.update(output.logits, tokens, log_sum_exp=output.log_sum_exp, entropy=output.entropy)
        loads.append(load)
        output = engine.step(tokens, load)
        if output.active is not None:
            active.append(output.active.sum(-1))
    neurons = engine.sparse_neurons
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
        "sparsity": 1.0 - float(np.mean(active)) / neurons if active else None,
        "mean_load": float(np.mean(loads)),
    }


def sparse_greedy_prefix(engine: Engine, prompts: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> list[int]:
    """How many greedy tokens under the automatic load equal the dense model's, a number for each prompt."""
    length = len(dense[0])
    found = greedy_tokens(engine, prompts, length, "auto")
    return [common_prefix(mine, list(theirs)) for mine, theirs in zip(found, dense, strict=True)]


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
