"""The pool: who is given which window, workers that die or differ, and that the parts are those of one process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import clada_export.workers.pool as module
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, calibrate
from clada_export.calibration.text import CalibrationData
from clada_export.calibration.weights import FFNWeights
from clada_export.calibration.windows import Desk, InProcess, Job, Runner
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.methods import PolicySettings, get_policy
from clada_export.methods.static import WeightPruning
from clada_export.plan.goal import Budget
from clada_export.source.load import load_source
from clada_export.targets.registry import TARGETS
from clada_export.workers.pool import WorkerPool
from clada_export.workers.session import WorkerOptions
from clada_export.workers.start import Runners, calibrating, parse_pool
from clada_export.workers.worker import CalibrationWorker, Order
from tests.tiny_models import tiny_model

WINDOWS = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))
ORDER = Order("model", {}, "float32", "ort", WINDOWS, WINDOWS, 4, 1)


class DiedError(Exception):
    """What the pretended Ray says of a worker that died."""


@dataclass
class Pretended:
    """A session without Ray: a call runs when its turn comes; `script` says which calls die.

    Attributes:
        log: what was called: (number of the actor, name of the method, window or None).
    """

    script: Callable[[int, str, int | None], bool] = lambda actor, name, window: False
    opened: Callable[[int], Any] = lambda actor: {}
    log: list[tuple[int, str, int | None]] = field(default_factory=list)
    actors: int = 0
    processors: float = 4.0

    def __enter__(self) -> Pretended:
        self.ray = SimpleNamespace(
            put=lambda value: value, nodes=lambda: [{"Alive": True, "Resources": {"CPU": self.processors}}]
        )
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def actor(self, kind: type, threads: int) -> Any:
        return SimpleNamespace(remote=lambda order: self._actor())

    def _actor(self) -> Any:
        number = self.actors
        self.actors += 1

        def method(name: str) -> Any:
            def remote(*given: Any) -> tuple[int, ...]:
                window = given[-1] if given else None
                reference = (len(self.log), number)
                self.log.append((number, name, window))
                return reference

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(open=method("open"), measure=method("measure"), number=number)

    def kill(self, actor: Any) -> None:
        pass

    def lost(self, result: Any) -> bool:
        return isinstance(result, DiedError)

    def finished(self, calls: dict[Any, Any]) -> list[tuple[Any, Any]]:
        # The oldest call of each actor in turn: all are equally fast.
        reference = min(calls)
        actor, name, window = self.log[reference[0]]
        call = calls.pop(reference)
        if self.script(actor, name, window):
            return [(call, DiedError("killed"))]
        if name == "open":
            return [(call, self.opened(actor))]
        return [(call, f"part {window}")]


@pytest.fixture
def desk() -> Desk:
    decoder = TorchDecoder(tiny_model("llama"))
    return Desk(decoder, WINDOWS, WINDOWS, 4, FFNWeights(decoder, WINDOWS))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Pretended, list[str]]]:
    """Puts a pretended session in Ray's place; gives it, and what the pool will tell."""

    def make(**given: Any) -> tuple[Pretended, list[str]]:
        same = {"identity": {"torch": "1", "weights": "ab"}, "host": "there", "instructions": module.instructions()}
        session = Pretended(**{"opened": lambda actor: same, **given})
        monkeypatch.setattr(module, "RaySession", lambda *arguments: session)
        monkeypatch.setattr(module, "identity", lambda decoder: {"torch": "1", "weights": "ab"})
        return session, []

    return make


class Nothing:
    """A job for the pretended session, which never opens it."""

    def open(self, desk: Desk) -> Callable[[int], str]:
        return str


def parts(pool: WorkerPool, desk: Desk, windows: Sequence[int]) -> list[Any]:
    return list(pool.runner(desk).run(Nothing(), windows))


def test_parts_come_in_order_and_windows_stay_with_their_worker(pretend: Any, desk: Desk) -> None:
    session, told = pretend()
    with WorkerPool(ORDER, WorkerOptions(2), told.append) as pool:
        for _ in range(3):
            assert parts(pool, desk, range(4)) == [f"part {window}" for window in range(4)]
    owners: dict[int, set[int]] = {}
    for actor, name, window in session.log:
        if name == "measure":
            owners.setdefault(window, set()).add(actor)
    assert all(len(actors) == 1 for actors in owners.values())
    assert sorted(len([w for w in owners if owners[w] == {actor}]) for actor in range(2)) == [2, 2]
    assert told == []


def test_one_that_comes_late_takes_its_share(pretend: Any, desk: Desk) -> None:
    """A worker without windows of its own takes the last of the busiest."""
    session, told = pretend()
    with WorkerPool(ORDER, WorkerOptions(1), told.append) as pool:
        parts(pool, desk, range(4))
        pool._start()
        parts(pool, desk, range(4))
        session.log.clear()
        parts(pool, desk, range(4))
    assert sorted((actor, window) for actor, _, window in session.log) == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_a_dead_workers_window_goes_to_another(pretend: Any, desk: Desk) -> None:
    session, told = pretend(script=lambda actor, name, window: name == "measure" and actor == 0 and window == 2)
    with WorkerPool(ORDER, WorkerOptions(2), told.append) as pool:
        assert parts(pool, desk, range(4)) == [f"part {window}" for window in range(4)]
        assert parts(pool, desk, range(4)) == [f"part {window}" for window in range(4)]
    assert told == ["a worker died at window 2; the window goes to another"] and session.actors == 3


def test_a_window_that_kills_every_worker_is_an_error(pretend: Any, desk: Desk) -> None:
    _, told = pretend(script=lambda actor, name, window: window == 1)
    with (
        WorkerPool(ORDER, WorkerOptions(2, retries=1), told.append) as pool,
        pytest.raises(BackendError, match=r"window 1: its worker died 2 times.*fewer --calibration-workers"),
    ):
        parts(pool, desk, range(4))
    assert len(told) == 1


def test_workers_that_die_while_they_open_the_model(pretend: Any, desk: Desk) -> None:
    _, told = pretend(script=lambda actor, name, window: name == "open" and actor != 0)
    with WorkerPool(ORDER, WorkerOptions(2, retries=1), told.append) as pool:
        assert len(parts(pool, desk, range(6))) == 6
    assert "another is started (attempt 2)" in told[0] and "go on without it" in told[1]
    pretend(script=lambda actor, name, window: name == "open")
    with (
        WorkerPool(ORDER, WorkerOptions(1, retries=1), told.append) as pool,
        pytest.raises(BackendError, match="died 2 times while it opened the model"),
    ):
        parts(pool, desk, range(2))


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [("weights", UsageError, "there has another model than this process: cd, here ab"),
     ("torch", BackendError, "there has another version of torch than this process: cd, here 1")],
)  # fmt: skip
def test_workers_that_differ_are_refused(pretend: Any, desk: Desk, name: str, kind: type[CladaError], said: str) -> None:
    other = {"torch": "1", "weights": "ab", name: "cd"}
    pretend(opened=lambda actor: {"identity": other, "host": "there", "instructions": ""})
    with WorkerPool(ORDER, WorkerOptions(1), print) as pool, pytest.raises(kind, match=said):
        parts(pool, desk, [0])


def test_other_instructions_are_told(pretend: Any, desk: Desk) -> None:
    same = {"torch": "1", "weights": "ab"}
    _, told = pretend(opened=lambda actor: {"identity": same, "host": "there", "instructions": "ABACUS"})
    with WorkerPool(ORDER, WorkerOptions(1), told.append) as pool:
        parts(pool, desk, [0])
    assert "a worker on there computes with ABACUS" in told[0]


def test_a_cluster_without_room_is_refused(pretend: Any) -> None:
    pretend(processors=2.0)
    with pytest.raises(BackendError, match="no machine of the Ray cluster has 3 CPUs for a worker; the largest has 2"):
        WorkerPool(ORDER, WorkerOptions(1, threads=3), print).__enter__()


def test_an_error_of_a_window_comes_when_its_turn_does(pretend: Any, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = pretend()
    real = Pretended.finished

    def finished(self: Pretended, calls: dict[Any, Any]) -> list[tuple[Any, Any]]:
        found = real(self, calls)
        return [(call, UsageError("too long") if result == "part 1" else result) for call, result in found]

    monkeypatch.setattr(Pretended, "finished", finished)
    with WorkerPool(ORDER, WorkerOptions(2), told.append) as pool:
        seen = pool.runner(desk).run(Nothing(), range(4))
        assert next(seen) == "part 0"
        with pytest.raises(UsageError, match="too long"):
            next(seen)


def test_pruning_that_gives_other_weights_is_refused(model_folder: Callable[[str], Path]) -> None:
    worker = CalibrationWorker(replace(ORDER, model=str(model_folder("llama"))))
    opened = worker.open()
    same = module.Task(1, Nothing(), opened["identity"]["weights"])
    worker.take(same)
    assert worker.measure(3) == "3" and worker.holds(1)
    with pytest.raises(UsageError, match="has other weights after pruning"):
        worker.take(module.Task(2, Nothing(), "ab", WeightPruning.parse("wanda=0.5")))
    assert not worker.holds(2)


@pytest.mark.parametrize(
    ("given", "said"),
    [((-1, None, None), "--calibration-workers -1 is out of range"), ((2, 0, None), "--calibration-threads 0 is out of range"),
     ((0, None, "head:6379"), "--ray-address head:6379 needs --calibration-workers N")],
)  # fmt: skip
def test_numbers_out_of_range(given: tuple[int, int | None, str | None], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_pool(*given)


def test_without_ray_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert parse_pool(0, 1, None) is None
    with pytest.raises(BackendError, match=r"pip install 'clada-export\[sweep\]' \(or leave --calibration-workers"):
        parse_pool(2, None, None)


# --- on Ray ---


class Deadly:
    """A runner that kills a worker, while it measures a window, when some parts of another have come back."""

    def __init__(self, inner: Runner, after: int) -> None:
        self.inner, self.left = inner, after
        self.over = threading.Event()

    @property
    def desk(self) -> Desk:
        return self.inner.desk

    def run(self, job: Job[Any], windows: Sequence[int]) -> Iterator[Any]:
        for part in self.inner.run(job, windows):
            self.left -= 1
            if self.left == 0:
                threading.Thread(target=self._kill, daemon=True).start()
            yield part

    def _kill(self) -> None:
        import psutil

        while not self.over.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    # Ray names a worker after the call that it is in.
                    if "ray::CalibrationActor.measure" in " ".join(process.cmdline()):
                        process.kill()
                        return
                except psutil.Error:
                    continue
            time.sleep(0.002)


def without_seconds(value: Any) -> Any:
    """A plan's values, but for how long pruning took."""
    if isinstance(value, dict):
        return {name: without_seconds(item) for name, item in value.items() if name != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_a_plan_is_the_same_to_the_bit(ray: Any, model_folder: Callable[[str], Path]) -> None:
    """Two workers, of which one is killed in the middle, against one process with as many threads."""
    pytest.importorskip("psutil", reason="psutil is not installed")
    windows = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    data = CalibrationData(windows[:4], windows[4:], "text", "ab")
    told: list[str] = []
    shown: list[str] = []
    deadly: list[Deadly] = []

    def runner(runners: Runners, desk: Desk) -> Runner:
        desk.at_once = 1
        found = runners(desk)
        if isinstance(found, InProcess):
            return found
        deadly.append(Deadly(found, after=7))
        return deadly[0]

    def plan(workers: int) -> CalibrationResult:
        source = load_source(str(model_folder("llama")))
        pool = parse_pool(workers, 1, None)
        settings: dict[str, Any] = {"dtype": "bfloat16", "target": "ort", "hub": {}, "prompt": 16}
        TARGETS["ort"].round_weights(source.decoder, "bfloat16")
        with calibrating(
            source, data, pool, threads=1, **settings, progress=lambda what, *_: shown.append(what), tell=told.append
        ) as runners:
            return calibrate(
                source.decoder,
                get_policy("clada", PolicySettings()),
                data,
                {"weights_digest": source.weights_digest},
                CalibrationOptions(budget=Budget.parse("kl=0.05"), prune=WeightPruning.parse("wanda=0.2")),
                runner=lambda desk: runner(runners, desk),
            )

    try:
        alone, shared = plan(0), plan(2)
    finally:
        for item in deadly:
            item.over.set()
    assert len(told) == 1 and told[0].startswith("a worker died at window")
    assert "1 of 2 workers have the model" in shown
    assert without_seconds(shared.plan.to_dict()) == without_seconds(alone.plan.to_dict())
    assert all(np.array_equal(getattr(shared.drift, name), getattr(alone.drift, name)) for name in ("nll", "kl", "window"))
