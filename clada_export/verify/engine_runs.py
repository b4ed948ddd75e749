"""The engine's side of verification: all that it is asked, so that it need not stay open while its answers are judged.

A step costs what its weights cost to read, however few rows it has. So rows run side by side where that takes nothing from the
question: the dense and the sparse decode of a pair, and everything that follows its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clada_export.load.values import DENSE, SKIP
from clada_export.runtime import Engine, LoadMeter, StepOutput
from clada_export.runtime.sampling import Sampler, SamplingSettings
from clada_export.verify.cases import DECODE, Case
from clada_export.verify.load_outputs import LoadOutputs, measure_load_outputs

DRIFT_PROMPT = 32
Float32 = npt.NDArray[np.float32]
Keep = Callable[[Float32], Float32]
"""Puts logits where they may wait (`clada_export.verify.set_aside`)."""
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Decoded:
    """A prompt in one pass, and tokens after it one by one.

    Attributes:
        logits: for each row those of the last prompt token and of every decoded token, [DECODE + 1, V].
        active: for each row how many neurons the decoded tokens ran, [layers, DECODE]; empty if the engine does not say.
    """

    logits: tuple[Float32, ...]
    active: tuple[npt.NDArray[np.int32], ...]


@dataclass(frozen=True)
class CaseRun:
    """What the engine gave for a case.

    Attributes:
        loads: float32 [DECODE], of the decoded tokens of `sparse`.
        whole: for each row the logits [T, V] of a dense run in one pass.
        dense, sparse: decoded at load = +inf and at `loads`.
        load_outputs: what the graph said of a prompt's and a first token's logits; None if it does not.
    """

    case: Case
    loads: Float32
    whole: tuple[Float32, ...]
    dense: Decoded
    sparse: Decoded
    load_outputs: LoadOutputs | None


@dataclass(frozen=True)
class GreedyRun:
    """Greedy tokens of prompts that have one length.

    Attributes:
        dense, sparse: for each prompt its new tokens, at load = +inf and at the loads that follow from the text.
    """

    prompts: tuple[tuple[int, ...], ...]
    dense: tuple[tuple[int, ...], ...]
    sparse: tuple[tuple[int, ...], ...]

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The prompts, each with its dense tokens."""
        return [(*prompt, *new) for prompt, new in zip(self.prompts, self.dense, strict=True)]


@dataclass(frozen=True)
class DriftRun:
    """Rows decoded token by token under the automatic load, the first `prompt` tokens of each as a dense prompt.

    Attributes:
        rows: token sequences of one length T.
        logits: of every place from the last prompt token to the last but one, T - prompt arrays [rows, V].
        active: how many neurons each step ran, [steps, rows]; empty if the engine does not say.
        loads: of each step, [steps, rows].
    """

    rows: tuple[tuple[int, ...], ...]
    prompt: int
    logits: tuple[Float32, ...]
    active: npt.NDArray[np.float64]
    loads: npt.NDArray[np.float64]


def run_case(engine: Engine, case: Case, loads: Float32, keep: Keep) -> CaseRun:
    """Run a case in every way that is compared.

    Args:
        loads: float32 [DECODE].
    """
    rows = [list(row) for row in case.rows]
    whole = tuple(keep(logits) for logits in engine.logits(rows, "dense"))
    dense = np.full_like(loads, DENSE)
    count = len(rows)
    if count > 1 and (engine.max_batch is None or 2 * count <= engine.max_batch):
        columns = np.stack([dense] * count + [loads] * count, axis=1)
        outputs = _decode(engine, [*rows, *rows], columns)
        both = _by_row(outputs, range(count), keep), _by_row(outputs, range(count, 2 * count), keep)
    else:
        # One row alone is what a user runs most, and has kernels of its own.
        first = _by_row(_decode(engine, rows, np.stack([dense] * count, axis=1)), range(count), keep)
        outputs = _decode(engine, rows, np.stack([loads] * count, axis=1))
        both = first, _by_row(outputs, range(count), keep)
    return CaseRun(case, loads, whole, *both, measure_load_outputs(outputs[:2]))


def _decode(engine: Engine, rows: Rows, loads: Float32) -> list[StepOutput]:
    """The prompts of rows dense, then the rest token by token; of the last prompt tokens and of every step.

    Args:
        loads: [DECODE, rows].
    """
    outputs = [engine.prefill([list(row[: len(row) - DECODE]) for row in rows])]
    for step, load in enumerate(loads):
        outputs.append(engine.step(np.array([row[len(row) - DECODE + step] for row in rows]), load))
    return outputs


def _by_row(outputs: Sequence[StepOutput], rows: Sequence[int], keep: Keep) -> Decoded:
    counts = [output.active for output in outputs[1:] if output.active is not None]
    empty = np.zeros((0, len(outputs) - 1), np.int32)
    return Decoded(
        tuple(keep(np.stack([output.logits[row] for output in outputs])) for row in rows),
        tuple(np.stack([count[row] for count in counts], axis=1) if counts else empty for row in rows),
    )


def run_texts(engine: Engine, prompts: Rows, length: int, rows: Rows, keep: Keep) -> tuple[GreedyRun, DriftRun]:
    """Greedy tokens, dense and sparse, and given rows as they are deployed: in one batch where the engine takes it.

    Args:
        prompts: of one length; each is continued by `length` greedy tokens.
        rows: of one length; the first `DRIFT_PROMPT` tokens are the prompt.
    """
    start = min(DRIFT_PROMPT, len(rows[0]) // 2)
    alike = engine.manifest.padding == "left" or len(prompts[0]) == start
    parts = [_Part(prompts, length, True, ()), _Part(prompts, length, False, ()), _Part((), 0, False, rows)]
    if alike and (engine.max_batch is None or 2 * len(prompts) + len(rows) <= engine.max_batch):
        found = [_run(engine, parts, start, keep)]
    else:
        width = engine.max_batch or max(len(prompts), len(rows))
        found = [
            _run(engine, [_Part(part.prompts[at : at + width], length, part.dense, part.rows[at : at + width])], start, keep)
            for part in parts
            for at in range(0, max(len(part.prompts), len(part.rows)), width)
        ]
    tokens = [row for one in found for row in one.tokens]
    given = tuple(tuple(prompt) for prompt in prompts)
    (drift,) = [one.drift for one in found if one.drift is not None]
    return GreedyRun(given, tuple(tokens[: len(given)]), tuple(tokens[len(given) :])), drift


@dataclass(frozen=True)
class _Part:
    """Some of what `run_texts` runs: prompts to continue by `length` tokens, dense or not, or rows."""

    prompts: Rows
    length: int
    dense: bool
    rows: Rows


@dataclass(frozen=True)
class _Found:
    tokens: list[tuple[int, ...]]
    drift: DriftRun | None


def _run(engine: Engine, parts: Sequence[_Part], start: int, keep: Keep) -> _Found:
    """One batch; its sparse rows run at the loads that follow from their text."""
    prompts = [list(prompt) for part in parts for prompt in part.prompts]
    rows = [list(row) for part in parts for row in part.rows]
    dense = np.array([part.dense for part in parts for _ in part.prompts] + [False] * len(rows))
    greedy = np.arange(len(dense)) < len(prompts)
    new, steps = max(part.length for part in parts), len(rows[0]) - start if rows else 0
    sampler = Sampler(SamplingSettings(0.0, 0, 1.0, None), len(prompts))
    meter = LoadMeter(engine.manifest.load_signal)
    made: list[npt.NDArray[np.int64]] = []
    logits, active, loads = [], [], []
    output = engine.prefill([*prompts, *(row[:start] for row in rows)])
    for step in range(max(new, steps)):
        tokens = np.zeros(len(dense), np.int64)
        if step < new:
            tokens[greedy] = sampler.choose(output.logits[: len(prompts)])
            made.append(tokens[greedy])
        if step < steps:
            tokens[~greedy] = [row[start + step] for row in rows]
            logits.append(keep(output.logits[len(prompts) :].copy()))
        load = meter.update(output.logits, tokens, log_sum_exp=output.log_sum_exp, entropy=output.entropy)
        load[dense] = DENSE
        load[greedy if step + 1 >= new else np.zeros_like(greedy)] = SKIP
        load[~greedy if step >= steps else np.zeros_like(greedy)] = SKIP
        if np.isneginf(load).all():
            break
        output = engine.step(tokens, load)
        if step < steps:
            loads.append(load[~greedy])
            active += [] if output.active is None else [output.active[~greedy].sum(-1)]
    drift = None
    if rows:
        counts, told = np.array(active, np.float64), np.array(loads, np.float64)
        drift = DriftRun(tuple(tuple(row) for row in rows), start, tuple(logits), counts, told)
    return _Found([tuple(int(token) for token in row) for row in np.transpose(made)] if made else [], drift)
