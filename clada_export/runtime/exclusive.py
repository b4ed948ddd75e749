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
        self._inside: tuple[int, str] | None = None
        self._batch_of: int | None = None

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Hold the engine for one call.

        Args:
            name: of the method, for the message.

        Raises:
            UsageError: another call is in it, from another thread or from inside this one, or this is another process than that
                which loaded it.
        """
        if os.getpid() != self._process:
            # The threads of ONNX Runtime and the GPU's context stay behind in a fork: the call would never return.
            raise UsageError(f"Engine.{name}: the engine was loaded in another process; load it in the one that uses it")
        if not self._lock.acquire(blocking=False):
            thread, other = self._inside or (0, "another call")
            if thread == threading.get_ident():
                raise UsageError(
                    f"Engine.{name} was called from inside Engine.{other}, by its stream callback or load function; call it "
                    "when that has returned, or load another engine for it"
                )
            raise UsageError(
                f"Engine.{name}: another thread is in this engine (Engine.{other}), which holds one batch; {REMEDY}"
            )
        try:
            self._inside = (threading.get_ident(), name)
            yield
        finally:
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
