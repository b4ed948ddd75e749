"""The pool: who is given which window, workers that die or differ, and that the parts are those of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clada_export.workers.pool as module
from clada_export.calibration.weights import FFNWeights
from clada_export.calibration.windows import Desk, InProcess
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.methods.static import WeightPruning
from clada_export.workers.pool import PoolOptions, WorkerPool
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
    with WorkerPool(ORDER, PoolOptions(2), told.append) as pool:
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
    with WorkerPool(ORDER, PoolOptions(1), told.append) as pool:
        parts(pool, desk, range(4))
        pool._start()
        parts(pool, desk, range(4))
        session.log.clear()
        parts(pool, desk, range(4))
    assert sorted((actor, window) for actor, _, window in session.log) == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_a_dead_workers_window_goes_to_another(pretend: Any, desk: Desk) -> None:
    session, told = pretend(script=lambda actor, name, window: name == "measure" and actor == 0 and window == 2)
    with WorkerPool(ORDER, PoolOptions(2), told.append) as pool:
        assert parts(pool, desk, range(4)) == [f"part {window}" for window in range(4)]
        assert parts(pool, desk, range(4)) == [f"part {window}" for window in range(4)]
    assert told == ["a worker died at window 2; the window goes to another"] and session.actors == 3


def test_a_window_that_kills_every_worker_is_an_error(pretend: Any, desk: Desk) -> None:
    _, told = pretend(script=lambda actor, name, window: window == 1)
    with (
        WorkerPool(ORDER, PoolOptions(2, retries=1), told.append) as pool,
        pytest.raises(BackendError, match=r"window 1: its worker died 2 times.*fewer --calibration-workers"),
    ):
        parts(pool, desk, range(4))
    assert len(told) == 1


def test_workers_that_die_while_they_open_the_model(pretend: Any, desk: Desk) -> None:
    _, told = pretend(script=lambda actor, name, window: name == "open" and actor != 0)
    with WorkerPool(ORDER, PoolOptions(2, retries=1), told.append) as pool:
        assert len(parts(pool, desk, range(6))) == 6
    assert "another is started (attempt 2)" in told[0] and "go on without it" in told[1]
    pretend(script=lambda actor, name, window: name == "open")
    with (
        WorkerPool(ORDER, PoolOptions(1, retries=1), told.append) as pool,
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
    with WorkerPool(ORDER, PoolOptions(1), print) as pool, pytest.raises(kind, match=said):
        parts(pool, desk, [0])


def test_other_instructions_are_told(pretend: Any, desk: Desk) -> None:
    same = {"torch": "1", "weights": "ab"}
    _, told = pretend(opened=lambda actor: {"identity": same, "host": "there", "instructions": "ABACUS"})
    with WorkerPool(ORDER, PoolOptions(1), told.append) as pool:
        parts(pool, desk, [0])
    assert "a worker on there computes with ABACUS" in told[0]


def test_a_cluster_without_room_is_refused(pretend: Any) -> None:
    pretend(processors=2.0)
    with pytest.raises(BackendError, match="no machine of the Ray cluster has 3 CPUs for a worker; the largest has 2"):
        WorkerPool(replace(ORDER, threads=3), PoolOptions(1), print).__enter__()


def test_an_error_of_a_window_comes_when_its_turn_does(pretend: Any, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    _, told = pretend()
    real = Pretended.finished

    def finished(self: Pretended, calls: dict[Any, Any]) -> list[tuple[Any, Any]]:
        found = real(self, calls)
        return [(call, UsageError("too long") if result == "part 1" else result) for call, result in found]

    monkeypatch.setattr(Pretended, "finished", finished)
    with WorkerPool(ORDER, PoolOptions(2), told.append) as pool:
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


# --- on Ray ---


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two CPUs for all tests of this module: it takes seconds to start."""
    found = pytest.importorskip("ray", reason="ray is not installed")
    before = {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")}
    os.environ |= dict.fromkeys(before, "0")
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield found
    found.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)


def logits_job(folder: Path, kills: int) -> Any:
    """A job whose part is a window's logits, dense and under the weights as they are; one window kills its first worker.

    The class is made here, so that Ray sends it whole: workers do not find the tests.
    """

    class Logits:
        def open(self, desk: Desk) -> Callable[[int], torch.Tensor]:
            def measure(window: int) -> torch.Tensor:
                marker = folder / f"ran-{window}"
                if window == kills and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                with torch.inference_mode():
                    dense = desk.as_given(lambda: desk.decoder.logits(desk.heldout[window]))
                    return torch.stack((dense, desk.decoder.logits(desk.heldout[window])))

            return measure

    return Logits()


def test_a_killed_worker_changes_no_bit(ray: Any, model_folder: Callable[[str], Path], tmp_path: Path, desk: Desk) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told: list[str] = []
    try:
        with WorkerPool(replace(ORDER, model=str(model_folder("llama"))), PoolOptions(2), told.append) as pool:
            runner = pool.runner(desk)
            plain = list(runner.run(logits_job(tmp_path, kills=3), range(6)))
            assert desk.weights is not None
            desk.weights.use(WeightPruning.parse("wanda=0.5"))
            pruned = list(runner.run(logits_job(tmp_path, kills=4), range(6)))
            here = list(InProcess(desk).run(logits_job(tmp_path, kills=-1), range(6)))
            desk.weights.use(None)
            again = list(runner.run(logits_job(tmp_path, kills=-1), range(6)))
    finally:
        torch.set_num_threads(threads)
    assert told == [
        "a worker died at window 3; the window goes to another",
        "a worker died at window 4; the window goes to another",
    ]
    for first, second, third, fourth in zip(plain, pruned, here, again, strict=True):
        assert torch.equal(first[0], first[1]) and torch.equal(first, fourth)
        assert torch.equal(second, third) and torch.equal(second[0], first[0]) and not torch.equal(second[1], first[1])
