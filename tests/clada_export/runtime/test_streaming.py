"""`Engine.stream`, and that it and `Engine.generate` are one loop: the same tokens, the same text, the same numbers."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from clada_export.errors import UsageError
from clada_export.load.surprisal import surprisal_entropy
from clada_export.runtime import Engine, TokenPiece, load_engine
from clada_export.runtime.stop_strings import StopFilter
from clada_export.runtime.text import TextStream
from tests.clada_export.runtime.test_engine_threads import CALLS, in_thread
from tests.clada_export.runtime.test_runtime import VOCABULARY, expected_logits, write_export
from tests.processes import error_in_a_fork

BYTES = [b"a", b"b", b"\n", b" ", b"\xe4", b"\xb8", b"\x96", b"c", b"\xc3", b"\xa9", b"ab\xc3"]
"""The text of the tokens: letters, and characters in up to three pieces."""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def byte_characters() -> dict[int, str]:
    """How byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def byte_level() -> Tokenizer:
    written = byte_characters()
    vocabulary = {"".join(written[byte] for byte in text): index for index, text in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As of Llama 2 and Gemma: bytes are tokens of their own, and the first space of a text falls away."""
    words = ["\u2581a", "b", "\u2581", "c", "<0xE4>", "<0xB8>", "<0x96>", "<0x41>", "<0xC3>", "<0xA9>", "\u2581\u4e16"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_pieces() -> Tokenizer:
    words = ["a", "##b", "c", "##d", ".", "do", "n", "'", "t", "e", "f"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def words() -> Tokenizer:
    """Without a decoder, and one token is special."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.add_special_tokens(["w7"])
    return tokenizer


def export(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return write_export(folder, tokenizer=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(export(tmp_path_factory.mktemp("export") / "tiny", byte_level()), threads=1)


# --- text in pieces ---


def whole_characters(tokens: list[int], kind: Callable[[], Tokenizer]) -> bool:
    """Whether no byte that is no character stands behind one that is, in one run of byte tokens."""
    return kind is not byte_fallback or "\N{REPLACEMENT CHARACTER}" not in kind().decode(tokens)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, word_pieces, words])
def test_pieces_are_the_text(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = kind()

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.integers(0, VOCABULARY - 1), max_size=24))
    def check(tokens: list[int]) -> None:
        stream = TextStream(tokenizer, tmp_path)
        pieces = [stream.push(token) for token in tokens]
        pieces.append(stream.flush())
        wanted = tokenizer.decode(tokens, skip_special_tokens=True)
        if whole_characters(tokens, kind):
            assert "".join(pieces) == wanted
        for count in range(len(tokens)):
            # What has come is never half of a character: no more than what stays, whatever comes.
            assert not "".join(pieces[: count + 1]).endswith("\N{REPLACEMENT CHARACTER}")

    check()


def test_a_character_comes_when_it_is_whole(tmp_path: Path) -> None:
    stream = TextStream(byte_level(), tmp_path)
    assert [stream.push(token) for token in (0, 4, 5, 6, 10, 9, 3, 4)] == ["a", "", "", "\u4e16", "ab", "\xe9", " ", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    # A byte run that never becomes a character, behind one that did.
    stream = TextStream(byte_fallback(), tmp_path)
    assert [stream.push(token) for token in (7, 8, 3)] == ["A", "", "\N{REPLACEMENT CHARACTER}c"]


# --- stop strings ---

TEXTS = st.text(alphabet="ab\n", max_size=14)


@settings(max_examples=300)
@given(TEXTS, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_a_text_ends_at_the_first_stop_string_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    wanted = text[: min(ends)[1]] if ends else text
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    held = StopFilter(stops)
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = held.push(text[start:end])
        shown += piece
        assert wanted.startswith(shown)
        if stopped:
            break
    else:
        assert not ends
        shown += held.flush()
    assert shown == wanted


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["ab", "\n", "a\u4e16", "\u4e16", " a", "b\n"]))
def test_generation_ends_at_a_stop_string(engine: Engine, seed: int, stop: str) -> None:
    """It is a prefix of the generation without: the tokens up to the one that completes the stop string, the text before it."""
    arguments: dict[str, Any] = {"temperature": 30.0, "seed": seed, "eos_token_id": []}
    free = engine.generate([[1, 2], [3, 4]], 18, **arguments)
    made = engine.generate([[1, 2], [3, 4]], 18, stop=stop, **arguments)
    assert free.texts is not None and made.texts is not None
    assert engine.tokenizer is not None
    for row in range(2):
        assert made.tokens[row] == free.tokens[row][: len(made.tokens[row])]
        if stop in free.texts[row]:
            assert made.finish[row] == "stop"
            assert made.texts[row] == free.texts[row][: free.texts[row].index(stop)]
            assert stop in engine.tokenizer.decode(made.tokens[row])
            assert stop not in engine.tokenizer.decode(made.tokens[row][:-1])
        else:
            assert (made.finish[row], made.texts[row]) == ("length", free.texts[row])


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [5], b"a", ["\udcff"], {"a": 1}, iter(["a"])])
def test_what_is_no_stop_string(engine: Engine, stop: Any) -> None:
    with pytest.raises(UsageError, match="stop"):
        engine.generate([[1]], 2, stop=stop)


def test_a_stop_string_needs_a_tokenizer(tmp_path: Path) -> None:
    bare = load_engine(write_export(tmp_path / "x"), threads=1)
    with pytest.raises(UsageError, match="no tokenizer, so no text can stop it"):
        bare.stream([1], 2, stop="a")
    assert [piece.text for piece in bare.stream([1], 3, eos_token_id=[])] == ["", "", ""]


# --- one loop ---


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from(["auto", "dense", 0.5]),
    st.sampled_from([{}, {"temperature": 20.0, "seed": 3}, {"temperature": 30.0, "seed": 4, "top_k": 5}]),
    st.sampled_from([None, "\n", ["ab", "\u4e16"]]),
    st.booleans(),
)
def test_stream_is_generate(
    engine: Engine, prompt: list[int], count: int, load: Any, sampling: dict[str, Any], stop: Any, ends: bool
) -> None:
    arguments: dict[str, Any] = {"load": load, "stop": stop, "eos_token_id": None if ends else [], **sampling}
    called: list[tuple[int, str]] = []
    made = engine.generate([prompt], count, stream=lambda row, token, text: called.append((token, text)), **arguments)
    stream = engine.stream(prompt, count, **arguments)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == made.tokens[0] == stream.tokens
    assert made.texts is not None
    assert "".join(piece.text for piece in pieces) == made.texts[0] == stream.text
    assert called == [(piece.token, piece.text) for piece in pieces]
    assert (stream.finish, stream.prompt_tokens) == (made.finish[0], [prompt][0])
    assert [piece.load for piece in pieces] == [math.inf, *made.loads[:, 0]]
    assert made.active is not None
    assert [piece.active_share for piece in pieces[1:]] == [row.sum() / engine.sparse_neurons for row in made.active[:, 0]]
    if stop is None:
        assert engine.tokenizer is not None and made.texts[0] == engine.tokenizer.decode(made.tokens[0])


def test_the_numbers_of_a_piece(engine: Engine) -> None:
    """Surprisal and entropy are of the raw logits that the token was taken from, whatever it was taken by."""
    pieces = list(engine.stream([1, 2], 4, load=0.5, temperature=40.0, seed=1, eos_token_id=[]))
    text = [1, 2]
    for piece in pieces:
        logits = expected_logits(text)[-1:] + (0 if math.isinf(piece.load) else piece.load) * (
            expected_logits(text, 1.0)[-1:] - expected_logits(text)[-1:]
        )
        surprisal, entropy = surprisal_entropy(logits, [piece.token])
        assert (piece.surprisal, piece.entropy) == pytest.approx((surprisal[0], entropy[0]), rel=1e-4, abs=1e-4)
        assert piece.active_share == 14 / 16
        text.append(piece.token)
    with pytest.raises(AttributeError):
        pieces[0].token = 1  # type: ignore[misc]


def test_prompts_of_a_stream(engine: Engine) -> None:
    by_text = [piece.token for piece in engine.stream("ab\n", 4)]
    assert by_text == [piece.token for piece in engine.stream((0, 1, 2), 4)] == engine.generate("ab\n", 4).tokens[0]
    assert by_text == [piece.token for piece in engine.stream(np.array([0, 1, 2]), 4)]  # type: ignore[arg-type]
    prompts: list[Any] = [["a", "b"], [[1], [2]], "", [], [1.5], None, [VOCABULARY], b"a"]
    for bad in prompts:
        with pytest.raises(UsageError):
            engine.stream(bad, 3)
    # Before a piece is taken, and for every argument.
    wrong: list[dict[str, Any]] = [{"load": "fast"}, {"top_k": -1}, {"eos_token_id": 1.5}, {"stop": 5}, {"min_p": 2}]
    for arguments in wrong:
        with pytest.raises(UsageError):
            engine.stream([1], 3, **arguments)
    with pytest.raises(TypeError):
        engine.stream([1], 3, tempo=1)  # type: ignore[call-arg]


def test_chat(engine: Engine) -> None:
    messages = [{"role": "user", "content": "ab\n"}]
    wanted = engine.generate("ab\n", 5)
    assert engine.chat(messages, 5).tokens == wanted.tokens
    stream = engine.stream_chat(messages, 5, stop="\u4e16")
    assert wanted.texts is not None
    assert "".join(piece.text for piece in stream) == wanted.texts[0].split("\u4e16")[0]
    assert engine.tokenizer is not None and stream.prompt_tokens == [0, 1, 2]


def test_chat_needs_a_tokenizer(tmp_path: Path) -> None:
    bare = load_engine(write_export(tmp_path / "x"), threads=1)
    for call in (bare.chat, bare.stream_chat):
        with pytest.raises(UsageError, match="no tokenizer, so there is no chat template"):
            call([{"role": "user", "content": "a"}], 5)  # type: ignore[operator]


# --- the engine while a stream is open ---


@pytest.fixture
def own(engine: Engine) -> Engine:
    return load_engine(engine.folder, threads=1)


def left_by_break(engine: Engine) -> None:
    for _ in engine.stream([1, 2], 6, eos_token_id=[]):
        break


def left_by_close(engine: Engine) -> None:
    stream = engine.stream([1, 2], 6, eos_token_id=[])
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == [] and stream.finish is None and len(stream.tokens) == 1


def left_by_with(engine: Engine) -> None:
    with engine.stream([1, 2], 6, eos_token_id=[]) as stream:
        next(stream)


def left_by_error(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError), engine.stream([1, 2], 6, eos_token_id=[]) as stream:
        for piece in stream:
            print(piece.token / 0)


def left_by_its_own_error(engine: Engine) -> None:
    stream = engine.stream([1, 2], 6, load=lambda s, h: [math.nan], eos_token_id=[])
    next(stream)
    with pytest.raises(UsageError, match="NaN"):
        next(stream)
    assert list(stream) == []


def left_unread(engine: Engine) -> None:
    stream = engine.stream([1, 2], 6, eos_token_id=[])
    stream.close()
    assert list(stream) == []
    unread = engine.stream([1, 2], 6)
    assert len(engine.generate([[1]], 2, eos_token_id=[]).tokens[0]) == 2
    assert len(list(unread)) > 0


WAYS = [left_by_break, left_by_close, left_by_with, left_by_error, left_by_its_own_error, left_unread]


@pytest.mark.parametrize("leave", WAYS, ids=[way.__name__ for way in WAYS])
def test_a_stream_that_ends_early_leaves_the_engine_free(own: Engine, leave: Callable[[Engine], None]) -> None:
    wanted = own.generate([[3, 4]], 6, eos_token_id=[])
    leave(own)
    made = own.generate([[3, 4]], 6, eos_token_id=[])
    assert made.tokens == wanted.tokens
    np.testing.assert_array_equal(made.loads, wanted.loads)


def test_two_streams_of_one_engine(own: Engine) -> None:
    wanted = own.generate([[1, 2]], 6, eos_token_id=[]).tokens[0]
    first, second = (own.stream([1, 2], 6, eos_token_id=[]) for _ in range(2))
    tokens = [next(first).token]
    for _ in range(2):
        with pytest.raises(UsageError, match=r"Engine\.stream: a stream of this engine is open \(Engine\.stream\)"):
            next(second)
        tokens.append(next(first).token)
    tokens += [piece.token for piece in first]
    assert tokens == wanted
    # The one that was refused begins where it was.
    assert [piece.token for piece in second] == wanted


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_while_a_stream_is_open(own: Engine, name: str) -> None:
    wanted = own.generate([[1, 2]], 6, eos_token_id=[]).tokens[0]
    stream = own.stream([1, 2], 6, eos_token_id=[])
    tokens = [next(stream).token]
    with pytest.raises(UsageError, match=rf"Engine\.{name}: a stream of this engine is open"):
        CALLS[name](own)
    error = in_thread(lambda: CALLS[name](own))
    assert f"Engine.{name}: another thread is in this engine (Engine.stream)" in str(error)
    assert tokens + [piece.token for piece in stream] == wanted


def test_a_stream_belongs_to_the_thread_that_reads_it(own: Engine) -> None:
    stream = own.stream([1, 2], 6, eos_token_id=[])
    first = in_thread(lambda: next(stream))
    assert isinstance(first, TokenPiece)
    with pytest.raises(UsageError, match="another thread or process began to read this stream"):
        next(stream)
    # Closing it is for everybody.
    stream.close()
    assert len(own.generate([[1]], 3, eos_token_id=[]).tokens[0]) == 3


def test_a_stream_within_its_own_load_function(own: Engine) -> None:
    said: list[str] = []

    def load(surprisal: np.ndarray, entropy: np.ndarray) -> list[float]:
        for call in (stream.__next__, stream.close):
            with pytest.raises(UsageError, match="this stream is making a token") as error:
                call()
            said.append(str(error.value))
        return [0.5]

    stream = own.stream([1, 2], 4, load=load, eos_token_id=[])
    assert len(list(stream)) == 4 and len(said) == 6


def test_an_engine_that_is_dropped_while_a_stream_is_open(engine: Engine) -> None:
    wanted = engine.generate([[1, 2]], 6, eos_token_id=[]).tokens[0]
    stream = load_engine(engine.folder, threads=1).stream([1, 2], 6, eos_token_id=[])
    tokens = [next(stream).token]
    gc.collect()
    assert tokens + [piece.token for piece in stream] == wanted
    stream = load_engine(engine.folder, threads=1).stream([1, 2], 6, eos_token_id=[])
    next(stream)
    del stream
    gc.collect()


def test_a_fork_has_no_stream(own: Engine) -> None:
    stream = own.stream([1, 2], 6, eos_token_id=[])
    next(stream)
    error = error_in_a_fork(lambda: next(stream))
    assert error.startswith("UsageError") and "another thread or process began to read this stream" in error
    assert len(list(stream)) == 5
