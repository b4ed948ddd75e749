"""`clada bench`: decode speed of one engine, dense and sparse, side by side."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import numpy as np

from clada_export.errors import UsageError, shown
from clada_export.runtime import Engine, peak_memory
from clada_export.runtime.generation import Load
from clada_export.runtime.weight_reads import ffn_bytes, weight_bytes

LONGEST, MOST_REPEATS = 1_000_000, 100_000
"""What would take hours, or memory without end where a model does not say how long its texts may be."""


@dataclass(frozen=True)
class DecodeSpeed:
    """One load's numbers.

    Attributes:
        load: as it was asked for.
        ttft_s: time to first token: the prompt in one pass and the choice of its token; median of the repeats.
        itl_p50_ms, itl_p90_ms, itl_p99_ms: inter-token latency, choosing the token and updating the load included, over all
            decode steps of all repeats.
        tokens_per_s: 1000 / itl_p50_ms.
        sparsity: share of the sparse layers' neurons that were skipped while decoding.
        active_share: the others: 1 - sparsity.
        ffn_bytes: weight bytes of the sparse FFNs that a token reads at this share, counted and not measured; None where a
            router is read too.
        weight_bytes: those of attention and head in addition; None for engines whose weights are not quantised, whose manifest
            does not say them.
        peak_memory: bytes resident at the peak of a generation, weights and what the process held before among them; None
            where the system does not say.
    """

    load: str
    ttft_s: float
    itl_p50_ms: float
    itl_p90_ms: float
    itl_p99_ms: float
    tokens_per_s: float
    sparsity: float
    active_share: float
    ffn_bytes: float | None
    weight_bytes: float | None
    peak_memory: int | None

    def to_dict(self) -> dict[str, float | str | None]:
        """Plain numbers."""
        return asdict(self)


def bench(
    engine: Engine, loads: list[Load], *, prompt_tokens: int = 128, new_tokens: int = 64, repeats: int = 3, seed: int = 0
) -> list[DecodeSpeed]:
    """Time greedy decoding from one random prompt under each load; the loads take turns, so that noise meets them alike.

    Raises:
        UsageError: a count out of range, or longer than the model takes.
    """
    for name, count, least, most in (
        ("prompt tokens", prompt_tokens, 1, LONGEST),
        ("new tokens", new_tokens, 2, LONGEST),
        ("repeats", repeats, 1, MOST_REPEATS),
    ):
        if not least <= count <= most:
            raise UsageError(f"bench: {shown(count)} {name}; it takes {least} to {most}")
    limit = engine.max_positions
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise UsageError(f"{prompt_tokens} + {new_tokens} tokens are more than the {limit} that the model takes")
    prompt = np.random.default_rng(seed).integers(0, engine.vocab_size or 1, prompt_tokens).tolist()
    neurons = engine.sparse_neurons
    first: dict[Load, list[float]] = {load: [] for load in loads}
    later: dict[Load, list[float]] = {load: [] for load in loads}
    active: dict[Load, list[float]] = {load: [] for load in loads}
    memory: dict[Load, int | None] = dict.fromkeys(loads)
    for repeat in range(repeats + 1):
        for load in loads:
            peak_memory.begin()
            made = engine.generate([prompt], new_tokens, load=load, eos_token_id=[], do_sample=False, repetition_penalty=1.0)
            if repeat == 0:  # Warms caches and the thread pool.
                continue
            if (peak := peak_memory.peak()) is not None:
                memory[load] = max(memory[load] or 0, peak)
            first[load].append(made.ttft_s)
            later[load] += made.decode_s
            if made.active is not None:
                active[load].append(float(made.active.sum(-1).mean()))
    result = []
    for load in loads:
        p50, p90, p99 = (float(np.percentile(later[load], percent)) * 1e3 for percent in (50, 90, 99))
        skipped = 1.0 - statistics.fmean(active[load]) / neurons if active[load] and neurons else 0.0
        share = 1.0 - skipped
        result.append(
            DecodeSpeed(
                load=str(load),
                ttft_s=statistics.median(first[load]),
                itl_p50_ms=p50,
                itl_p90_ms=p90,
                itl_p99_ms=p99,
                tokens_per_s=1e3 / p50,
                sparsity=skipped,
                active_share=share,
                ffn_bytes=ffn_bytes(engine.manifest, share),
                weight_bytes=weight_bytes(engine.manifest, share),
                peak_memory=memory[load],
            )
        )
    return result
