"""Run all checks on one engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from clada_export.decoder.decoder import Decoder
from clada_export.runtime import Engine
from clada_export.verify.cases import DECODE, make_cases
from clada_export.verify.constants import constants_check
from clada_export.verify.drift import drift_check, measure_drift, sparse_greedy_prefix
from clada_export.verify.eager import ReferenceModel, greedy
from clada_export.verify.load_outputs import load_output_check
from clada_export.verify.mixture import AFTER_A_TIE_KL, measure_mixture
from clada_export.verify.parity import dense_parity, greedy_parity, sparse_parity
from clada_export.verify.precision import EXACT, FACTOR, RoundedModel, Rounding
from clada_export.verify.report import Verification

GREEDY_TOKENS = 64
GREEDY_PROMPTS = 4
GREEDY_PROMPT_LENGTH = 16
DRIFT_ROWS, DRIFT_LENGTH = 2, 160


@dataclass(frozen=True)
class VerifyOptions:
    """`limits` is the plan's budget for drift (`ppl_increase`, `kl`); `seed` is that of the random tokens.

    `computes_in` is the type of the engine's activations, which tells what rounding may cost; `rounding_share` is the part of
    that which is allowed.
    """

    limits: dict[str, float] = field(default_factory=dict)
    computes_in: str = "float32"
    rounding_share: float = 1.0
    seed: int = 0
    greedy_tokens: int = GREEDY_TOKENS


def verify(
    engine: Engine,
    decoder: Decoder,
    text: npt.NDArray[np.int64] | None,
    options: VerifyOptions,
    progress: Callable[[str], None] = lambda what: None,
) -> Verification:
    """Hold an engine to its eager decoder.

    Args:
        decoder: of the source, float32.
        text: int64 [windows, context] of real text that calibration did not see, or None.
    """
    limit = engine.max_positions
    vocabulary = engine.vocab_size or decoder.vocab_size
    plan = engine.manifest.sparsity_plan(engine.folder)
    reference = ReferenceModel(decoder, plan)
    rounded = None if options.computes_in == "float32" else RoundedModel(decoder, plan, options.computes_in)
    rounding = EXACT
    progress("constants")
    result = Verification([constants_check(engine.folder / engine.manifest.model, reference.constants)])
    rng = np.random.default_rng(options.seed)
    for case in make_cases(text, vocabulary, limit, options.seed, ragged=engine.manifest.padding == "left"):
        if engine.max_batch is not None and len(case.rows) > engine.max_batch:
            continue
        progress(f"dense parity, {case.name}")
        wanted = [decoder.dense_logits(row) for row in case.rows]
        # Loads of every kind: the still plan, easy and hard text, and a dense step among them.
        loads = rng.uniform(-2, 2, DECODE).astype(np.float32)
        loads[0], loads[DECODE // 2] = 0.0, np.inf
        allowed, settled = EXACT, None
        mixtures = [found for row in case.rows if (found := measure_mixture(decoder, row, options.seed)) is not None]
        if mixtures:
            # A load below 0 is another model, whose ties are elsewhere: only the last token has one.
            loads = np.abs(loads)
            loads[-1] = -2.0
            settled = [found.settled for found in mixtures]
            allowed = Rounding(FACTOR * max(found.logits for found in mixtures), AFTER_A_TIE_KL)
        if rounded is not None:
            allowed = allowed.worst(rounded.measure(reference, case.rows, loads, wanted).times(options.rounding_share))
        rounding = rounding.worst(allowed)
        result.checks += dense_parity(engine, case, wanted, allowed, settled)
        progress(f"sparse parity, {case.name}")
        result.checks.append(sparse_parity(engine, case, reference, loads, wanted, allowed, settled))
        if (check := load_output_check(engine, case, options.computes_in)) is not None:
            result.checks.append(check)
    del reference, rounded

    progress("greedy tokens")
    prompts = _prompts(text, vocabulary, limit, options)
    tokens, gaps = greedy(decoder, prompts, options.greedy_tokens)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, tokens, strict=True)]
    ends = [found.settled for text in texts if (found := measure_mixture(decoder, text, options.seed)) is not None]
    result.checks.append(greedy_parity(engine, prompts, tokens, gaps, rounding, ends or None))

    progress("drift")
    source = text if text is not None else rng.integers(0, vocabulary, (DRIFT_ROWS, DRIFT_LENGTH))
    length = min(DRIFT_LENGTH, source.shape[1], limit or DRIFT_LENGTH)
    count = min(DRIFT_ROWS, engine.max_batch or DRIFT_ROWS)
    rows = [[int(token) for token in row[:length]] for row in source[-count:]]
    numbers = measure_drift(engine, rows, [decoder.dense_logits(row) for row in rows])
    numbers["greedy_prefix"] = sparse_greedy_prefix(engine, prompts, tokens)
    numbers["greedy_tokens"] = options.greedy_tokens
    result.checks.append(drift_check(numbers, options.limits if text is not None else {}))
    result.drift = numbers
    return result


def _prompts(text: npt.NDArray[np.int64] | None, vocabulary: int, limit: int | None, options: VerifyOptions) -> list[list[int]]:
    length = GREEDY_PROMPT_LENGTH
    if limit is not None:
        length = max(1, min(length, limit - options.greedy_tokens))
    if text is None:
        noise = np.random.default_rng(options.seed + 1).integers(0, vocabulary, (GREEDY_PROMPTS, length))
        return [[int(token) for token in row] for row in noise]
    rows = text.reshape(-1)
    places = np.linspace(0, len(rows) - length, GREEDY_PROMPTS).astype(int)
    return [[int(token) for token in rows[place : place + length]] for place in places]
