"""`Engine`: prompt, decode and score with an export, over ONNX Runtime or TensorRT.

Rows of a batch are padded on the left. A token runs dense (load = +inf) in the prompt, at its row's load while decoding, and
its FFNs not at all (load = -inf) where it is padding or its row has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from clada_export.errors import BackendError, UsageError
from clada_export.manifest import MANIFEST_NAME, Manifest, read_manifest
from clada_export.plan import read_json
from clada_export.runtime.graph import PassOutput, Session
from clada_export.runtime.load_meter import LoadFunction, LoadMeter
from clada_export.runtime.sampling import Sampler, SamplingSettings
from clada_export.runtime.text import TOKENIZER_FILE, TextTokenizer
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

DENSE = math.inf
SKIP = -math.inf
PREFILL_CHUNK = 1024
"""Prompt positions in one run of the graph: bounds the memory of its logits, which cover every position."""

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
    """A loaded export. It holds one batch at a time: `prefill` starts one, `step` goes on with it. Not safe across threads.

    Made by `load_engine`.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: Session) -> None:
        self.folder = folder
        self.manifest = manifest
        self._session = session
        config = _optional_json(folder / "config.json")
        generation = _optional_json(folder / "generation_config.json")
        text_config = config.get("text_config") or {}
        stated = _first_int(
            config.get("max_position_embeddings"), text_config.get("max_position_embeddings"), config.get("n_positions")
        )
        if stated is not None:
            stated -= manifest.first_position
        limits = [limit for limit in (stated, session.max_tokens) if limit is not None]
        self.max_positions = min(limits, default=None)
        """The longest sequence in tokens that the model and the engine take, or None if neither says."""
        self._longer = "" if self.max_positions == stated else "; a larger --max-past at export lets it take more"
        self.max_batch = session.max_batch
        """The most sequences in a batch, or None for any number."""
        self.vocab_size = _first_int(_logits_width(manifest), config.get("vocab_size"), text_config.get("vocab_size"))
        """The number of token ids, or None if the model does not say."""
        ends = generation.get("eos_token_id", config.get("eos_token_id"))
        self.eos_token_ids = frozenset(end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int))
        """Tokens that end a text."""
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
        """The export's tokenizer, or None if it has none."""
        return TextTokenizer(self.folder) if (self.folder / TOKENIZER_FILE).is_file() else None

    def prefill(self, input_ids: Sequence[Sequence[int]], load: float = DENSE) -> StepOutput:
        """Start a batch with these prompts.

        Args:
            input_ids: one list of token ids a row; they may differ in length.
            load: the load of the prompt's tokens.

        Returns:
            The output of each prompt's last token.

        Raises:
            UsageError: an empty prompt, a token that the model does not have, or a prompt longer than the model takes.
        """
        prompts = self._check_prompts(input_ids)
        longest = max(len(prompt) for prompt in prompts)
        self._state = None
        state = self._new_state(len(prompts))
        tokens, mask = _left_pad(prompts)
        loads = np.where(mask == 1, np.float32(_fixed_load(load)), np.float32(SKIP))
        for part in self._parts(longest):
            output = self._run(state, tokens[:, part], mask[:, part], loads[:, part])
        self._state = state
        return _last(output)

    def step(self, tokens: npt.ArrayLike, load: npt.ArrayLike = DENSE) -> StepOutput:
        """Add one token to every row of the batch.

        Args:
            tokens: [B] token ids.
            load: [B] or one number; +inf is dense. A row at -inf is left as it was: its FFNs compute nothing, and its token is
                not part of its text.

        Raises:
            UsageError: no batch was started, or a shape does not fit it, or the load is NaN, or the model takes no more tokens.
        """
        if self._state is None:
            raise UsageError("Engine.step needs a batch; call Engine.prefill first")
        batch = len(self._state.lengths)
        ids = np.asarray(tokens, dtype=np.int64)
        loads = np.asarray(load, dtype=np.float32)
        if ids.shape != (batch,) or loads.shape not in ((), (batch,)):
            raise UsageError(f"Engine.step wants {batch} tokens and {batch} loads (or one); got {ids.shape} and {loads.shape}")
        if np.isnan(loads).any():
            raise UsageError("Engine.step: the load is NaN; give a number, or +inf for dense")
        column = np.broadcast_to(loads, (batch,))
        used = column > SKIP
        if self.max_positions is not None and (self._state.lengths[used] >= self.max_positions).any():
            raise UsageError(
                f"a sequence has reached the longest that the model takes: {self.max_positions} tokens{self._longer}"
            )
        self._check_tokens(ids)
        return _last(self._run(self._state, ids[:, None], used[:, None].astype(np.int64), column[:, None]))

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
            load: `auto` follows the text (surprisal and entropy of the raw logits at temperature 1) by the rule in the
                manifest, `dense` computes everything, a number holds the load there, and a function (surprisal [B], entropy
                [B]) -> load [B], in nats and standard deviations, is a signal from outside; +inf is a dense step.
            temperature: 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: keep the best tokens that together have this probability.
            seed: for sampling; the same seed gives the same text.
            eos_token_id: tokens that end a row; None takes those of the model, an empty list none.
            stream: called for every new token.

        Raises:
            UsageError: a wrong argument, an empty prompt, or one longer than the model takes.
            VerificationError: the engine returned no finite logit.
        """
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1")
        next_load = self._next_load(load)
        prompt_tokens = self._check_prompts(self._encode(prompts))
        batch = len(prompt_tokens)
        sampler = Sampler(SamplingSettings(temperature, top_k, top_p, seed), batch)
        ends = self._ends(eos_token_id)
        writers = [self.tokenizer.stream() for _ in prompt_tokens] if stream and self.tokenizer else None
        new_tokens: list[list[int]] = [[] for _ in prompt_tokens]
        finish = [""] * batch
        loads: list[npt.NDArray[np.float32]] = []
        active: list[npt.NDArray[np.int32]] = []
        decode_s: list[float] = []
        ttft_s = 0.0

        before = time.perf_counter()
        output = self.prefill(prompt_tokens)
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
            output = self.step(chosen, running)
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
        rows = self._check_prompts(input_ids)
        tokens, mask = _left_pad(rows)
        loads = np.where(mask == 1, np.float32(_fixed_load(load)), np.float32(SKIP))
        state = self._new_state(len(rows))
        parts = []
        for part in self._parts(tokens.shape[1]):
            parts.append(self._run(state, tokens[:, part], mask[:, part], loads[:, part]).logits)
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
        rows = self._check_prompts(input_ids)
        if prompt_length < 1 or min(len(row) for row in rows) <= prompt_length:
            raise UsageError(
                f"prompt_length is {prompt_length}; it must be at least 1 and below the shortest row's {min(map(len, rows))}"
            )
        if load == "auto" or callable(load):
            return self._score_stepwise(rows, prompt_length, self._next_load(load))
        scores = []
        for row, logits in zip(rows, self.logits(rows, _fixed_load(load)), strict=True):
            scores.append(_log_probabilities(logits[prompt_length - 1 : -1], np.array(row[prompt_length:])))
        return scores

    def _score_stepwise(self, rows: list[list[int]], prompt_length: int, next_load: NextLoad) -> list[npt.NDArray[np.float64]]:
        scores: list[list[float]] = [[] for _ in rows]
        output = self.prefill([row[:prompt_length] for row in rows])
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
            output = self.step(tokens, np.where(needed, next_load(output, tokens), np.float32(SKIP)))
        return [np.array(row) for row in scores]

    def _next_load(self, load: Load) -> NextLoad:
        """What gives the load of each step, for one batch."""
        if load != "auto" and not callable(load):
            fixed = np.float32(_fixed_load(load))
            return lambda output, tokens: np.full(len(tokens), fixed)
        meter = LoadMeter(load if callable(load) else self.manifest.load_signal)
        return lambda output, tokens: meter.update(
            output.logits, tokens, log_sum_exp=output.log_sum_exp, entropy=output.entropy
        )

    def _parts(self, length: int) -> list[slice]:
        """The columns of a prompt, in runs that the session takes."""
        width = min(PREFILL_CHUNK, self._session.longest_run or PREFILL_CHUNK)
        return [slice(start, start + width) for start in range(0, length, width)]

    def _new_state(self, batch: int) -> _State:
        return _State(self._session.empty_state(batch), np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64))

    def _run(
        self, state: _State, tokens: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], loads: npt.NDArray[np.float32]
    ) -> PassOutput:
        """Run the graph on more columns [B, S] and move the state on; `mask` is 0 where a column is no part of its row."""
        whole_mask = np.concatenate([state.mask, mask], axis=1)
        positions = np.maximum(state.lengths[:, None] + np.cumsum(mask, axis=1) - 1, 0)
        feeds = {"input_ids": tokens, "attention_mask": whole_mask, "position_ids": positions, "load": loads}
        output = self._session.run(feeds, state.cache)
        state.cache, state.mask, state.lengths = output.state, whole_mask, state.lengths + mask.sum(axis=1)
        return output

    def _encode(self, prompts: str | Sequence[str] | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not any(isinstance(text, str) for text in texts):
            return texts  # type: ignore[return-value]
        if self.tokenizer is None:
            raise UsageError(f"{self.folder}: this export has no tokenizer; give prompts as lists of token ids")
        encoded = []
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UsageError(
                    f"prompt {row} is {type(text).__name__}, and others are text; give all as text or all as token ids"
                )
            if not text:
                raise UsageError(f"prompt {row} is empty; give at least one character")
            encoded.append(self.tokenizer.encode(text))
        return encoded

    def _check_prompts(self, input_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        if len(input_ids) == 0:
            raise UsageError("no prompt; give at least one")
        rows = []
        for row, ids in enumerate(input_ids):
            try:
                values = np.asarray(ids)
            except ValueError:
                values = np.empty(0, object)
            if values.ndim == 1 and values.size == 0:
                raise UsageError(f"prompt {row} has no tokens; give at least one")
            if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
                raise UsageError(f"prompt {row} is not a list of token ids: {str(ids)[:60]!r}")
            if self.max_positions is not None and len(values) > self.max_positions:
                raise UsageError(
                    f"prompt {row} has {len(values)} tokens, and the model takes at most {self.max_positions}; shorten it"
                    f"{self._longer}"
                )
            self._check_tokens(values)
            rows.append([int(value) for value in values])
        lengths = {len(row) for row in rows}
        if len(lengths) > 1 and self.manifest.padding == "none":
            raise UsageError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens in one batch, and this model takes no padding; "
                "give prompts of one length, or one at a time"
            )
        return rows

    def _check_tokens(self, ids: npt.NDArray[Any]) -> None:
        bad = ids[(ids < 0) | (ids >= (self.vocab_size or np.iinfo(np.int64).max))]
        if bad.size:
            raise UsageError(f"token id {bad[0]} is out of range; the model has ids 0 to {(self.vocab_size or 0) - 1}")

    def _ends(self, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_token_id is None:
            return self.eos_token_ids
        return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)

    def _finish(self, token: int, new_tokens: list[int], prompt_length: int, ends: frozenset[int], limit: int) -> str:
        """Why a row ends with this token, or an empty string."""
        if token in ends:
            return "eos"
        if len(new_tokens) >= limit:
            return "length"
        if self.max_positions is not None and prompt_length + len(new_tokens) > self.max_positions:
            return "context"
        return ""


def load_engine(
    folder: Path | str,
    *,
    threads: int | None = None,
    library: Path | str | None = None,
    use_library: bool = True,
    verify_files: bool = False,
) -> Engine:
    """Load an export, for ONNX Runtime or TensorRT as it was compiled.

    Args:
        folder: what `clada-export` wrote.
        threads: threads of one operator; None takes one for each core that this process may use. ONNX Runtime only.
        library: a custom-op or plugin library to use instead of the export's own.
        use_library: False runs the op's ONNX function body instead of the library: the same numbers, without the speed. ONNX
            Runtime only: whether a TensorRT engine needs the library was decided when it was built.
        verify_files: compare the sha256 of every file with the manifest first; sizes are compared in any case.

    Raises:
        UsageError: not an export, or a damaged one, or a wrong argument.
        BackendError: the library is missing or was built for another version of the op, or the backend can't load the engine.
    """
    folder = Path(folder)
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1")
    manifest = read_manifest(folder, check_files=verify_files)
    found = (manifest.op["domain"], manifest.op["name"], manifest.op["version"])
    if found != (DOMAIN, OP_TYPE, OP_VERSION):
        raise BackendError(
            f"{folder / MANIFEST_NAME}: op: was exported with {found[0]}::{found[1]} version {found[2]}, and this program runs "
            f"{DOMAIN}::{OP_TYPE} version {OP_VERSION}; export again"
        )
    if manifest.target == "trt":
        if threads is not None or not use_library:
            raise UsageError(f"{folder}: threads and use_library are of ONNX Runtime, and this is an export for TensorRT")
        return Engine(folder, manifest, _tensorrt_session(folder, manifest, library))
    path = _library(folder, manifest, library) if use_library else None
    return Engine(folder, manifest, _ort_session(folder, manifest, path, threads))


def _ort_session(folder: Path, manifest: Manifest, library: Path | None, threads: int | None) -> Session:
    try:
        from clada_export.runtime.session import GraphSession
    except ImportError as error:
        raise BackendError(f"{folder}: this export needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    return GraphSession(folder, manifest, library, threads)


def _tensorrt_session(folder: Path, manifest: Manifest, library: Path | str | None) -> Session:
    from clada_export.runtime.tensorrt_session import open_session

    return open_session(folder, manifest, None if library is None else Path(library))


def _library(folder: Path, manifest: Manifest, library: Path | str | None) -> Path | None:
    if library is None and manifest.library is None:
        return None
    path = Path(library) if library is not None else folder / str(manifest.library)
    if not path.is_file():
        raise BackendError(f"{path}: the custom-op library is missing; copy the whole export, or install clada-export[ort]")
    from clada_export.native import check_library

    check_library(path)
    return path.resolve()


def _left_pad(rows: list[list[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and mask, both [B, S]; padding has token 0 and mask 0."""
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        tokens[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return tokens, mask


def _last(output: PassOutput) -> StepOutput:
    active = None if output.active is None else output.active[:, :, -1]
    return StepOutput(output.logits[:, -1], active, output.log_sum_exp, output.entropy)


def _fixed_load(load: Any) -> float:
    if load == "dense":
        return DENSE
    if isinstance(load, (str, bool)) or not isinstance(load, (int, float, np.floating, np.integer)):
        raise UsageError(f"load is {load!r}; it must be 'auto', 'dense', a number of standard deviations or a function")
    if math.isnan(load) or load == SKIP:
        raise UsageError(f"load is {load}; it must be a number, or +inf for dense")
    return float(load)


def _log_probabilities(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """log softmax(logits [N, V]) at tokens [N], in nats."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values[np.arange(len(tokens)), tokens] - np.log(np.exp(values).sum(axis=1))  # type: ignore[no-any-return]


def _logits_width(manifest: Manifest) -> int | str | None:
    return next((spec.shape[-1] for spec in manifest.outputs if spec.name == "logits" and spec.shape), None)


def _optional_json(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is wanted, and this is {type(value).__name__}")
    return value


def _first_int(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)
