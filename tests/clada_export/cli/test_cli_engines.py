"""`clada run` and its like on a small engine: odd arguments, odd outputs, and the last net under all commands."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from clada_export.cli import main
from clada_export.errors import UsageError
from tests.clada_export.runtime.test_runtime import VOCABULARY, write_export

WORDS = {f"\u4e16{index}": index for index in range(VOCABULARY)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "tiny"
    out.mkdir()
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="\u4e162"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))
    return write_export(out, tokenizer=True)


def clada(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "clada_export.cli", *arguments],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "10000000000"], "threads is 10000000000; it must be a whole number from 1 to 1024"),
        (["--threads", "0"], "threads is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", "18446744073709551616"], "seed is 18446744073709551616"),
        (["--load=-1e400"], "load is -inf"),
        (["--load=-inf"], "load is -inf"),
        (["--load", "nan"], "load is nan"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--top-p", "nan"], "top_p is nan"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "\udcff\udcfe"], "--prompt 2 is no UTF-8 text"),
        (["--chat"], "no chat template"),
    ],
)
def test_arguments_that_are_refused(folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(folder), "--prompt", "w3", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and said in captured.err


@pytest.mark.parametrize("number", ["9" * 5000, "1" + "0" * 4300])
@pytest.mark.parametrize("option", ["--threads", "--seed", "--top-k", "--max-new-tokens"])
def test_numbers_that_python_does_not_read(folder: Path, option: str, number: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", str(folder), "--prompt", "w3", option, number])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-tokens", "1000000000000"], "1000000000000 prompt tokens; it takes 1 to"),
        (["--new-tokens", "1"], "1 new tokens; it takes 2 to"),
        (["--repeats", "0"], "0 repeats"),
        (["--repeats", "1000000000000"], "1000000000000 repeats"),
        (["--threads", "10000000000"], "threads is 10000000000"),
        (["--load=-inf"], "load is -inf"),
    ],
)
def test_arguments_of_bench(folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["bench", str(folder), "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
    assert main([*base, *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("load", ["-1e39", "-3e38", "-1e308", "1e39", "1e400", "inf"])
def test_the_largest_loads(folder: Path, load: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The hand-made graph counts 14 neurons for every row that is not skipped."""
    assert main(["run", str(folder), "--prompt", "w3", f"--load={load}", "--json", "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(1 - 14 / 16)


def test_a_prompt_that_is_no_utf8(folder: Path) -> None:
    done = clada("run", str(folder), "--prompt", b"\xff\xfe")
    assert done.returncode == 2
    assert b"error: --prompt 1 is no UTF-8 text" in done.stderr


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/\xff"
    for command in (b"run", b"bench", b"inspect", b"verify"):
        done = clada(command, place, *([b"--prompt", b"x"] if command == b"run" else []))
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(b"error: ")
    write_export(Path(os.fsdecode(place)))
    done = clada("bench", place, "--prompt-tokens", "2", "--new-tokens", "2", "--repeats", "1", "--quiet")
    assert done.returncode == 2
    assert b"no UTF-8" in done.stderr and b"rename it" in done.stderr


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["a" * 200] * 30), "loop", "file", "file/x", "closed"])
def test_places_that_are_no_engine(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "clada.json").symlink_to("clada.json")
    for command in (["run", "--prompt", "x"], ["bench"], ["verify"]):
        assert main([command[0], str(tmp_path / name), *command[1:]]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_terminal_that_lacks_the_characters(folder: Path) -> None:
    for encoding in ("ascii", "latin-1"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = clada("run", str(folder), "--prompt", "\u4e163", "--quiet", env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(rb"\u4e16")


def test_an_output_that_is_full_or_gone(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = clada("run", str(folder), "--prompt", "w3", stdout=full)
        assert done.returncode == 2
        assert b"No space left on device" in done.stderr and b"Traceback" not in done.stderr
        done = clada("inspect", str(folder), stdout=full)
        assert done.returncode == 2 and b"No space left on device" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = clada("inspect", str(folder), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    command = f"exec {sys.executable} -m clada_export.cli inspect {folder} >&-"
    closed = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert (closed.returncode, closed.stderr) == (0, b"")


# --- the last net ---


class PanicException(BaseException):
    """What PyO3 raises where Rust panics: no Exception."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("unexpected"), 1, "internal error: RuntimeError: unexpected"),
        (PanicException("index out of bounds"), 1, "internal error: PanicException: index out of bounds"),
        (BaseException("stray"), 1, "internal error: BaseException: stray"),
        (RecursionError("maximum depth"), 1, "internal error: RecursionError"),
        (OSError(errno.EIO, "Input/output error"), 1, "internal error: OSError"),
        (MemoryError(), 5, "error: memory is exhausted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "error: /x: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "error: the output: Disk quota exceeded"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("no \x1b[2J\r\u202e\x00 here"), 2, r"error: no \x1b[2J\r\u202e\x00 here"),
        (UsageError("one\n  two"), 2, "error: one\n  two"),
    ],
)
def test_what_commands_raise(
    folder: Path,
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("clada_export.runtime.load_engine", broken)
    monkeypatch.setattr("clada_export.cli._discard_stdout", lambda: None)  # not that of the tests
    assert main(["bench", str(folder)]) == code
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
def test_what_is_no_failure_passes(folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("clada_export.runtime.load_engine", leave)
    with pytest.raises(type(error)):
        main(["bench", str(folder)])
