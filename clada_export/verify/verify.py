"""Run all checks on one engine.

The engine first: it is opened, asked everything, and closed again, and its answers wait on disk. Then the eager model, which in
two passes over all rows, dense and with reference FFNs, says what they should have been. So no more is in memory at any time
than one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clada_export.artifact.manifest import Manifest
from clada_export.decoder.decoder import Decoder
from clada_export.load.values import DENSE
from clada_export.plan.weights_form import WeightsForm
from clada_export.quantise.store import QuantStore
from clada_export.quantise.view import QuantisedView
from clada_export.runtime import Engine
from clada_export.verify.cases import DECODE, make_cases
from clada_export.verify.constants import OpConstants
from clada_export.verify.drift import drift_check, drift_numbers
from clada_export.verify.eager import Best, ReferenceModel, SparseRun, best_tokens, dense_rows
from clada_export.verify.engine_runs import CaseRun, DriftRun, GreedyRun, run_case, run_texts
from clada_export.verify.load_outputs import load_output_check
from clada_export.verify.matrices import read_matrices
from clada_export.verify.mixture import AFTER_A_TIE_KL, MixtureRounding, has_mixtures, measure_mixture
from clada_export.verify.numbers import common_prefix
from clada_export.verify.parity import dense_parity, greedy_parity, sparse_parity
from clada_export.verify.precision import EXACT, FACTOR, RoundedModel, RoundedRun, Rounding, measure_rounding
from clada_export.verify.report import Check, Verification
from clada_export.verify.set_aside import SetAside
from clada_export.verify.viewed import ViewedModel

GREEDY_TOKENS = 64
GREEDY_PROMPTS = 4
GREEDY_PROMPT_LENGTH = 16
DRIFT_ROWS, DRIFT_LENGTH = 4, 96

Float32 = npt.NDArray[np.float32]
Text = npt.NDArray[np.int64]
Opened = Callable[[], AbstractContextManager[Engine]]
"""Opens the engine; it is closed when the context ends."""
Told = Callable[[str], None]


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


@dataclass(frozen=True)
class QuantisedWeights:
    """That an engine's weights are quantised: the `form`, and the codes that it should hold, if they are known."""

    form: WeightsForm
    expected: QuantStore | None = None


@dataclass(frozen=True)
class _EngineSide:
    """What the engine gave. `neurons`: of all sparse layers together."""

    folder: Path
    manifest: Manifest
    neurons: int
    cases: tuple[CaseRun, ...]
    greedy: GreedyRun
    drift: DriftRun


@dataclass(frozen=True)
class _EagerSide:
    """What the eager model says of what the engine was asked.

    Attributes:
        dense: for each row of the cases the untouched model's logits [T, V].
        sparse: and its run with reference FFNs, of the last DECODE + 1 tokens.
        best: for each greedy text what the untouched model says at the new tokens.
        drift: the untouched model's logits of the rows that drift is measured on.
        rounding: for each case what the engine's type may cost, mixtures aside.
        constants: of the op, as the engine's file holds them.
    """

    dense: list[Float32]
    sparse: list[SparseRun]
    best: list[Best]
    drift: list[Float32]
    rounding: list[Rounding]
    constants: tuple[Check, ...]


def verify(
    opened: Opened,
    folder: Path,
    decoder: Decoder,
    text: Text | None,
    options: VerifyOptions,
    progress: Told = lambda what: None,
    weights: QuantisedWeights | None = None,
) -> Verification:
    """Hold an engine to its eager decoder.

    Args:
        opened: opens the engine.
        folder: of the export; what is compared waits there, in a file without a name.
        decoder: of the source, float32.
        text: int64 [windows, context] of real text that calibration did not see, or None.
        weights: that they are quantised. Parity is with the decoder computed with the codes that the file holds; drift is from
            the decoder itself.
    """
    aside = SetAside(folder)
    decoder.rest()
    engine = _ask_engine(opened, decoder, text, options, aside, progress)
    if weights is None:
        eager = _ask_eager(decoder, engine, options, aside, progress)
    else:
        eager = _ask_view(decoder, engine, options, aside, progress, weights)
    decoder.rest()
    progress("comparison")
    result = Verification([*eager.constants])
    worst = EXACT
    done = 0
    for run, rounding in zip(engine.cases, eager.rounding, strict=True):
        part = slice(done, done := done + len(run.case.rows))
        mixtures = _mixtures(decoder, run.case.rows, options.seed)
        settled = [found.settled for found in mixtures] or None
        allowed = EXACT
        if mixtures:
            allowed = Rounding(FACTOR * max(found.logits for found in mixtures), AFTER_A_TIE_KL)
        allowed = allowed.worst(rounding.times(options.rounding_share))
        worst = worst.worst(allowed)
        result.checks += dense_parity(run, eager.dense[part], allowed, settled)
        result.checks.append(sparse_parity(run, eager.sparse[part], engine.neurons, eager.dense[part], allowed, settled))
        if run.load_outputs is not None:
            result.checks.append(load_output_check(run.case.name, run.load_outputs, options.computes_in))
    ends = [found.settled for found in _mixtures(decoder, engine.greedy.texts, options.seed)]
    result.checks.append(greedy_parity(engine.greedy, eager.best, worst, ends or None))
    numbers = drift_numbers(engine.drift, eager.drift, engine.neurons)
    pairs = zip(engine.greedy.sparse, engine.greedy.dense, strict=True)
    numbers["greedy_prefix"] = [common_prefix(list(mine), list(theirs)) for mine, theirs in pairs]
    numbers["greedy_tokens"] = options.greedy_tokens
    result.checks.append(drift_check(numbers, options.limits if text is not None else {}))
    result.drift = numbers
    return result


def _ask_engine(
    opened: Opened, decoder: Decoder, text: Text | None, options: VerifyOptions, aside: SetAside, progress: Told
) -> _EngineSide:
    """Open the engine, run everything that it is asked, and close it."""
    rng = np.random.default_rng(options.seed)
    mixtures = has_mixtures(decoder)
    with opened() as engine:
        limit = engine.max_positions
        vocabulary = engine.vocab_size or decoder.vocab_size
        runs = []
        for case in make_cases(text, vocabulary, limit, options.seed, ragged=engine.manifest.padding == "left"):
            if engine.max_batch is not None and len(case.rows) > engine.max_batch:
                continue
            progress(f"engine, {case.name}")
            runs.append(run_case(engine, case, _loads(rng, mixtures), aside.keep))
        progress("engine, greedy tokens and drift")
        source = text if text is not None else rng.integers(0, vocabulary, (DRIFT_ROWS, DRIFT_LENGTH))
        rows = _pieces(source, min(DRIFT_ROWS, engine.max_batch or DRIFT_ROWS), limit)
        prompts = _prompts(text, vocabulary, limit, options)
        greedy, drift = run_texts(engine, prompts, options.greedy_tokens, rows, aside.keep)
        return _EngineSide(engine.folder, engine.manifest, engine.sparse_neurons, tuple(runs), greedy, drift)


def _ask_eager(decoder: Decoder, engine: _EngineSide, options: VerifyOptions, aside: SetAside, progress: Told) -> _EagerSide:
    """Run the eager model on all rows that the engine ran: dense, with reference FFNs, and both in the engine's type."""
    plan = engine.manifest.sparsity_plan(engine.folder)
    rows, loads = _rows_and_loads(engine)
    progress("eager model, dense")
    texts = engine.greedy.texts
    take, best = _taking(engine, rows, aside)
    dense = dense_rows(decoder, [*rows, *(text[:-1] for text in texts), *engine.drift.rows], take)
    progress("eager model, sparse")
    constants = OpConstants(engine.folder / engine.manifest.model)
    sparse = ReferenceModel(decoder, plan).run_all(rows, loads, last=DECODE + 1, keep=aside.keep, seen=constants.compare)
    rounding = [EXACT] * len(engine.cases)
    if options.computes_in != "float32":
        progress(f"eager model, {options.computes_in}")
        rounded = RoundedModel(decoder, plan, options.computes_in).run_all(rows, loads, DECODE + 1, aside.keep)
        rounding = _rounding(engine, rounded, sparse, dense)
    return _EagerSide(
        dense[: len(rows)],
        sparse,
        [best[place] for place in range(len(texts))],
        dense[len(rows) + len(texts) :],
        rounding,
        (constants.check(),),
    )


def _ask_view(
    decoder: Decoder, engine: _EngineSide, options: VerifyOptions, aside: SetAside, progress: Told, weights: QuantisedWeights
) -> _EagerSide:
    """The same of a decoder computed with the quantised matrices of the engine's file."""
    progress("quantised matrices")
    file = read_matrices(engine.folder / engine.manifest.model, decoder, weights.form, weights.expected)
    view = QuantisedView(file.store)
    plan = engine.manifest.sparsity_plan(engine.folder)
    rows, loads = _rows_and_loads(engine)
    progress("eager model, dense")
    drift = dense_rows(decoder, engine.drift.rows, lambda index, logits: aside.keep(logits))
    progress("eager model, quantised")
    model = ViewedModel(decoder, plan, view)
    take, best = _taking(engine, rows, aside)
    dense = model.dense([*rows, *(text[:-1] for text in engine.greedy.texts)], take)
    constants = OpConstants(engine.folder / engine.manifest.model)
    sparse = model.sparse(rows, loads, DECODE + 1, aside.keep, constants.compare)
    progress("eager model, quantised, with inputs moved")
    moved = ViewedModel(decoder, plan, view, nudge=options.seed).both(rows, loads, DECODE + 1, aside.keep)
    checks = constants.check(), file.check
    # The worst of all cases for each: in a short one inputs may happen not to round to another step.
    worst = EXACT
    for found in _rounding(engine, moved, sparse, dense):
        worst = worst.worst(found)
    rounding = [worst] * len(engine.cases)
    return _EagerSide(dense[: len(rows)], sparse, [best[place] for place in range(len(best))], drift, rounding, checks)


def _rows_and_loads(engine: _EngineSide) -> tuple[list[Sequence[int]], list[Float32]]:
    """The rows of all cases, and for each the load of every token: dense to where its decoded part begins."""
    rows = [row for run in engine.cases for row in run.case.rows]
    dense_until = [np.full(len(row) - DECODE, DENSE, np.float32) for row in rows]
    loads = [run.loads for run in engine.cases for _ in run.case.rows]
    return list(rows), [np.concatenate(parts) for parts in zip(dense_until, loads, strict=True)]


def _taking(
    engine: _EngineSide, rows: Sequence[Sequence[int]], aside: SetAside
) -> tuple[Callable[[int, Float32], Float32], dict[int, Best]]:
    """What keeps the logits of a dense run of all rows and the greedy texts: of the texts only the best tokens, in a dict."""
    texts = engine.greedy.texts
    best: dict[int, Best] = {}

    def take(index: int, logits: Float32) -> Float32:
        place = index - len(rows)
        if not 0 <= place < len(texts):
            return aside.keep(logits)
        # A token comes from the position before it.
        best[place] = best_tokens(logits[len(engine.greedy.prompts[place]) - 1 :])
        return logits[:0]

    return take, best


def _rounding(
    engine: _EngineSide, rounded: Sequence[RoundedRun], sparse: Sequence[SparseRun], dense: Sequence[Float32]
) -> list[Rounding]:
    """For each case what rounding may cost."""
    ends = np.cumsum([len(run.case.rows) for run in engine.cases])
    parts = [slice(end - len(run.case.rows), end) for end, run in zip(ends, engine.cases, strict=True)]
    return [measure_rounding(rounded[part], sparse[part], dense[part], DECODE, engine.neurons) for part in parts]


def _loads(rng: np.random.Generator, mixtures: bool) -> Float32:
    """The loads of a case's decoded tokens, of every kind: the still plan, easy and hard text, and a dense step among them."""
    loads = rng.uniform(-2, 2, DECODE).astype(np.float32)
    loads[0], loads[DECODE // 2] = 0.0, DENSE
    if mixtures:
        # A load below 0 is another model, whose ties are elsewhere: only the last token has one.
        loads = np.abs(loads)
        loads[-1] = -2.0
    return loads


def _mixtures(decoder: Decoder, rows: Sequence[Sequence[int]], seed: int) -> list[MixtureRounding]:
    """Of each row; none for a decoder without mixtures of experts."""
    return [found for row in rows if (found := measure_mixture(decoder, row, seed)) is not None]


def _pieces(text: Text, count: int, limit: int | None) -> list[list[int]]:
    """The first tokens of the last windows; where there are too few, those that follow them."""
    length = min(DRIFT_LENGTH, text.shape[1], limit or DRIFT_LENGTH)
    starts = range(0, text.shape[1] - length + 1, length)
    pieces = [row[start : start + length] for start in starts for row in text[-count:]]
    return [[int(token) for token in piece] for piece in pieces[:count]]


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
