"""Run cells on Ray: a queue of cells, and workers that each hold the model and take the next cell.

Workers are actors. One that dies (killed, out of memory, its machine gone) is replaced by a new one, and its cell goes back
into the queue. The queue is here and not in Ray, so that a cell which kills its workers ends after its own retries, and a
worker without a cell costs none.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clada_export.errors import BackendError, CladaError, UsageError
from clada_export.lab.sweep.cells import LOST, Cell, Outcome
from clada_export.workers.session import RaySession, WorkerOptions, in_short

if TYPE_CHECKING:
    from clada_export.lab.sweep.worker import Worker

INSTEAD = "or leave --workers and --ray-address out: cells then run one after the other"


@dataclass(frozen=True)
class _Call:
    """What a worker is at: a cell, or (None) opening the model for the `opening`th time."""

    worker: Any
    cell: Cell | None
    opening: int = 1


class RayPool:
    """Cells on Ray; a context manager, which starts or joins Ray and leaves it, or takes the Ray that the process has.

    Args:
        make: makes a worker; is sent to Ray with its arguments.
        tell: told about workers that died.

    Raises:
        BackendError: Ray is missing, or can't be reached.
    """

    def __init__(self, make: Callable[[], Worker], options: WorkerOptions, tell: Callable[[str], None]) -> None:
        self._make, self._options, self._tell = make, options, tell
        processors = options.workers * options.threads
        self._session = RaySession(options.address, processors, INSTEAD)
        self._pending: dict[Any, _Call] = {}
        self._queue: deque[Cell] = deque()
        self._attempts: Counter[Cell] = Counter()
        self._identity: Any = None
        self._idle: list[Any] = []

    def __enter__(self) -> RayPool:
        self._session.__enter__()
        self._actor = self._session.actor(_actor_class(), self._options.threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in {id(call.worker): call.worker for call in self._pending.values()}.values():
            self._session.kill(worker)
        self._session.__exit__(kind, error, trace)

    def describe(self) -> dict[str, Any]:
        """Start one worker, and have it open the model.

        Raises:
            CladaError: the model or the text can't be used.
            BackendError: no worker lives long enough.
        """
        self._start()
        while True:
            for call, result in self._session.finished(self._pending):
                if isinstance(result, BaseException):
                    self._restart_opening(call, result)
                    continue
                self._identity = result["identity"]
                self._idle = [call.worker]
                described: dict[str, Any] = result
                return described

    def run(self, cells: Sequence[Cell], finished: Callable[[Outcome], None]) -> None:
        """Run all cells; `describe` comes first.

        Raises:
            CladaError: another worker can't open the model, or finds another one than the first did.
        """
        self._queue.extend(cells)
        for _ in range(min(self._options.workers, len(cells)) - len(self._idle)):
            self._start()
        for worker in self._idle:
            self._next(worker)
        # Workers that a full cluster never placed do not hold up the end.
        while self._queue or any(call.cell is not None for call in self._pending.values()):
            for call, result in self._session.finished(self._pending):
                if call.cell is None:
                    self._opened(call, result)
                else:
                    self._ran(call, call.cell, result, finished)

    def _opened(self, call: _Call, result: Any) -> None:
        if isinstance(result, BaseException):
            self._restart_opening(call, result)
        elif result["identity"] != self._identity:
            other = next(name for name, value in result["identity"].items() if value != self._identity.get(name))
            raise UsageError(
                f"a worker finds another model or text than the first: its {other} is {result['identity'][other]!s:.16}..., "
                f"that of the first {self._identity.get(other)!s:.16}...; the paths must lead to the same files on all machines"
            )
        else:
            self._next(call.worker)

    def _ran(self, call: _Call, cell: Cell, result: Any, finished: Callable[[Outcome], None]) -> None:
        attempt = self._attempts[cell]
        lost = self._session.lost(result)
        if not isinstance(result, BaseException):
            finished(replace(result, attempts=attempt))
        elif isinstance(result, CladaError):
            finished(Outcome.failed(cell, result, attempt))
        elif attempt <= self._options.retries:
            what = "its worker died" if lost else f"{type(result).__name__}: {result}"
            self._tell(f"{cell}: {what}; it is tried again (attempt {attempt + 1} of {self._options.retries + 1})")
            self._queue.append(cell)
        elif lost:
            times = "once" if attempt == 1 else f"{attempt} times"
            reason = f"its worker died {times} (killed, out of memory, or its machine is gone): {in_short(result)}"
            finished(Outcome(cell, None, reason, LOST, attempt))
        else:
            finished(Outcome.failed(cell, result, attempt))
        if lost:
            self._session.kill(call.worker)
            if self._queue:
                self._start()
        else:
            self._next(call.worker)

    def _start(self, opening: int = 1) -> None:
        worker = self._actor.remote(self._make)
        self._pending[worker.describe.remote()] = _Call(worker, None, opening)

    def _restart_opening(self, call: _Call, error: BaseException) -> None:
        if not self._session.lost(error):
            raise error
        self._session.kill(call.worker)
        if call.opening > self._options.retries:
            raise BackendError(
                f"a worker died {call.opening} times while it opened the model: {in_short(error)}. If it was killed: each "
                "worker holds the whole model, so give fewer --workers"
            ) from error
        self._tell(f"a worker died while it opened the model; another is started (attempt {call.opening + 1})")
        self._start(call.opening + 1)

    def _next(self, worker: Any) -> None:
        if not self._queue:
            self._session.kill(worker)
            return
        cell = self._queue.popleft()
        self._attempts[cell] += 1
        self._pending[worker.run.remote(cell)] = _Call(worker, cell)


def _actor_class() -> type:
    class SweepActor:
        """Holds a worker."""

        def __init__(self, make: Callable[[], Worker]) -> None:
            self._worker = make()

        def describe(self) -> dict[str, Any]:
            return self._worker.describe()

        def run(self, cell: Cell) -> Outcome:
            return self._worker.run(cell)

    return SweepActor
