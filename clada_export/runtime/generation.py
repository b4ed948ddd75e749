"""The one loop that makes tokens: `Engine.generate` gathers what it yields, and `Engine.stream` hands it on."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError
from clada_export.load.meter import LoadFunction
from clada_export.load.surprisal import surprisal_entropy
from clada_export.load.values import DENSE, SKIP
from clada_export.runtime.exclusive import Exclusive
from clada_export.runtime.sampling import Sampler, SamplingSettings
from clada_export.runtime.stop_strings import StopFilter
from clada_export.runtime.text import TextStream

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

    `tokens` holds the new tokens, the end token included; `texts` their text, up to a stop string, or None without a tokenizer;
    `finish` says why a row ended: `eos`, `stop` (a stop string), `length` (max_new_tokens) or `context` (the model's longest
    input). `loads` [steps, B] and `active` [steps, B, layers] are those of the decode steps, one fewer than tokens; a row that
    had ended has -inf and 0 there. `ttft_s` is the time from the prompt to its first token, in seconds; `decode_s` that of each
    later one, choosing it included.
    """

    prompt_tokens: list[list[int]]
    tokens: list[list[int]]
    texts: list[str] | None
    finish: list[str]
    loads: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32] | None
    ttft_s: float
    decode_s: list[float]


@dataclass(frozen=True)
class TokenPiece:
    """A token of `Engine.stream`, and the pass of the model that gave it.

    Attributes:
        token: its id.
        text: what can be shown now: empty while a character is not whole or a stop string may have begun.
        surprisal: of this token, in nats, from the raw logits at temperature 1.
        entropy: of what the model expected here, in nats, likewise.
        load: of the pass: +inf is dense, as it is for the prompt, which gives the first token.
        active_share: share of the sparse layers' neurons that were computed for the position that gave it; None if the engine
            does not count them.
    """

    token: int
    text: str
    surprisal: float
    entropy: float
    load: float
    active_share: float | None


class GenerationArguments(TypedDict, total=False):
    """What `Engine.generate` takes by name, its callback apart; the same in all calls that generate."""

    load: Load
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    eos_token_id: int | Sequence[int] | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class GenerationRequest:
    """How to go on with the prompts of one call, checked. `next_load` may remember the text: it is for one call."""

    max_new_tokens: int
    sampling: SamplingSettings
    ends: frozenset[int]
    stops: tuple[str, ...]
    next_load: NextLoad
    max_positions: int | None


@dataclass(frozen=True)
class Model:
    """What the loop asks of an engine, which holds one batch: `begin` it with prompts, `step` with tokens [B] at loads [B]."""

    begin: Callable[[list[list[int]]], StepOutput]
    step: Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], StepOutput]


class Row:
    """What a row of the batch has become.

    Args:
        writer: makes text of its tokens; None without a tokenizer.
    """

    def __init__(self, prompt: Sequence[int], request: GenerationRequest, writer: TextStream | None) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.text = ""
        self.finish = ""
        self._request = request
        self._writer = writer
        self._filter = StopFilter(request.stops) if request.stops else None

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown now. Sets `finish` if the row ends with it."""
        self.tokens.append(token)
        self.finish = self._reason(token)
        text = "" if self._writer is None else self._writer.push(token)
        if self.finish and self._writer is not None:
            text += self._writer.flush()
        if self._filter is not None:
            text, stopped = self._filter.push(text)
            if stopped:
                self.finish = "stop"
            elif self.finish:
                text += self._filter.flush()
        self.text += text
        return text

    def _reason(self, token: int) -> str:
        """Why the row ends with this token, or an empty string."""
        request = self._request
        if token in request.ends:
            return "eos"
        if len(self.tokens) >= request.max_new_tokens:
            return "length"
        if request.max_positions is not None and len(self.prompt) + len(self.tokens) > request.max_positions:
            return "context"
        return ""


@dataclass(frozen=True)
class Round:
    """One token for every row that had not ended: `texts` [B], None for one that had.

    `tokens` [B] were taken from `output`, the pass that ran at `loads` [B]; `seconds` went by from the token before (of the
    first: from the prompt), what the caller did with it left out.
    """

    tokens: npt.NDArray[np.int64]
    texts: list[str | None]
    output: StepOutput
    loads: npt.NDArray[np.float32]
    seconds: float


def rounds(model: Model, rows: list[Row], request: GenerationRequest) -> Iterator[Round]:
    """Make tokens until every row has ended.

    Raises:
        UsageError: what a load function returned is no load.
        VerificationError: the model returned no finite logit.
    """
    prompts = [list(row.prompt) for row in rows]
    sampler = Sampler(request.sampling, len(rows), prompts)
    loads = np.full(len(rows), DENSE, np.float32)
    before = time.perf_counter()
    output = model.begin(prompts)
    while True:
        chosen = sampler.choose(output.logits)
        seconds = time.perf_counter() - before
        texts = [None if row.finish else row.push(int(token)) for row, token in zip(rows, chosen, strict=True)]
        yield Round(chosen, texts, output, loads, seconds)
        ended = np.array([bool(row.finish) for row in rows])
        if ended.all():
            return
        before = time.perf_counter()
        loads = np.where(ended, np.float32(SKIP), request.next_load(output, chosen))
        output = model.step(np.where(ended, 0, chosen), loads)


def gather(made: Iterator[Round], rows: list[Row], *, texts: bool, stream: StreamCallback | None) -> Generation:
    """All rounds as one result; `stream` gets every token as it comes."""
    seconds, loads, active = [], [], []
    for number, now in enumerate(made):
        seconds.append(now.seconds)
        if number:
            loads.append(now.loads)
            if now.output.active is not None:
                active.append(now.output.active)
        if stream is not None:
            for row, text in enumerate(now.texts):
                if text is not None:
                    stream(row, int(now.tokens[row]), text)
    counted = now.output.active
    return Generation(
        prompt_tokens=[list(row.prompt) for row in rows],
        tokens=[row.tokens for row in rows],
        texts=[row.text for row in rows] if texts else None,
        finish=[row.finish for row in rows],
        loads=np.array(loads, np.float32).reshape(len(loads), len(rows)),
        active=None if counted is None else np.array(active, np.int32).reshape(len(active), *counted.shape),
        ttft_s=seconds[0],
        decode_s=seconds[1:],
    )


def pieces(made: Iterator[Round], neurons: int) -> Iterator[TokenPiece]:
    """The rounds of one row as pieces.

    Args:
        neurons: of all sparse layers together.
    """
    for now in made:
        output = now.output
        surprisal, entropy = surprisal_entropy(output.logits, now.tokens, output.log_sum_exp, output.entropy)
        share = float(output.active[0].sum()) / neurons if output.active is not None and neurons else None
        yield TokenPiece(
            int(now.tokens[0]), now.texts[0] or "", float(surprisal[0]), float(entropy[0]), float(now.loads[0]), share
        )


class TokenStream(Iterator[TokenPiece]):
    """What `Engine.stream` gives: one `TokenPiece` for each token, as it comes.

    It holds the engine from its first piece to its last: other calls get a UsageError until it has ended or is closed. `close`,
    leaving a `with` block, an error from the engine, or dropping the stream end it early. Only the thread that took the first
    piece may take others.

    Attributes:
        prompt_tokens: what the prompt became.
    """

    def __init__(self, name: str, exclusive: Exclusive, row: Row, made: Generator[TokenPiece, None, None]) -> None:
        self.prompt_tokens = list(row.prompt)
        self._name = name
        self._exclusive = exclusive
        self._row = row
        self._made = made  # it leaves the engine when it ends; what enters it is the first piece, below
        self._taker: tuple[int, int] | None = None
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return list(self._row.tokens)

    @property
    def text(self) -> str:
        """The text so far: that of all pieces."""
        return self._row.text

    @property
    def finish(self) -> str | None:
        """Why it ended, as in `Generation`; None while it has not, or where it was closed before."""
        return self._row.finish or None

    def __next__(self) -> TokenPiece:
        """The next piece.

        Raises:
            UsageError: another call is in the engine; or another thread or process took the first piece.
            CladaError: as `Engine.generate`.
        """
        self._require_idle()
        if self._closed:
            raise StopIteration
        taker = (os.getpid(), threading.get_ident())
        if self._taker is None:
            self._exclusive.enter(self._name, open_between=True)
            self._taker = taker
        elif self._taker != taker:
            raise UsageError(
                f"Engine.{self._name}: another thread or process began to read this stream; read it in that one, or load one "
                "engine for each (load_engine)"
            )
        return next(self._made)

    def close(self) -> None:
        """End it here; the engine is free again. Closing it once more does nothing.

        Raises:
            UsageError: it is making a token at this moment, in another thread or in the caller, a load function.
        """
        self._require_idle()
        self._closed = True
        self._made.close()

    def _require_idle(self) -> None:
        if inspect.getgeneratorstate(self._made) == inspect.GEN_RUNNING:
            raise UsageError(f"Engine.{self._name}: this stream is making a token; wait until that has returned")

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def one_prompt(given: Any) -> Any:
    """One prompt, a text or token ids, as the batch of one that it is.

    Raises:
        UsageError: it is a list of texts or of lists: several prompts.
    """
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and not isinstance(given, bytes) and any(isinstance(item, str | Sequence) for item in given):
        raise UsageError("Engine.stream takes one prompt, a text or a list of token ids; Engine.generate takes several")
    return [given]
