"""What all fuzzers share: generated cases until the time is up, and what no case may do.

A case may succeed, or end with an error of `clada_export.errors`. It must not raise anything else (that would be exit code 1, a
fault of ours), take longer than `HANG_S`, or want more memory than `MEMORY_BYTES` above what the process has.

`FUZZ_SECONDS` is the time of each fuzzer (3 by default; `make test-long` gives 60), `FUZZ_SEED` where it starts: the same seed
gives the same cases, so that a plain test run does not depend on luck. `FUZZ_REPORT` is a file that gets a JSON line a fuzzer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from clada_export.errors import CladaError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
HANG_S = 10.0
MEMORY_BYTES = 2 << 30

Case = TypeVar("Case")


class HangError(BaseException):
    """A case took longer than `HANG_S`. No `Exception`, so that nothing between takes it for one of its own."""


def hold(call: Callable[[], object]) -> CladaError | None:
    """Run one case and hold it to the rules.

    Returns:
        The user's error that it ended with, or None if it succeeded.

    Raises:
        AssertionError: the case asked for more memory than it may have, and hid it in an error of ours.
        HangError: it took too long.
        Exception: whatever else it raised, which is what a fuzzer looks for.
    """
    with _limits():
        try:
            call()
        except CladaError as error:
            text = str(error)
            assert text.strip(), "an error without a message"
            cause: BaseException | None = error
            while cause is not None:
                assert not isinstance(cause, MemoryError), f"it asked for more than {MEMORY_BYTES >> 20} MB: {text}"
                cause = cause.__cause__ or cause.__context__
            return error
    return None


def fuzz(name: str, cases: st.SearchStrategy[Case], check: Callable[[Case], object], *, chunk: int = 100) -> int:
    """Check generated cases until `SECONDS` are over.

    Args:
        name: of the fuzzer, for the report.
        cases: what they are drawn from.
        check: holds one case to the rules (`hold`), and to more if there is more.
        chunk: cases between two looks at the clock; few where one takes long.

    Returns:
        How many cases were checked.
    """
    count = 0
    end = time.monotonic() + SECONDS
    start = SEED

    def counted(case: Case) -> None:
        nonlocal count
        count += 1
        check(case)

    while time.monotonic() < end:
        run = settings(
            max_examples=chunk,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(given(case=cases)(_keyword(counted)))
        seed(start)(run)()
        start += 1
    report = os.environ.get("FUZZ_REPORT")
    if report:
        with Path(report).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"fuzzer": name, "cases": count, "seconds": SECONDS, "seed": SEED}) + "\n")
    assert count > 0
    return count


def _keyword(check: Callable[[Case], None]) -> Callable[..., None]:
    def run(case: Any) -> None:
        check(case)

    return run


@contextmanager
def _limits() -> Iterator[None]:
    """Bound time and memory of what runs inside; only in the main thread, as signals want it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"a case took longer than {HANG_S:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    # Native code does not see the signal; this ends the process, with the place where it hangs on stderr.
    # A test that captures what is printed has taken sys.stderr away.
    faulthandler.dump_traceback_later(3 * HANG_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


NUMBERS = (0, -1, 1, 2.0, 0.5, 1e300, -1e300, 1e-320, 1e39, 2**31, 2**53 + 1, 2**63, 10**9, 10**400)
"""Those that break things."""

# Made once: making a strategy takes longer than drawing from it.
_ATOMS = st.none() | st.booleans() | st.integers() | st.sampled_from(NUMBERS) | st.floats(allow_nan=False) | st.text(max_size=8)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    _ATOMS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12
)
"""Any JSON value."""
_KINDS = st.sampled_from(["value", "value", "number", "number", "drop", "twice", "rename", "swap"])
_NUMBER = st.sampled_from(NUMBERS)
_NAMES = st.text(max_size=6)
_BELOW = st.integers(0, 2**32 - 1)
_COUNT = st.integers(1, 3)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with a few places changed: another value, a key dropped, added or named otherwise, an item twice or gone."""
    result = json.loads(json.dumps(value))
    for _ in range(draw(_COUNT)):
        result = _changed(draw, result)
    return result


def _changed(draw: st.DrawFn, root: Any) -> Any:
    places = list(_places(root))
    if not places:
        return draw(JSON_VALUES)
    parent, key = places[draw(_BELOW) % len(places)]
    match draw(_KINDS):
        case "drop":
            del parent[key]
        case "twice" if isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(parent[key])))
        case "rename" if isinstance(parent, dict):
            parent[draw(_NAMES)] = parent.pop(key)
        case "swap":
            other, place = places[draw(_BELOW) % len(places)]
            # A copy: a value inside itself would be no JSON.
            parent[key] = json.loads(json.dumps(other[place]))
        case "number":
            parent[key] = draw(_NUMBER)
        case _:
            parent[key] = draw(JSON_VALUES)
    return root


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from _places(item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item)


_DAMAGE = st.sampled_from(["flip", "flip", "cut", "end", "repeat", "replace"])
_FEW = st.integers(1, 16)
_BYTES = st.binary(max_size=16)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a few places changed: cut, flipped, or a piece of them repeated or replaced."""
    result = bytearray(data)
    for _ in range(draw(_COUNT)):
        if not result:
            break
        start = draw(_BELOW) % len(result)
        stop = min(len(result), start + draw(_FEW))
        match draw(_DAMAGE):
            case "flip":
                result[start] ^= 1 << draw(_FEW) % 8
            case "cut":
                del result[start:stop]
            case "end":
                del result[start:]
            case "repeat":
                result[start:start] = result[start:stop]
            case _:
                result[start:stop] = draw(_BYTES)
    return bytes(result)
