"""`Engine`: prompt, decode and score with an export, over ONNX Runtime or TensorRT.

Rows of a batch are padded on the left. A token runs dense (load = +inf) in the prompt, at its row's load while decoding, and
its FFNs not at all (load = -inf) where it is padding or its row has ended.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import numpy.typing as npt

from clada_export.artifact.manifest import Manifest
from clada_export.errors import UsageError, shown
from clada_export.load.meter import LoadMeter
from clada_export.load.values import DENSE, SKIP, load_array, one_load
from clada_export.runtime.exclusive import Exclusive
from clada_export.runtime.generation import (
    Generation,
    GenerationArguments,
    GenerationRequest,
    Load,
    Model,
    NextLoad,
    Row,
    StepOutput,
    StreamCallback,
    TokenPiece,
    TokenStream,
    gather,
    one_prompt,
    pieces,
    rounds,
)
from clada_export.runtime.generation_defaults import GenerationDefaults
from clada_export.runtime.graph import KEPT_LOGITS, PassOutput, Session
from clada_export.runtime.limits import listed_names, read_limits
from clada_export.runtime.scores import log_probabilities
from clada_export.runtime.stop_strings import stop_strings
from clada_export.runtime.text import TOKENIZER_FILE, TextTokenizer
from clada_export.runtime.tokens import left_pad, require_text, rows_of, token_ids

PREFILL_CHUNK = 1024
"""Prompt positions in one run of the graph: bounds the memory of its logits, which cover every position."""

ALL, LAST = np.zeros(1, np.int64), np.ones(1, np.int64)
"""Of how many last positions a run gives logits; 0 are all."""

__all__ = ["ALL", "LAST", "PREFILL_CHUNK", "Engine", "Generation", "Load", "NextLoad", "StepOutput", "StreamCallback"]


@dataclass
class _State:
    """Where the batch stands: `mask` [B, total] and `lengths` [B] count what is in the cache."""

    cache: Any
    mask: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Engine:
    """A loaded export. It holds one batch at a time: `prefill` starts one, `step` goes on with it.

    It serves one call at a time, and a batch belongs to the thread that began it: another thread that comes into it, or a
    stream callback that calls it, gets a UsageError and changes nothing; so does any call while a stream is being read. Threads
    that work side by side load an engine each.

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
        self._defaults = GenerationDefaults.read(folder, manifest)
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
        stream: StreamCallback | None = None,
        **arguments: Unpack[GenerationArguments],
    ) -> Generation:
        """Continue the prompts.

        Args:
            prompts: a text, texts, or lists of token ids.
            max_new_tokens: at most this many new tokens a row.
            stream: called for every new token.
            load: `auto` follows the text (surprisal and entropy of the raw logits at temperature 1) by the controller in the
                manifest, `dense` computes everything, a number holds the load there, and a function (surprisal [B], entropy
                [B]) -> load [B], in nats and standard deviations, is a signal from outside; +inf is a dense step.
            do_sample: draw tokens, or take the best (greedy); None draws if a temperature above 0 is given, or, where none is
                given, if the export's `generation_config.json` says so.
            temperature, top_k, top_p, min_p, repetition_penalty: how tokens are chosen (`SamplingSettings`); None takes the
                value of `generation_config.json`, or else 1, 0, 1, 0 and 1. Temperature 0 is greedy.
            seed: for sampling; the same seed gives the same text.
            eos_token_id: tokens that end a row; None takes those of the model, an empty list none.
            stop: texts that end a row where one appears; the text before it stays.

        Raises:
            UsageError: a wrong argument, an empty prompt, or one longer than the model takes; or another call is in the engine.
            VerificationError: the engine returned no finite logit.
        """
        request = self._request(max_new_tokens, **arguments)
        with self._exclusive.call("generate"):
            rows = self._rows(self._check_prompts(self._encode(prompts)), request)
            made = rounds(self._model(), rows, request)
            return gather(made, rows, texts=self.tokenizer is not None, stream=stream)

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int, **arguments: Unpack[GenerationArguments]) -> TokenStream:
        """Continue one prompt, and give each token as it comes: the same tokens and text as `generate`.

        Args:
            prompt: a text, or token ids.
            max_new_tokens: at most this many.
            arguments: as those of `generate`, by name.

        Raises:
            UsageError: a wrong argument, an empty prompt, or one longer than the model takes. That another call is in the
                engine is told when the first piece is taken.
        """
        return self._stream("stream", one_prompt(prompt), max_new_tokens, arguments)

    def chat(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, **arguments: Unpack[GenerationArguments]
    ) -> Generation:
        """The assistant's next message in a conversation, by the model's chat template.

        Args:
            messages: dicts with `role` and `content`.
            max_new_tokens: at most this many.
            arguments: as those of `generate`, by name.

        Raises:
            UsageError: as `generate` and `TextTokenizer.chat`.
        """
        return self.generate([self.chat_prompt(messages)], max_new_tokens, **arguments)

    def stream_chat(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, **arguments: Unpack[GenerationArguments]
    ) -> TokenStream:
        """`chat`, each token as it comes (`stream`)."""
        return self._stream("stream_chat", [self.chat_prompt(messages)], max_new_tokens, arguments)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation as token ids, by the model's chat template, up to where the assistant's next message begins.

        Raises:
            UsageError: the export has no tokenizer, or as `TextTokenizer.chat`.
        """
        if self.tokenizer is None:
            raise UsageError(f"{self.folder}: this export has no tokenizer, so there is no chat template")
        return self.tokenizer.chat(messages)

    def _stream(self, name: str, prompts: Any, max_new_tokens: int, arguments: GenerationArguments) -> TokenStream:
        request = self._request(max_new_tokens, **arguments)
        rows = self._rows(self._check_prompts(self._encode(prompts)), request)

        def made() -> Generator[TokenPiece, None, None]:
            try:
                yield from pieces(rounds(self._model(), rows, request), self.sparse_neurons)
            finally:
                self._exclusive.leave()

        return TokenStream(name, self._exclusive, rows[0], made())

    def _request(
        self,
        max_new_tokens: int,
        *,
        load: Load = "auto",
        eos_token_id: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> GenerationRequest:
        """The arguments of a call, checked."""
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {shown(max_new_tokens)}; it must be a whole number of at least 1")
        settings = self._defaults.sampling(**sampling)
        stops = stop_strings(stop)
        if stops and self.tokenizer is None:
            raise UsageError(f"{self.folder}: this export has no tokenizer, so no text can stop it; give eos_token_id")
        next_load = self._next_load(load)
        return GenerationRequest(max_new_tokens, settings, self._ends(eos_token_id), stops, next_load, self.max_positions)

    def _rows(self, prompt_tokens: list[list[int]], request: GenerationRequest) -> list[Row]:
        return [Row(prompt, request, self.tokenizer.stream() if self.tokenizer else None) for prompt in prompt_tokens]

    def _model(self) -> Model:
        return Model(self._prefill, lambda tokens, loads: self._step(self._batch(), tokens, loads))

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
                scores.append(log_probabilities(logits[prompt_length - 1 : -1], np.array(row[prompt_length:])))
            return scores

    def _score_stepwise(self, rows: list[list[int]], prompt_length: int, next_load: NextLoad) -> list[npt.NDArray[np.float64]]:
        scores: list[list[float]] = [[] for _ in rows]
        output = self._prefill([row[:prompt_length] for row in rows])
        for position in range(prompt_length, max(len(row) for row in rows)):
            present = np.array([position < len(row) for row in rows])
            tokens = np.array([row[position] if position < len(row) else 0 for row in rows], dtype=np.int64)
            for index, value in enumerate(log_probabilities(output.logits, tokens)):
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


def _last(output: PassOutput) -> StepOutput:
    active = None if output.active is None else output.active[:, :, -1]
    return StepOutput(output.logits[:, -1], active, output.log_sum_exp, output.entropy)


def _follows(load: Any) -> bool:
    """Whether a load is given step by step."""
    return callable(load) or (isinstance(load, str) and load == "auto")
