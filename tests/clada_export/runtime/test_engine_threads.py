"""One engine in several threads, and calls from inside a call: an error that says what to do, never another text's tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clada_export.errors import UsageError
from clada_export.runtime import Engine, load_engine
from tests.clada_export.runtime.test_runtime import write_export

PROMPTS = [[[1, 2, 3]], [[4], [5, 6]], [[7, 8, 9, 10, 1]], [[2]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_export(tmp_path / "tiny")


@pytest.fixture
def engine(folder: Path) -> Engine:
    return load_engine(folder, threads=1)


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call in another thread returns or raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except UsageError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return found[0]


def test_threads_get_the_right_tokens_or_an_error(engine: Engine) -> None:
    wanted = [engine.generate(prompts, 6, eos_token_id=[]).tokens for prompts in PROMPTS]
    results: list[str] = []

    def work(index: int) -> None:
        for _ in range(300):
            try:
                found = engine.generate(PROMPTS[index], 6, eos_token_id=[]).tokens
            except UsageError as error:
                results.append("refused" if "load one engine for each thread" in str(error) else str(error))
            else:
                results.append("right" if found == wanted[index] else "wrong")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 1200
    assert set(results) == {"right", "refused"}
    # And it still works.
    assert engine.generate(PROMPTS[0], 6, eos_token_id=[]).tokens == wanted[0]


def test_an_engine_for_each_thread(folder: Path, engine: Engine) -> None:
    wanted = [engine.generate(prompts, 6, eos_token_id=[]).tokens for prompts in PROMPTS]
    found: dict[int, set[bool]] = {}

    def work(index: int) -> None:
        own = load_engine(folder, threads=1)
        found[index] = {own.generate(PROMPTS[index], 6, eos_token_id=[]).tokens == wanted[index] for _ in range(50)}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {index: {True} for index in range(4)}


CALLS: dict[str, Callable[[Engine], Any]] = {
    "generate": lambda engine: engine.generate([[1]], 2),
    "prefill": lambda engine: engine.prefill([[1]]),
    "step": lambda engine: engine.step([1]),
    "logits": lambda engine: engine.logits([[1]]),
    "score": lambda engine: engine.score([[1, 2]]),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_waits_for_none(engine: Engine, name: str) -> None:
    """A call that meets another is refused at once, and the one that it met goes on undisturbed."""
    wanted = engine.generate([[1, 2]], 6, eos_token_id=[])
    refused: list[Any] = []

    def meet(row: int, token: int, text: str) -> None:
        refused.append(in_thread(lambda: CALLS[name](engine)))

    made = engine.generate([[1, 2]], 6, eos_token_id=[], stream=meet)
    assert made.tokens == wanted.tokens
    np.testing.assert_array_equal(made.loads, wanted.loads)
    assert len(refused) == 6
    for error in refused:
        assert isinstance(error, UsageError)
        assert f"Engine.{name}: another thread is in this engine (Engine.generate)" in str(error)
    assert engine.generate([[1, 2]], 6, eos_token_id=[]).tokens == wanted.tokens


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", ["stream", "load"])
def test_a_call_from_inside_a_call(engine: Engine, name: str, place: str) -> None:
    wanted = engine.generate([[1, 2]], 6, load=0.5, eos_token_id=[]).tokens
    errors: list[str] = []

    def again(*_: Any) -> list[float]:
        with pytest.raises(UsageError, match=r"from inside Engine\.generate") as error:
            CALLS[name](engine)
        errors.append(str(error.value))
        return [0.5]

    options: dict[str, Any] = {"stream": again, "load": 0.5} if place == "stream" else {"load": again}
    assert engine.generate([[1, 2]], 6, eos_token_id=[], **options).tokens == wanted
    assert len(errors) == (6 if place == "stream" else 5)

    def unheeding(*_: Any) -> list[float]:
        CALLS[name](engine)
        return [0.5]

    options = {"stream": unheeding} if place == "stream" else {"load": unheeding}
    with pytest.raises(UsageError, match=rf"Engine\.{name} was called from inside"):
        engine.generate([[1, 2]], 6, eos_token_id=[], **options)
    assert engine.generate([[1, 2]], 6, load=0.5, eos_token_id=[]).tokens == wanted


def test_a_batch_of_another_thread(engine: Engine) -> None:
    engine.prefill([[1]])
    error = in_thread(lambda: engine.step([2]))
    assert isinstance(error, UsageError) and "another thread began the batch" in str(error)
    wanted = engine.step([2]).logits
    # Another thread that begins one takes its place, and the first is told.
    in_thread(lambda: engine.prefill([[3, 4]]))
    with pytest.raises(UsageError, match="another thread began the batch that this engine holds; load one engine"):
        engine.step([2])
    engine.prefill([[1]])
    np.testing.assert_array_equal(engine.step([2]).logits, wanted)


def test_an_error_in_a_call_leaves_the_engine_free(engine: Engine) -> None:
    class StopError(Exception):
        pass

    def stop(row: int, token: int, text: str) -> None:
        raise StopError

    with pytest.raises(StopError):
        engine.generate([[1]], 3, stream=stop)
    with pytest.raises(UsageError):
        engine.prefill([[99]])
    assert len(engine.generate([[1]], 3, eos_token_id=[]).tokens[0]) == 3
