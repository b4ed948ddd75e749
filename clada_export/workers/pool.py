"""Run calibration's jobs on Ray: a queue of windows, and workers that each hold the model and take the next window.

Workers are actors. One that dies (killed, out of memory, its machine gone) is replaced by a new one, and its window goes back
into the queue. A window goes to the worker that had it before, who has its dense side; only one with nothing left of its own
takes another's. Parts are handed on in the order of the windows, so that it does not matter who computed them, or how often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from clada_export.calibration.context import Progress
from clada_export.calibration.windows import Desk, Job, Part
from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.plan.tensors import LayerTensors, tensors_digest
from clada_export.workers.session import RaySession, WorkerOptions, in_short
from clada_export.workers.worker import CalibrationWorker, Order, Task, identity, instructions

INSTEAD = "or leave --calibration-workers and --ray-address out: the windows then run in this process, one after the other"


@dataclass(eq=False)
class _Hand:
    """A worker: its actor, and how often it was started before it had opened the model."""

    actor: Any
    opening: int = 1


@dataclass(eq=False)
class _Round:
    """A job over some windows. `waiting` are places in `windows`; `parts` holds what came back (or was raised), by place."""

    number: int
    task: Any
    windows: Sequence[int]
    waiting: list[int]
    parts: dict[int, Any] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Call:
    """What a worker is at: a place of a round, or (None) opening the model."""

    hand: _Hand
    round: _Round | None = None
    place: int = -1


class WorkerPool:
    """Workers on Ray; a context manager. `runner` makes the `Runner` of a desk.

    Args:
        order: what the workers are told.
        tell: told about workers that died or differ.
        progress: told how many workers have the model.

    Raises:
        BackendError: Ray is missing, can't be reached, or has no machine for a worker.
    """

    def __init__(
        self,
        order: Order,
        options: WorkerOptions,
        tell: Callable[[str], None],
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self._order, self._options, self._tell, self._progress = order, options, tell, progress
        self._session = RaySession(options.address, options.workers * options.threads, INSTEAD)
        self._pending: dict[Any, _Call] = {}
        self._idle: list[_Hand] = []
        self._owner: dict[int, _Hand] = {}
        self._opened = 0
        self._given = 0
        self._identity: dict[str, str] = {}

    def __enter__(self) -> WorkerPool:
        self._session.__enter__()
        try:
            self._require_place()
            self._actor = self._session.actor(_actor_class(), self._options.threads)
            for _ in range(self._options.workers):
                self._start()
        except BaseException as error:
            self._session.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hand in {call.hand for call in self._pending.values()} | set(self._idle):
            self._session.kill(hand.actor)
        self._pending.clear()
        self._idle.clear()
        self._session.__exit__(kind, error, trace)

    def runner(self, desk: Desk) -> WorkerRunner:
        """What runs the jobs of a process with this desk, whose weights are as they were given; its groups of held-out windows
        are those of the workers.

        Workers whose code, packages or weights are not those of the desk are refused when they have opened the model.
        """
        self._identity = identity(desk.decoder)
        desk.at_once = self._order.at_once
        return WorkerRunner(self, desk)

    def run(self, job: Job[Part], windows: Sequence[int], state: _State) -> Iterator[Part]:
        """The parts of the windows, in their order; see `Runner.run`.

        Raises:
            BackendError: a window's workers died again and again, or workers with other versions.
            UsageError: workers with other weights.
        """
        self._given += 1
        task = Task(self._given, job, state.digest, state.pruning, state.adapters)
        current = _Round(task.number, self._session.ray.put(task), windows, list(range(len(windows))))
        try:
            for place in range(len(windows)):
                while place not in current.parts:
                    self._give_out(current)
                    for call, result in self._session.finished(self._pending):
                        self._take(call, result)
                part = current.parts.pop(place)
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            # What is still under way for it comes back to nobody.
            current.waiting.clear()

    def _require_place(self) -> None:
        """Refuse a cluster on which no worker would ever start."""
        threads, ray = self._options.threads, self._session.ray
        largest = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if largest < threads:
            raise BackendError(
                f"no machine of the Ray cluster has {threads} CPUs for a worker; the largest has {largest:g}. Give fewer "
                "--calibration-threads"
            )

    def _start(self, opening: int = 1) -> None:
        hand = _Hand(self._actor.remote(self._order), opening)
        self._pending[hand.actor.open.remote()] = _Call(hand)

    def _give_out(self, current: _Round) -> None:
        for hand in list(self._idle):
            if not current.waiting:
                return
            place = self._choose(hand, current)
            current.waiting.remove(place)
            self._idle.remove(hand)
            self._owner[current.windows[place]] = hand
            # In a list, so that Ray does not send the task along with every call.
            call = hand.actor.measure.remote(current.number, [current.task], current.windows[place])
            self._pending[call] = _Call(hand, current, place)

    def _choose(self, hand: _Hand, current: _Round) -> int:
        """The place that a worker is best given: a window of its own, else one of nobody's, else the last of the worker that
        has the most waiting."""
        owners = {place: self._owner.get(current.windows[place]) for place in current.waiting}
        for wanted in (hand, None):
            found = [place for place, owner in owners.items() if owner is wanted]
            if found:
                return found[0]
        busiest = Counter(owners.values()).most_common(1)[0][0]
        return [place for place, owner in owners.items() if owner is busiest][-1]

    def _take(self, call: _Call, result: Any) -> None:
        if call.round is None:
            self._take_opened(call.hand, result)
        elif self._session.lost(result):
            self._replace(call.hand)
            self._lose(call.round, call.place, result)
        else:
            call.round.parts[call.place] = result
            self._idle.append(call.hand)

    def _lose(self, lost: _Round, place: int, error: BaseException) -> None:
        window, deaths = lost.windows[place], lost.deaths
        deaths[place] += 1
        if deaths[place] <= self._options.retries:
            self._tell(f"a worker died at window {window}; the window goes to another")
            lost.waiting.insert(0, place)
            return
        lost.parts[place] = BackendError(
            f"window {window}: its worker died {deaths[place]} times (killed, out of memory, or its machine is gone): "
            f"{in_short(error)}. Each worker holds the whole model, so give fewer --calibration-workers"
        )

    def _replace(self, hand: _Hand) -> None:
        self._opened -= 1
        self._session.kill(hand.actor)
        self._owner = {window: owner for window, owner in self._owner.items() if owner is not hand}
        self._start()

    def _take_opened(self, hand: _Hand, result: Any) -> None:
        if self._session.lost(result):
            self._session.kill(hand.actor)
            if hand.opening <= self._options.retries:
                self._tell(f"a worker died while it opened the model; another is started (attempt {hand.opening + 1})")
                self._start(hand.opening + 1)
                return
            died = f"a worker died {hand.opening} times while it opened the model: {in_short(result)}. If it was killed: each "
            died += "worker holds the whole model, so give fewer --calibration-workers"
            if not self._idle and not self._pending:
                raise BackendError(died) from result
            self._tell(f"{died}. The others go on without it")
            return
        if isinstance(result, CladaError):
            raise type(result)(f"a worker can't open the model that this process has: {result}") from result
        if isinstance(result, BaseException):
            raise result
        self._require_same(result["identity"], result["host"])
        if result["instructions"] != instructions():
            self._tell(
                f"a worker on {result['host']} computes with {result['instructions']}, this process with {instructions()}: "
                "which of them measures a window may show in the last digits"
            )
        self._opened += 1
        self._progress(f"{self._opened} of {self._options.workers} workers have the model", 0, 0)
        self._idle.append(hand)

    def _require_same(self, found: Mapping[str, str], host: str) -> None:
        for name, wanted in self._identity.items():
            if found.get(name) == wanted:
                continue
            differs = f"a worker on {host} has another {{}} than this process: {found.get(name)!s:.16}, here {wanted:.16}"
            if name == "weights":
                raise UsageError(f"{differs.format('model')}; the path must lead to the same files on all machines")
            what = "version of clada-export's code" if name == "code" else f"version of {name}"
            raise BackendError(f"{differs.format(what)}; install the same on all machines")


@dataclass(frozen=True)
class _State:
    """Of the weights that a job is for."""

    digest: str
    pruning: Any = None
    adapters: Mapping[str, LayerTensors] = field(default_factory=dict)


class WorkerRunner:
    """Runs the jobs of one process on a pool; a `clada_export.calibration.windows.Runner`."""

    def __init__(self, pool: WorkerPool, desk: Desk) -> None:
        self.desk = desk
        self._pool = pool
        self._digests: dict[tuple[str, str], str] = {}

    def run(self, job: Job[Part], windows: Sequence[int]) -> Iterator[Part]:
        """See `Runner.run`."""
        return self._pool.run(job, windows, self._state())

    def _state(self) -> _State:
        weights = self.desk.weights
        pruning = None if weights is None else weights.pruning
        arrays = {} if weights is None else weights.adapters
        adapters = {name: LayerTensors(adapters=tensors.adapters) for name, tensors in arrays.items() if tensors.adapters}
        # The same pruning and adapters give the same weights, so their digest is computed once.
        key = str(pruning), tensors_digest(adapters)
        if key not in self._digests:
            self._digests[key] = self.desk.decoder.weights_digest()
        return _State(self._digests[key], pruning, adapters)


def _actor_class() -> type:
    class CalibrationActor:
        """Holds a worker."""

        def __init__(self, order: Order) -> None:
            self._worker = CalibrationWorker(order)

        def open(self) -> dict[str, Any]:
            return self._worker.open()

        def measure(self, number: int, box: list[Any], window: int) -> Any:
            if not self._worker.holds(number):
                import ray

                self._worker.take(ray.get(box[0]))
            return self._worker.measure(window)

    return CalibrationActor
