"""One call at a time: an engine holds one batch, and two calls that meet in it would give each other's tokens."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from clada_export.errors import UsageError

REMEDY = "load one engine for each thread (load_engine), or make the calls one after the other"


class Exclusive:
    """Who is in an engine, and whose its batch is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._inside: tuple[int, str, bool] | None = None
        self._batch_of: int | None = None

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Hold the engine for one call.

        Args:
            name: of the method, for the message.

        Raises:
            UsageError: as `enter`.
        """
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str, *, open_between: bool = False) -> None:
        """Hold the engine until `leave`.

        Args:
            name: of the method, for the message.
            open_between: the call goes on after its caller got something back, as a stream does between its pieces.

        Raises:
            UsageError: another call is in it, from another thread or from inside this one, or this is another process than that
                which loaded it.
        """
        if os.getpid() != self._process:
            # The threads of ONNX Runtime and the GPU's context stay behind in a fork: the call would never return.
            raise UsageError(f"Engine.{name}: the engine was loaded in another process; load it in the one that uses it")
        if not self._lock.acquire(blocking=False):
            thread, other, is_open = self._inside or (0, "another call", False)
            if thread == threading.get_ident() and is_open:
                raise UsageError(
                    f"Engine.{name}: a stream of this engine is open (Engine.{other}); read it to its end, close it (close()), "
                    "or load another engine"
                )
            if thread == threading.get_ident():
                raise UsageError(
                    f"Engine.{name} was called from inside Engine.{other}, by its stream callback or load function; call it "
                    "when that has returned, or load another engine for it"
                )
            raise UsageError(
                f"Engine.{name}: another thread is in this engine (Engine.{other}), which holds one batch; {REMEDY}"
            )
        self._inside = (threading.get_ident(), name, open_between)

    def leave(self) -> None:
        """The call is over; any thread may say so."""
        self._inside = None
        self._lock.release()

    def begin_batch(self) -> None:
        """From here on the batch is this thread's."""
        self._batch_of = threading.get_ident()

    def require_batch(self, name: str) -> None:
        """Check that the batch is this thread's.

        Raises:
            UsageError: another thread began it, perhaps in place of one of this thread's.
        """
        if self._batch_of != threading.get_ident():
            raise UsageError(f"Engine.{name}: another thread began the batch that this engine holds; {REMEDY}")
