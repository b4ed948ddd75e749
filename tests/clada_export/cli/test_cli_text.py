"""`clada run` and `clada chat`: text as it comes, on a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clada_export.cli import main
from clada_export.cli.token_output import TokenOutput, colours, legend, painted, tell_cut
from clada_export.runtime import Engine, TokenPiece, load_engine
from tests.clada_export.runtime.test_streaming import byte_level, export

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(export(tmp_path_factory.mktemp("engine") / "tiny", byte_level()), threads=1)


class Stdin(io.TextIOWrapper):
    """stdin on a pipe with these bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")


def text_of(engine: Engine, prompt: str, count: int, **arguments: Any) -> str:
    made = engine.generate(prompt, count, **arguments)
    assert made.texts is not None
    return made.texts[0]


# --- run ---


@pytest.mark.parametrize("more", [[], ["--show-load"], ["--temperature", "20", "--seed", "3"]])
def test_a_pipe_gets_the_text_and_nothing_else(engine: Engine, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sampling: dict[str, Any] = {"temperature": 20.0, "seed": 3} if "--seed" in more else {}
    assert main(["run", str(engine.folder), "--prompt", "ab", "--max-new-tokens", "9", *more]) == 0
    captured = capsys.readouterr()
    assert captured.out == text_of(engine, "ab", 9, **sampling) + "\n"
    assert "\x1b" not in captured.err and "tokens/s" in captured.err
    assert ("active share 87.5% to 87.5%" in captured.err) == ("--show-load" in more)


def test_json_is_of_the_same_text(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(engine.folder), "--prompt", "ab", "--max-new-tokens", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == [text_of(engine, "ab", 9)]
    assert sorted(found) == ["finish", "itl_p50_s", "sparsity", "texts", "tokens", "ttft_s"]


def test_what_is_told_of_a_text_that_was_cut(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    cut = "cut at 2 tokens; --max-new-tokens lets it go on"
    base = ["run", str(engine.folder), "--prompt", "ab", "--max-new-tokens", "2"]
    assert main(base) == 0
    assert cut in capsys.readouterr().err
    assert main([*base, "--prompt", "b"]) == 0
    assert f"prompt 1: {cut}" in capsys.readouterr().err
    assert main([*base, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    for finish, said in (
        ("context", "cut at 3 tokens; the model takes 24 tokens at most\n"),
        ("eos", ""),
        ("stop", ""),
        (None, ""),
    ):
        tell_cut(engine, finish, 3, quiet=False)
        assert capsys.readouterr().err == said


def test_a_stop_string(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    whole = text_of(engine, "ab", 9, temperature=20.0, seed=3)
    arguments = ["run", str(engine.folder), "--prompt", "ab", "--max-new-tokens", "9", "--temperature", "20", "--seed", "3"]
    assert len(whole) > 3
    assert main([*arguments, "--stop", whole[2:4], "--stop", "\u2603"]) == 0
    captured = capsys.readouterr()
    assert captured.out == whole[: whole.index(whole[2:4])] + "\n"
    assert "cut" not in captured.err
    assert main([*arguments, "--stop", ""]) == 2


def test_a_prompt_on_stdin(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for content, prompt in ((b"ab\xe4\xb8\x96\n", "ab\u4e16"), (b"a\n\nb\r\n", "a\n\nb"), (b"ab", "ab")):
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        assert main(["run", str(engine.folder), "--prompt", "-", "--json", "--max-new-tokens", "3"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == engine.generate(prompt, 3).tokens
    for content, said in ((b"", "prompt 0 is empty"), (b"\xff", "stdin is no UTF-8 text")):
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        assert main(["run", str(engine.folder), "--prompt", "-"]) == 2
        assert said in capsys.readouterr().err
    assert main(["run", str(engine.folder), "--prompt", "-", "--prompt", "-"]) == 2
    assert "can be read once" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--json"], ["--prompt", "b"]])
def test_show_load_is_for_one_text(engine: Engine, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(engine.folder), "--prompt", "a", "--show-load", *more]) == 2
    assert "--show-load shows the text of one prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--sample", "--greedy"], ["--temperature", "x"], ["--min-p"], ["--repetition-penalty", "much"]]
)
def test_options_that_are_refused(engine: Engine, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", str(engine.folder), "--prompt", "a", *options])
    assert caught.value.code == 2


def test_sampling_options(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sample", "--top-k", "4", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "5", "--seed", "1"]
    assert main(["run", str(engine.folder), "--prompt", "ab", "--json", "--max-new-tokens", "9", *options]) == 0
    wanted = engine.generate("ab", 9, do_sample=True, top_k=4, top_p=0.9, min_p=0.01, repetition_penalty=5.0, seed=1)
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tokens
    assert main(["run", str(engine.folder), "--prompt", "ab", "--greedy", "--temperature", "1"]) == 2
    assert "do_sample is False and temperature is 1.0" in capsys.readouterr().err


# --- colours ---


def piece(load: float, share: float | None, text: str = "x") -> TokenPiece:
    return TokenPiece(1, text, 1.0, 1.0, load, share)


def test_colours_follow_load_and_share() -> None:
    loads = [-3.0, -0.5, 0.5, 1.5, 2.5, float("inf")]
    assert len({painted(piece(load, 0.5)) for load in loads}) == len(loads)
    assert [painted(piece(0.5, share)) for share in (0.1, 0.5, 0.9, None)] == [
        "\x1b[2;32mx\x1b[0m",
        "\x1b[32mx\x1b[0m",
        "\x1b[1;32mx\x1b[0m",
        "\x1b[32mx\x1b[0m",
    ]
    assert painted(piece(0.5, 0.5, "")) == ""
    # Every colour is explained, also without it.
    used = {re.findall(r"\d+", painted(piece(load, 0.5)))[0] for load in loads}
    assert used == set(re.findall(r"\x1b\[(\d\d)m", legend(True)))
    assert not ESCAPE.search(legend(False)) and "blue below -1" in legend(False) and "magenta dense" in legend(False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_where_colours_are(environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out, err = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert (colours(out), colours(err)) == (coloured, False)
    for show_load in (True, False):
        output = TokenOutput(show_load=show_load, quiet=False)
        output.begin()
        output.write([piece(0.5, 0.5), piece(-2.0, 0.2, "y")])
        output.loads()
    first, second = ESCAPE.sub("", out.getvalue()).splitlines()
    assert first == second == "xy"
    assert bool(ESCAPE.search(out.getvalue().splitlines()[0])) == coloured
    assert not ESCAPE.search(out.getvalue().splitlines()[1])
    assert ("load: blue below -1" in err.getvalue()) == coloured
    assert err.getvalue().count("load -2.00 to +0.50, mean -0.75; active share 20.0% to 50.0%, mean 35.0%") == 1


# --- chat ---


def chat(
    engine: Engine, said: bytes, more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", Stdin(said))
    code = main(["chat", str(engine.folder), *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_conversation_on_a_pipe(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a turn; the model sees what was said before, its own messages and the system's among it."""
    more = ["--system", "b", "--max-new-tokens", "4"]
    code, out, err = chat(engine, "a\n\n  \n\u4e16\r\nab".encode(), more, capsys, monkeypatch)
    assert code == 0 and "> " not in err
    messages, wanted = [{"role": "system", "content": "b"}], ""
    for line in ("a", "\u4e16", "ab"):
        messages.append({"role": "user", "content": line})
        made = engine.chat(messages, 4)
        assert made.texts is not None
        messages.append({"role": "assistant", "content": made.texts[0]})
        wanted += made.texts[0] + "\n"
    assert out == wanted
    assert engine.chat(messages[:1] + messages[3:4], 4).texts != [messages[4]["content"]], "history makes no difference here"
    assert "cut at 4 tokens" in err
    assert chat(engine, b"a\n", [*more, "--quiet"], capsys, monkeypatch)[2] == ""
    assert chat(engine, b"", [], capsys, monkeypatch) == (0, "", "")


def test_errors_of_a_conversation(engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for said, more, wanted in (
        (b"a\n\xff\n", [], "stdin: line 2 is no UTF-8 text"),
        (b"a" * 30 + b"\n", [], "30 tokens, and the model takes at most 24"),
        (b"a\n", ["--system", "\udcff"], "--system is no UTF-8 text"),
        (b"a\n", ["--top-k", "-1"], "top_k is -1"),
    ):
        code, _, err = chat(engine, said, ["--max-new-tokens", "2", *more], capsys, monkeypatch)
        assert code == 2 and wanted in err


def test_a_conversation_on_a_terminal(engine: Engine) -> None:
    """It asks for lines, tells what is wrong with one and goes on, and Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "clada_export.cli", "chat", str(engine.folder), "--max-new-tokens", "2", "--quiet"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    os.write(ours, b"a\n" + b"a" * 30 + b"\n" + b"b\n")
    time.sleep(0.1)
    os.write(ours, b"\x04")
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, err
    first = engine.chat([{"role": "user", "content": "a"}], 2)
    assert first.texts is not None
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": first.texts[0]},
        {"role": "user", "content": "b"},
    ]
    second = engine.chat(messages, 2)
    assert second.texts is not None
    assert out.decode() == f"{first.texts[0]}\n{second.texts[0]}\n"
    assert err.count(b"> ") == 4 and b"this turn is forgotten" in err


def test_the_start_imports_nothing_for_commands() -> None:
    names = ("numpy", "statistics", "onnxruntime", "tokenizers", "readline")
    code = f"import sys, clada_export.cli; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
