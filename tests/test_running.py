"""How the tests themselves run: what they keep, in which order they come, and on which cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import kept as keeping
from tests import order
from tests.cores import share_of

TWO_PROCESSES = """
import sys, time
from pathlib import Path
from tests import kept

def make(folder):
    with Path(sys.argv[2]).open("a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    (folder / "result").write_text("complete")

kept.CACHE = Path(sys.argv[1])
assert (kept.kept("kind", "key", make) / "result").read_text() == "complete"
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(keeping, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def writes(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "result").write_text(text)


def test_a_key_is_made_once(cache: Path) -> None:
    first = keeping.kept("kind", "a", writes("1"))
    assert keeping.kept("kind", "a", writes("2")) == first
    assert (first / "result").read_text() == "1"
    other = keeping.kept("kind", "b", writes("2"))
    assert (other / "result").read_text() == "2" and {first.parent, other.parent} == {cache / "kind"}


def test_what_fails_is_not_kept(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "result").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        keeping.kept("kind", "a", fail)
    assert (keeping.kept("kind", "a", writes("whole")) / "result").read_text() == "whole"
    assert not list((cache / "kind").glob("*.unfinished"))


def test_one_process_makes_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "cache"), str(log)]
    processes = [subprocess.Popen(command, cwd=keeping.ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_digest_is_of_names_and_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keeping, "ROOT", tmp_path)

    def found(**files: str) -> str:
        for path in tmp_path.glob("*.py"):
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        keeping.sources.cache_clear()
        return keeping.sources(Path())

    one = found(a="x", b="y")
    assert found(a="x", b="y") == one
    assert len({one, found(a="x", b="z"), found(a="x", c="y"), found(a="x")}) == 4
    keeping.sources.cache_clear()
    with pytest.raises(FileNotFoundError, match="gone: no source files"):
        keeping.sources(Path("gone"))


def test_the_longest_files_begin_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__)
    second = here.with_name("order.py")
    monkeypatch.setattr(order, "LONGEST", (second.name, here.name))
    others = [Path("/elsewhere/b.py"), Path("/elsewhere/a.py")]
    items: list[Any] = [SimpleNamespace(path=path, number=n) for path in (others[0], here, others[1], second) for n in (1, 2)]
    order.longest_first(items)
    assert [(item.path, item.number) for item in items] == [(p, n) for p in (second, here, *others) for n in (1, 2)]


def test_a_file_that_was_renamed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "LONGEST", ("gone.py",))
    with pytest.raises(FileNotFoundError, match=r"gone\.py: not there; correct its name in LONGEST of tests/order\.py"):
        order.longest_first([])


@pytest.mark.parametrize(("processes", "cores"), [(2, {0, 1}), (2, {3, 5, 6, 7}), (3, {0, 1, 2, 3}), (1, {4, 9})])
def test_processes_have_cores_of_their_own(processes: int, cores: set[int]) -> None:
    shares = [share_of(number, processes, cores) for number in range(processes)]
    assert set().union(*shares) == cores and sum(map(len, shares)) == len(cores)


def test_more_processes_than_cores_share_them() -> None:
    assert [share_of(number, 5, {2, 3}) for number in range(5)] == [{2}, {3}, {2}, {3}, {2}]
