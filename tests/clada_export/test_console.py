"""What the command line says while a stage goes on."""

from __future__ import annotations

import io

import pytest

from clada_export import console
from clada_export.console import ConsoleProgress, StageLine
from clada_export.progress import Remaining


def test_what_is_left_follows_from_the_pace_of_one_count() -> None:
    remaining = Remaining()
    assert remaining.left(0, 10, 100.0) is None
    assert remaining.left(1, 10, 101.0) is None, "too soon to say"
    assert remaining.left(4, 10, 108.0) == pytest.approx(12.0)
    # An estimate of the whole that shrinks is no new count.
    assert remaining.left(8, 9, 116.0) == pytest.approx(2.0)
    # A count that begins anew has a pace of its own.
    assert remaining.left(1, 100, 120.0) is None
    assert remaining.left(3, 100, 124.0) == pytest.approx(97 * 2.0)
    assert remaining.left(4, 0, 130.0) is None


def test_a_line_says_how_long_it_took_and_what_is_left_and_moves_on_between_steps() -> None:
    line = StageLine("calibrate", 10.0)
    assert line.text(13.0) == "calibrate 3 s"
    line.step("statistics", 0, 11, 13.0)
    line.step("statistics", 3, 11, 43.0)
    assert line.text(43.0) == "calibrate 33 s: statistics 3/11, about 80 s left"
    assert line.text(50.0) == "calibrate 40 s: statistics 3/11, about 73 s left"
    assert line.text(500.0).endswith("about 0 s left")
    line.step("policy clada", 0, 0, 500.0)
    assert line.text(500.0) == "calibrate 490 s: policy clada"


def test_on_a_pipe_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    progress.begin("calibrate")
    for done in range(26):
        now[0] = float(done)
        progress.step("calibrate", "windows", done, 30)
    progress.end("calibrate", 25.0, "[done]")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "calibrate 10 s: windows 10/30, about 20 s left",
        "calibrate 20 s: windows 20/30, about 10 s left",
        "[✓] calibrate             25.0 s  [done]",
    ]


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream, quiet=True)
    progress.begin("calibrate")
    progress.step("calibrate", "windows", 1, 2)
    progress.end("calibrate", 1.0, "")
    assert stream.getvalue() == ""
