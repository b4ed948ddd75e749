"""Sweeps: cells, their folder, resuming, and workers that die."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clada_export.cli import main
from clada_export.errors import BackendError, UsageError
from clada_export.lab.sweep.cells import VALUES, Cell, Outcome, make_cells, worst
from clada_export.lab.sweep.command import pool_options
from clada_export.lab.sweep.picture import draw, table
from clada_export.lab.sweep.run import Listener, SweepResult, run_sweep
from clada_export.lab.sweep.worker import SweepJob, SweepWorker
from clada_export.workers.session import WorkerOptions

CELLS = make_cells("griffin,cats", "0.3,0.5")


class Heard(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.outcomes: list[Outcome] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def finished(self, outcome: Outcome, done: int, total: int) -> None:
        self.outcomes.append(outcome)


def values(**given: Any) -> dict[str, Any]:
    return {**dict.fromkeys(VALUES, 0.5), "variant": "plain", "allocation": "cett", **given}


class Counting:
    """A worker that measures nothing; it notes in a file what it was asked."""

    def __init__(self, notes: Path, weights: str = "ab", faults: dict[Cell, int] | None = None) -> None:
        self.notes, self.weights, self.faults = notes, weights, faults or {}

    def describe(self) -> dict[str, Any]:
        return {
            "identity": {"weights_digest": self.weights, "text_digest": "cd"},
            "about": {"model": "m"},
            "warnings": ["careful"],
        }

    def run(self, cell: Cell) -> Outcome:
        with self.notes.open("a") as stream:
            stream.write(f"{cell}\n")
        if self.faults.get(cell, 0) > 0:
            self.faults[cell] -= 1
            raise RuntimeError("by chance")
        return Outcome(cell, values(sparsity=cell.sparsity))


def sweep(path: Path, notes: Path, heard: Listener | None = None, **worker: Any) -> SweepResult:
    return run_sweep(SweepJob("m"), CELLS, path, worker=lambda: Counting(notes, **worker), listener=heard)


# --- cells ---


def test_cells_are_all_pairs_once() -> None:
    assert make_cells("griffin, tt,griffin", "0.3,.30") == (Cell("griffin", 0.3), Cell("tt", 0.3))
    assert len({cell.file_name for cell in CELLS}) == 4


@pytest.mark.parametrize(
    ("policies", "sparsities", "said"),
    [("magic", "0.5", "unknown policy 'magic'"), ("tt", "1.5", "out of range"), ("tt", "half", "'half' is not a number"),
     ("", "0.5", "unknown policy ''"), ("tt", "", "is not a number")],
)  # fmt: skip
def test_cells_that_are_none(policies: str, sparsities: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_cells(policies, sparsities)


def test_the_exit_code_is_that_of_the_worst_failure() -> None:
    cell = CELLS[0]
    done = Outcome(cell, values())
    wrong, lost, fault = (Outcome(cell, None, "why", code) for code in (2, 5, 1))
    assert worst([done]) == 0
    assert worst([done, wrong]) == 2
    assert worst([wrong, lost]) == 5
    assert worst([lost, fault, wrong]) == 1


# --- folder ---


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    first = sweep(tmp_path / "out", notes)
    assert first.exit_code == 0 and notes.read_text().count("\n") == 4
    (tmp_path / "out" / "cells" / CELLS[1].file_name).unlink()
    heard = Heard()
    second = sweep(tmp_path / "out", notes, heard)
    assert notes.read_text().splitlines()[4:] == [str(CELLS[1])]
    assert second.summary == first.summary and second.outcomes == first.outcomes
    assert len(heard.outcomes) == 4 and heard.warnings == ["careful"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == first.summary


def test_an_interrupted_sweep_keeps_what_it_has(tmp_path: Path) -> None:
    class Stops(Counting):
        def run(self, cell: Cell) -> Outcome:
            if cell == CELLS[2]:
                raise KeyboardInterrupt
            return super().run(cell)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(SweepJob("m"), CELLS, tmp_path / "out", worker=lambda: Stops(tmp_path / "notes"))
    sweep(tmp_path / "out", tmp_path / "notes")
    assert (tmp_path / "notes").read_text().splitlines() == [str(cell) for cell in CELLS]


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    sweep(tmp_path / "out", tmp_path / "notes")
    with pytest.raises(UsageError, match="another model: weights_digest is ab there and ef here"):
        sweep(tmp_path / "out", tmp_path / "notes", weights="ef")


@pytest.mark.parametrize("content", ['{"version": 0}', "[]", "{", '{"version": 1}'])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds no sweep\.json"):
        sweep(tmp_path / "out", tmp_path / "notes")
    (tmp_path / "out" / "sweep.json").write_text(content)
    with pytest.raises(UsageError, match=r"sweep\.json: not"):
        sweep(tmp_path / "out", tmp_path / "notes")
    with pytest.raises(UsageError, match="it is a file"):
        sweep(tmp_path / "out" / "thesis.txt", tmp_path / "notes")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": 1, "sweep": "other"}'])
def test_a_damaged_cell_is_measured_again(tmp_path: Path, content: str) -> None:
    first = sweep(tmp_path / "out", tmp_path / "notes")
    (tmp_path / "out" / "cells" / CELLS[0].file_name).write_text(content)
    heard = Heard()
    assert sweep(tmp_path / "out", tmp_path / "notes", heard).outcomes == first.outcomes
    assert any("can't be used" in text for text in heard.warnings)
    assert (tmp_path / "notes").read_text().splitlines()[4:] == [str(CELLS[0])]


def test_a_fault_ends_its_cell_and_is_tried_again_next_time(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes"
    result = sweep(out, notes, faults={CELLS[0]: 2, CELLS[1]: 9})
    assert [outcome.attempts for outcome in result.outcomes] == [3, 3, 1, 1]
    assert [outcome.done for outcome in result.outcomes] == [True, False, True, True]
    assert result.outcomes[1].reason == "RuntimeError: by chance" and result.exit_code == 1
    assert sweep(out, notes).exit_code == 0


# --- what it shows ---


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    outcomes = [Outcome(cell, values(kl=0.1 * index)) for index, cell in enumerate(CELLS[:3])]
    outcomes.append(Outcome(CELLS[3], None, "its worker died", 5))
    lines = table(outcomes).splitlines()
    assert len(lines) == 5 and lines[4].endswith("failed: its worker died") and "x0.500" in lines[1]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert draw(outcomes, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert draw(outcomes[3:], "nothing to show", tmp_path / "b.png")


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = sweep(tmp_path / "out", tmp_path / "notes")
    assert result.picture is None and not (tmp_path / "out" / "sweep.png").exists()


# --- the real worker ---


def test_a_worker_opens_the_model_once(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clada_export.lab.sweep.worker as module

    opened: list[str] = []
    real = module.load_source
    monkeypatch.setattr(module, "load_source", lambda model, **given: opened.append(model) or real(model, **given))
    worker = SweepWorker(SweepJob(str(model_folder("gpt2")), context=32, dtype="bfloat16"))
    described = worker.describe()
    assert described["identity"]["dtype"] == "bfloat16" and "random tokens" in " ".join(described["warnings"])
    found = worker.run(Cell("griffin", 0.5))
    assert found.values is not None and set(found.values) == set(VALUES)
    assert found.values["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert found.values["kl"] < found.values["kl_bound"] and 0 < found.values["relative_bytes"] < 1
    refused = worker.run(Cell("cats", 0.5))
    assert (refused.done, refused.exit_code) == (False, 2) and "reads the gate" in refused.reason
    assert len(opened) == 1


def test_from_the_command_line(model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "sweep",
        str(model_folder("gpt2")),
        "--policies",
        "griffin,cats",
        "--sparsities",
        "0.5",
        "-o",
        str(tmp_path / "out"),
    ]
    command += ["--workers", "0", "--calibration-context", "32", "--calibration-cache", str(tmp_path / "cache")]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert "failed: policy 'cats' reads the gate" in shown.out and "1 of 2 cells failed" in shown.err
    assert "[✓] 1/2 griffin at 0.5" in shown.err
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert main([*command, "--json", "--policies", "griffin"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["path"] == str(tmp_path / "out") and len(written["cells"]) == 1
    assert main([*command, "--seed", "1"]) == 2
    assert "holds a sweep with another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [({"workers": -1}, "--workers -1"), ({"threads": 0}, "--threads 0"), ({"retries": -1}, "--retries -1"),
     ({"workers": 0, "address": "somewhere"}, "leave --ray-address out")],
)  # fmt: skip
def test_numbers_out_of_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pool_options(**{"address": None, "workers": None, "threads": None, "retries": 2, "cells": 4, **given})


def test_without_ray_cells_run_here_and_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pool_options(None, None, None, 2, 4) is None
    assert pool_options(None, 1, None, 2, 4) is None
    for given in ({"workers": 2, "address": None}, {"workers": None, "address": "ray://head"}):
        with pytest.raises(BackendError, match=r"clada-export\[sweep\]"):
            pool_options(threads=None, retries=2, cells=4, **given)  # type: ignore[arg-type]


# --- on Ray ---


def deadly(folder: Path, opening: int = 0, weights: str = "ab", pause: float = 0.0) -> Callable[[], Any]:
    """Makes workers that kill themselves: in the first `opening` openings, in one cell always, in another once.

    All that the class needs is made here, so that Ray sends it whole: workers do not find the tests.
    """
    always, once, fault = CELLS[:3]
    some = values()

    class Deadly:
        def describe(self) -> dict[str, Any]:
            number = len(list(folder.glob("opened-*")))
            (folder / f"opened-{number}-{os.getpid()}").touch()
            if number < opening:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"identity": {"weights_digest": weights or str(os.getpid())}, "about": {}, "warnings": []}

        def run(self, cell: Cell) -> Outcome:
            time.sleep(pause)
            marker = folder / f"ran-{cell}"
            again = marker.exists()
            marker.touch()
            if cell == always or (cell == once and not again):
                os.kill(os.getpid(), signal.SIGKILL)
            if cell == fault and not again:
                raise RuntimeError("by chance")
            return Outcome(cell, some)

    return Deadly


def test_killed_workers_are_replaced_and_their_cells_tried_again(ray: Any, tmp_path: Path) -> None:
    heard = Heard()
    cells = (*CELLS, *make_cells("tt", "0.1,0.2,0.3,0.4"))
    pool = WorkerOptions(workers=2, retries=2)
    result = run_sweep(SweepJob("m"), cells, tmp_path / "out", pool=pool, listener=heard, worker=deadly(tmp_path))
    assert [outcome.done for outcome in result.outcomes] == [False, *[True] * 7]
    assert [outcome.attempts for outcome in result.outcomes] == [3, 2, 2, *[1] * 5]
    assert result.outcomes[0].reason.startswith("its worker died 3 times") and result.exit_code == 5
    assert len(heard.outcomes) == 8
    told = " ".join(heard.warnings)
    assert f"{CELLS[1]}: its worker died; it is tried again (attempt 2 of 3)" in told and "by chance" in told
    # One opening for each worker: two at first, and one for each of the four that were killed with cells left to run.
    assert len(list(tmp_path.glob("opened-*"))) <= 6
    kept = json.loads((tmp_path / "out" / "cells" / CELLS[0].file_name).read_text())
    assert kept["values"] is None and kept["exit_code"] == 5
    assert ray.is_initialized()


def test_a_worker_that_dies_while_it_opens_the_model(ray: Any, tmp_path: Path) -> None:
    heard = Heard()
    pool = WorkerOptions(workers=1, retries=1)
    with pytest.raises(BackendError, match="died 2 times while it opened the model"):
        run_sweep(SweepJob("m"), CELLS[3:], tmp_path / "out", pool=pool, listener=heard, worker=deadly(tmp_path, opening=9))
    assert "another is started" in heard.warnings[0]
    for marker in tmp_path.glob("opened-*"):
        marker.unlink()
    result = run_sweep(SweepJob("m"), CELLS[3:], tmp_path / "out", pool=pool, worker=deadly(tmp_path, opening=1))
    assert result.exit_code == 0


def test_workers_that_find_different_models_are_refused(ray: Any, tmp_path: Path) -> None:
    cells = make_cells("tt", ",".join(f"0.{number}" for number in range(1, 10)))
    make = deadly(tmp_path, weights="", pause=3.0)
    with pytest.raises(UsageError, match="finds another model or text than the first: its weights_digest"):
        run_sweep(SweepJob("m"), cells, tmp_path / "out", pool=WorkerOptions(workers=2), worker=make)


@pytest.mark.long
def test_a_model_that_cannot_be_opened_is_a_plain_error(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_sweep(SweepJob(str(tmp_path / "nowhere.gguf")), CELLS, tmp_path / "out", pool=WorkerOptions())
    assert "nowhere.gguf" in str(caught.value) and "Traceback" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_real_sweep_survives_the_kill_of_a_worker(ray: Any, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A worker with a model is killed from outside, while it runs a cell."""
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while not killed and not over.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    # Ray names a worker after the call that it is in.
                    if "SweepActor.run" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.01)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    heard = Heard()
    job = SweepJob(str(model_folder("llama")), context=256)
    try:
        result = run_sweep(job, CELLS, tmp_path / "out", pool=WorkerOptions(workers=1), listener=heard)
    finally:
        over.set()
        hunter.join()
    assert killed, "no worker was seen in a cell"
    assert result.exit_code == 0
    assert sorted(outcome.attempts for outcome in result.outcomes) == [1, 1, 1, 2]
    assert any("its worker died; it is tried again" in text for text in heard.warnings)
    alone = SweepWorker(job).run(CELLS[0])
    assert alone.values is not None and result.outcomes[0].values is not None
    assert result.outcomes[0].values["kl"] == pytest.approx(alone.values["kl"], rel=1e-3)
