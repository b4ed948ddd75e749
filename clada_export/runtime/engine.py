"""`Engine`: prompt, decode and score with an export, over ONNX Runtime or TensorRT.

Rows of a batch are padded on the left. A token runs dense (load = +inf) in the prompt, at its row's load while decoding, and
its FFNs not at all (load = -inf) where it is padding or its row has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from clada_export.artifact.manifest import Manifest
from clada_export.errors import UsageError, VerificationError, shown
from clada_export.load.meter import LoadFunction, LoadMeter
from clada_export.load.values import DENSE, SKIP, load_array, one_load
from clada_export.runtime.exclusive import Exclusive
from clada_export.runtime.graph import KEPT_LOGITS, PassOutput, Session
from clada_export.runtime.limits import listed_names, read_limits
from clada_export.runtime.sampling import NO_FINITE_LOGIT, Sampler, SamplingSettings
from clada_export.runtime.text import TOKENIZER_FILE, TextTokenizer
from clada_export.runtime.tokens import left_pad, require_text, rows_of, token_ids

PREFILL_CHUNK = 1024
"""Prompt positions in one run of the graph: bounds the memory of its logits, which cover every position."""

ALL, LAST = np.zeros(1, np.int64), np.ones(1, np.int64)
"""Of how many last positions a run gives logits; 0 are all."""

Load: TypeAlias = float | Literal["auto", "dense"] | LoadFunction
StreamCallback: TypeAlias = Callable[[int, int, str], None]
"""Called with (row, token id, text); the text is empty without a tokenizer or while a character is incomplete."""


@dataclass(frozen=True)
class StepOutput:
    """Of the last position of every row: `logits` [B, V] float32 and `active` neurons [B, layers] int32, or None.

    `log_sum_exp` and `entropy` [B] float32 of these logits, in nats, or None if the export's graph does not give them.
    """

    logits: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32] | None
    log_sum_exp: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None


NextLoad: TypeAlias = Callable[[StepOutput, npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""The load [B] of the next step, from the output of the last and the tokens [B] taken from it."""


@dataclass(frozen=True)
class Generation:
    """What `Engine.generate` made, a list entry or column for each prompt.

    `tokens` holds the new tokens, the end token included; `texts` their text, or None without a tokenizer; `finish` says why a
    row ended: `eos`, `length` (max_new_tokens) or `context` (the model's longest input). `loads` [steps, B] and `active`
    [steps, B, layers] are those of the decode steps, one fewer than tokens; a row that had ended has -inf and 0 there. `ttft_s`
    is the time from the prompt to its first token, in seconds; `decode_s` that of each later one, choosing it included.
    """

    prompt_tokens: list[list[int]]
    tokens: list[list[int]]
    texts: list[str] | None
    finish: list[str]
    loads: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32] | None
    ttft_s: float
    decode_s: list[float]


@dataclass
class _State:
    """Where the batch stands: `mask` [B, total] and `lengths` [B] count what is in the cache."""

    cache: Any
    mask: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Engine:
    """A loaded export. It holds one batch at a time: `prefill` starts one, `step` goes on with it.

    It serves one call at a time, and a batch belongs to the thread that began it: another thread that comes into it, or a
    stream callback that calls it, gets a UsageError and changes nothing. Threads that work side by side load an engine each.

    Made by `load_engine`.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: Session) -> None:
        self.folder = folder
        self.manifest = manifest
        self._session = session
        limits = read_limits(folder, manifest)
        known = [limit for limit in (limits.max_positions, session.max_tokens) if limit is not None]
        self.max_positions = min(known, default=None)
        """The longest sequence in tokens that the model and the engine take, or None if neither says."""
        self._longer = "" if self.max_positions == limits.max_positions else "; a larger --max-past at export lets it take more"
        self.max_batch = session.max_batch
        """The most sequences in a batch, or None for any number."""
        self.vocab_size = limits.vocab_size
        """The number of token ids, or None if the model does not say."""
        self.eos_token_ids = limits.eos_token_ids
        """Tokens that end a text."""
        self._exclusive = Exclusive()
        self._state: _State | None = None

    @cached_property
    def sparse_neurons(self) -> int:
        """The neurons of all sparse layers together: how many the op decides on for each token."""
        runs = self.manifest.ffn_runs
        return sum(
            (layer.get("kept_neurons") or layer["intermediate_size"]) * runs.get(layer["name"], 1)
            for layer in self.manifest.plan["layers"]
        )

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The export's tokenizer, or None if it has none; files that the manifest does not list are not used."""
        listed = listed_names(self.manifest)
        if not (self.folder / TOKENIZER_FILE).is_file() or (listed is not None and TOKENIZER_FILE not in listed):
            return None
        return TextTokenizer(self.folder, listed)

    def prefill(self, input_ids: Sequence[Sequence[int]], load: float = DENSE) -> StepOutput:
        """Start a batch with these prompts.

        Args:
            input_ids: one list of token ids a row; they may differ in length.
            load: the load of the prompt's tokens.

        Returns:
            The output of each prompt's last token.

        Raises:
            UsageError: an empty prompt, a token that the model does not have, or a prompt longer than the model takes; or
                another call is in the engine.
        """
        with self._exclusive.call("prefill"):
            return self._prefill(self._check_prompts(input_ids), one_load(load))

    def _prefill(self, prompts: list[list[int]], load: float = DENSE) -> StepOutput:
        self._state = None
        state = self._new_state(len(prompts))
        tokens, mask = left_pad(prompts)
        loads = np.where(mask == 1, np.float32(load), np.float32(SKIP))
        for part in self._parts(tokens.shape[1]):
            output = self._run(state, tokens[:, part], mask[:, part], loads[:, part], kept=LAST)
        self._state = state
        self._exclusive.begin_batch()
        return _last(output)

    def step(self, tokens: npt.ArrayLike, load: npt.ArrayLike = DENSE) -> StepOutput:
        """Add one token to every row of the batch.

        Args:
            tokens: [B] token ids.
            load: [B] or one number; +inf is dense. A row at -inf is left as it was: its FFNs compute nothing, and its token is
                not part of its text.

        Raises:
            UsageError: no batch was started, or it is another thread's, or a shape does not fit it, or the load is NaN, or the
                model takes no more tokens; or another call is in the engine.
        """
        with self._exclusive.call("step"):
            if self._state is None:
                raise UsageError("Engine.step needs a batch; call Engine.prefill first")
            self._exclusive.require_batch("step")
            ids = token_ids(tokens, "Engine.step: tokens", self.vocab_size)
            loads = load_array(load, "Engine.step: the load")
            batch = len(self._state.lengths)
            if len(ids) != batch or loads.shape not in ((), (batch,)):
                raise UsageError(
                    f"Engine.step wants {batch} tokens and {batch} loads (or one); got {len(ids)} tokens and loads of shape "
                    f"{loads.shape}"
                )
            if np.isnan(loads).any():
                raise UsageError("Engine.step: the load is NaN; give a number, or +inf for dense")
            return self._step(self._state, np.array(ids, np.int64), np.broadcast_to(loads, (batch,)))

    def _step(self, state: _State, ids: npt.NDArray[np.int64], loads: npt.NDArray[np.float32]) -> StepOutput:
        """One token [B] for every row, at loads [B]; both checked."""
        used = loads > SKIP
        if self.max_positions is not None and (state.lengths[used] >= self.max_positions).any():
            raise UsageError(
                f"a sequence has reached the longest that the model takes: {self.max_positions} tokens{self._longer}"
            )
        return _last(self._run(state, ids[:, None], used[:, None].astype(np.int64), loads[:, None], kept=LAST))

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        load: Load = "auto",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stream: StreamCallback | None = None,
    ) -> Generation:
        """Continue the prompts.

        Args:
            prompts: a text, texts, or lists of token ids.
            max_new_tokens: at most this many new tokens a row.
            load: `auto` follows the text (surprisal and entropy of the raw logits at temperature 1) by the controller in the
                manifest, `dense` computes everything, a number holds the load there, and a function (surprisal [B], entropy
                [B]) -> load [B], in nats and standard deviations, is a signal from outside; +inf is a dense step.
            temperature: 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: keep the best tokens that together have this probability.
            seed: for sampling; the same seed gives the same text.
            eos_token_id: tokens that end a row; None takes those of the model, an empty list none.
            stream: called for every new token.

        Raises:
            UsageError: a wrong argument, an empty prompt, or one longer than the model takes; or another call is in the engine.
            VerificationError: the engine returned no finite logit.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {shown(max_new_tokens)}; it must be a whole number of at least 1")
        settings = SamplingSettings(temperature, top_k, top_p, seed)
        ends = self._ends(eos_token_id)
        next_load = self._next_load(load)
        with self._exclusive.call("generate"):
            prompt_tokens = self._check_prompts(self._encode(prompts))
            return self._generate(prompt_tokens, max_new_tokens, next_load, settings, ends, stream)

    def _generate(
        self,
        prompt_tokens: list[list[int]],
        max_new_tokens: int,
        next_load: NextLoad,
        settings: SamplingSettings,
        ends: frozenset[int],
        stream: StreamCallback | None,
    ) -> Generation:
        batch = len(prompt_tokens)
        sampler = Sampler(settings, batch)
        writers = [self.tokenizer.stream() for _ in prompt_tokens] if stream and self.tokenizer else None
        new_tokens: list[list[int]] = [[] for _ in prompt_tokens]
        finish = [""] * batch
        loads: list[npt.NDArray[np.float32]] = []
        active: list[npt.NDArray[np.int32]] = []
        decode_s: list[float] = []
        ttft_s = 0.0

        before = time.perf_counter()
        output = self._prefill(prompt_tokens)
        while True:
            chosen = sampler.choose(output.logits)
            now = time.perf_counter()
            if loads:
                decode_s.append(now - before)
            else:
                ttft_s = now - before
            for row in range(batch):
                if finish[row]:
                    continue
                token = int(chosen[row])
                new_tokens[row].append(token)
                finish[row] = self._finish(token, new_tokens[row], len(prompt_tokens[row]), ends, max_new_tokens)
                if stream is not None:
                    stream(row, token, writers[row].push(token) if writers else "")
            if all(finish):
                break
            before = time.perf_counter()
            ended = np.array([bool(reason) for reason in finish])
            running = next_load(output, chosen)
            running[ended] = SKIP
            chosen[ended] = 0
            output = self._step(self._batch(), chosen, running)
            loads.append(running)
            if output.active is not None:
                active.append(output.active)
        return Generation(
            prompt_tokens=prompt_tokens,
            tokens=new_tokens,
            texts=[self.tokenizer.decode(row) for row in new_tokens] if self.tokenizer else None,
            finish=finish,
            loads=np.array(loads, np.float32).reshape(len(loads), batch),
            active=None if output.active is None else np.array(active, np.int32).reshape(len(active), *output.active.shape),
            ttft_s=ttft_s,
            decode_s=decode_s,
        )

    def logits(
        self, input_ids: Sequence[Sequence[int]], load: float | Literal["dense"] = "dense"
    ) -> list[npt.NDArray[np.float32]]:
        """The logits of whole sequences, every token at the same load; the engine's batch is left alone.

        Args:
            input_ids: one list of token ids a row; they may differ in length.
            load: a number, or `dense`.

        Returns:
            For each row [its length, V] float32.

        Raises:
            UsageError: as `prefill`.
        """
        with self._exclusive.call("logits"):
            return self._logits(self._check_prompts(input_ids), one_load(load))

    def _logits(self, rows: list[list[int]], load: float) -> list[npt.NDArray[np.float32]]:
        tokens, mask = left_pad(rows)
        loads = np.where(mask == 1, np.float32(load), np.float32(SKIP))
        state = self._new_state(len(rows))
        parts = []
        for part in self._parts(tokens.shape[1]):
            parts.append(self._run(state, tokens[:, part], mask[:, part], loads[:, part], kept=ALL).logits)
        whole = np.concatenate(parts, axis=1)
        return [whole[row, whole.shape[1] - len(ids) :] for row, ids in enumerate(rows)]

    def score(
        self, input_ids: Sequence[Sequence[int]], load: Load = "dense", *, prompt_length: int = 1
    ) -> list[npt.NDArray[np.float64]]:
        """How likely the engine finds these sequences.

        With a fixed load the sequences run in one pass. With `auto` or a function they run token by token, as in `generate`:
        the first `prompt_length` tokens dense, and each later one at the load that the text so far gives.

        Args:
            input_ids: one list of token ids a row, each longer than `prompt_length`.
            load: `auto`, `dense`, a number or a function, as for `generate`.
            prompt_length: tokens of each row that are given, not scored.

        Returns:
            For each row [its length - prompt_length] natural log probabilities of its tokens.

        Raises:
            UsageError: a row that is too short; else as `prefill`.
        """
        with self._exclusive.call("score"):
            rows = self._check_prompts(input_ids)
            shortest = min(len(row) for row in rows)
            if type(prompt_length) is not int or not 1 <= prompt_length < shortest:
                raise UsageError(
                    f"prompt_length is {shown(prompt_length)}; it must be a whole number, at least 1 and below the shortest "
                    f"row's {shortest}"
                )
            if _follows(load):
                return self._score_stepwise(rows, prompt_length, self._next_load(load))
            scores = []
            for row, logits in zip(rows, self._logits(rows, one_load(load)), strict=True):
                scores.append(_log_probabilities(logits[prompt_length - 1 : -1], np.array(row[prompt_length:])))
            return scores

    def _score_stepwise(self, rows: list[list[int]], prompt_length: int, next_load: NextLoad) -> list[npt.NDArray[np.float64]]:
        scores: list[list[float]] = [[] for _ in rows]
        output = self._prefill([row[:prompt_length] for row in rows])
        for position in range(prompt_length, max(len(row) for row in rows)):
            present = np.array([position < len(row) for row in rows])
            tokens = np.array([row[position] if position < len(row) else 0 for row in rows], dtype=np.int64)
            for index, value in enumerate(_log_probabilities(output.logits, tokens)):
                if present[index]:
                    scores[index].append(float(value))
            # The last token of a row is scored, and no later one needs what it would compute.
            needed = np.array([position + 1 < len(row) for row in rows])
            if not needed.any():
                break
            output = self._step(self._batch(), tokens, np.where(needed, next_load(output, tokens), np.float32(SKIP)))
        return [np.array(row) for row in scores]

    def _next_load(self, load: Load) -> NextLoad:
        """What gives the load of each step, for one batch."""
        if not _follows(load):
            fixed = np.float32(one_load(load))
            return lambda output, tokens: np.full(len(tokens), fixed)
        meter = LoadMeter(load if callable(load) else self.manifest.load_signal)
        return lambda output, tokens: meter.update(
            output.logits, tokens, log_sum_exp=output.log_sum_exp, entropy=output.entropy
        )

    def _batch(self) -> _State:
        assert self._state is not None  # `_prefill` has begun it, and nobody else is in the engine
        return self._state

    def _parts(self, length: int) -> list[slice]:
        """The columns of a prompt, in runs that the session takes."""
        width = min(PREFILL_CHUNK, self._session.longest_run or PREFILL_CHUNK)
        return [slice(start, start + width) for start in range(0, length, width)]

    def _new_state(self, batch: int) -> _State:
        return _State(self._session.empty_state(batch), np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64))

    def _run(
        self,
        state: _State,
        tokens: npt.NDArray[np.int64],
        mask: npt.NDArray[np.int64],
        loads: npt.NDArray[np.float32],
        *,
        kept: npt.NDArray[np.int64],
    ) -> PassOutput:
        """Run the graph on more columns [B, S] and move the state on; `mask` is 0 where a column is no part of its row.

        `kept`, `ALL` or `LAST`, says of which positions logits are wanted; graphs that can't choose give all.
        """
        whole_mask = np.concatenate([state.mask, mask], axis=1)
        positions = np.maximum(state.lengths[:, None] + np.cumsum(mask, axis=1) - 1, 0)
        feeds = {"input_ids": tokens, "attention_mask": whole_mask, "position_ids": positions, "load": loads, KEPT_LOGITS: kept}
        output = self._session.run(feeds, state.cache)
        state.cache, state.mask, state.lengths = output.state, whole_mask, state.lengths + mask.sum(axis=1)
        return output

    def _encode(self, prompts: Any) -> Any:
        """Texts as token ids; what holds no text is given back as it is."""
        texts = [prompts] if isinstance(prompts, str) else rows_of(prompts)
        if not any(isinstance(text, str) for text in texts):
            return texts
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(
                    f"prompt {row} is {type(text).__name__}, and others are text; give all as text or all as token ids"
                )
            if not text:
                raise UsageError(f"prompt {row} is empty; give at least one character")
            require_text(text, f"prompt {row}")
        if self.tokenizer is None:
            raise UsageError(f"{self.folder}: this export has no tokenizer; give prompts as lists of token ids")
        return [self.tokenizer.encode(text) for text in texts]

    def _check_prompts(self, input_ids: Any) -> list[list[int]]:
        rows = []
        for row, ids in enumerate(rows_of(input_ids)):
            tokens = token_ids(ids, f"prompt {row}", self.vocab_size)
            if not tokens:
                raise UsageError(f"prompt {row} has no tokens; give at least one")
            if self.max_positions is not None and len(tokens) > self.max_positions:
                raise UsageError(
                    f"prompt {row} has {len(tokens)} tokens, and the model takes at most {self.max_positions}; shorten it"
                    f"{self._longer}"
                )
            rows.append(tokens)
        lengths = {len(row) for row in rows}
        if len(lengths) > 1 and self.manifest.padding == "none":
            raise UsageError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens in one batch, and this model takes no padding; "
                "give prompts of one length, or one at a time"
            )
        return rows

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_token_id is None:
            return self.eos_token_ids
        one = isinstance(eos_token_id, int | np.integer)
        return frozenset(token_ids([eos_token_id] if one else eos_token_id, "eos_token_id", None))

    def _finish(self, token: int, new_tokens: list[int], prompt_length: int, ends: frozenset[int], limit: int) -> str:
        """Why a row ends with this token, or an empty string."""
        if token in ends:
            return "eos"
        if len(new_tokens) >= limit:
            return "length"
        if self.max_positions is not None and prompt_length + len(new_tokens) > self.max_positions:
            return "context"
        return ""


def _last(output: PassOutput) -> StepOutput:
    active = None if output.active is None else output.active[:, :, -1]
    return StepOutput(output.logits[:, -1], active, output.log_sum_exp, output.entropy)


def _follows(load: Any) -> bool:
    """Whether a load is given step by step."""
    return callable(load) or (isinstance(load, str) and load == "auto")


def _log_probabilities(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """log softmax(logits [N, V]) at tokens [N], in nats; like sampling, it takes only logits that are finite for possible.

    Raises:
        VerificationError: a row has no finite logit.
    """
    values = np.where(np.isfinite(logits), logits, -np.inf).astype(np.float64)
    best = values.max(axis=1, keepdims=True)
    if np.isneginf(best).any():
        raise VerificationError(NO_FINITE_LOGIT)
    values -= best
    return values[np.arange(len(tokens)), tokens] - np.log(np.exp(values).sum(axis=1))  # type: ignore[no-any-return]
