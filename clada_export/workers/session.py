"""Ray, started on this machine or joined where it runs; what it says of calls that failed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from clada_export.errors import BackendError

WAIT_S = 1.0
"""How long one wait for Ray lasts at most, seconds: Ctrl-C is seen after it."""


@dataclass(frozen=True)
class WorkerOptions:
    """Where work is shared out, and to how many.

    Attributes:
        workers: how many at once.
        threads: CPUs of each.
        address: of a running cluster; None starts Ray on this machine.
        retries: how often a piece of work is given out again after its worker died or a fault, and a worker started again that
            died before it had opened the model.
    """

    workers: int = 1
    threads: int = 1
    address: str | None = None
    retries: int = 2


def require_ray(instead: str) -> Any:
    """The module `ray`.

    Args:
        instead: what a user can do without it.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendError(f"workers in parallel need Ray: pip install 'clada-export[sweep]' ({instead})") from error
    return ray


class RaySession:
    """A context manager that starts or joins Ray and leaves it, or takes the Ray that the process has.

    Args:
        address: of a running cluster; None starts Ray on this machine.
        processors: that Ray gives out, if it is started here.
        instead: as in `require_ray`.

    Raises:
        BackendError: Ray is missing, or can't be reached.
    """

    def __init__(self, address: str | None, processors: int, instead: str) -> None:
        self.ray = require_ray(instead)
        self._address, self._processors = address, processors
        self._ours = False

    def __enter__(self) -> RaySession:
        # Ray sends statistics of its use to its makers unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._address is None:
            # "local" starts an instance of its own even where RAY_ADDRESS is set.
            settings |= {"address": "local", "num_cpus": self._processors, "include_dashboard": False}
        else:
            settings |= {"address": self._address}
        self._ours = not self.ray.is_initialized()
        if self._ours:
            try:
                self.ray.init(**settings)
            except Exception as error:  # Ray raises whatever its parts do
                place = "on this machine" if self._address is None else f"at {self._address}"
                raise BackendError(f"Ray can't be started or reached {place}: {type(error).__name__}: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours:
            self.ray.shutdown()

    def actor(self, kind: type, threads: int) -> Any:
        """What makes actors of a class, each with so many processors and never restarted by Ray."""
        return self.ray.remote(num_cpus=threads, max_restarts=0)(kind)

    def kill(self, actor: Any) -> None:
        """End an actor, whatever it is at."""
        self.ray.kill(actor, no_restart=True)

    def finished(self, calls: dict[Any, Any]) -> list[tuple[Any, Any]]:
        """Calls that are over, with their result or what they raised; they are taken out of `calls`.

        Args:
            calls: what is known of each call, by Ray's reference of it.
        """
        ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=WAIT_S)
        return [(calls.pop(reference), self._result(reference)) for reference in ready]

    def lost(self, result: Any) -> bool:
        """Whether a call ended because its worker did."""
        return isinstance(result, self.ray.exceptions.RayError)

    def _result(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, BaseException) else RuntimeError(in_short(error))
        except self.ray.exceptions.RayError as error:
            return error


def in_short(error: BaseException) -> str:
    """What Ray says in many lines, in one: the end of a traceback, else the beginning."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if any("Traceback" in line for line in lines) else 0].strip()
