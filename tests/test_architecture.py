"""Promises about the map of the code: few modules at the top, no file that is too long, no import circles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.structure import ROOT, subjects
from benchmarks.structure import measure as measure_structure

MOST_AT_THE_TOP = 8
MOST_LINES = 500
FOLDERS = ("clada_export", "graph_passes", "plugins")
SUFFIXES = {".py", ".cc", ".cu", ".h", ".cpp", ".cuh"}


def _sources(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (path for path in sorted((root / folder).rglob("*")) if path.suffix in SUFFIXES and path.is_file())


def too_long(root: Path) -> list[str]:
    """The files with more lines than a reader holds in the head."""
    counted = ((path, len(path.read_text(encoding="utf-8").splitlines())) for path in _sources(root))
    return [f"{path.relative_to(root)}: {lines} lines" for path, lines in counted if lines > MOST_LINES]


def test_no_file_is_too_long() -> None:
    assert too_long(ROOT) == []


def test_a_file_that_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "long.cc").write_text("//\n" * (MOST_LINES + 1), encoding="utf-8")
    (tmp_path / "plugins" / "fits.h").write_text("//\n" * MOST_LINES, encoding="utf-8")
    assert too_long(tmp_path) == [f"plugins/long.cc: {MOST_LINES + 1} lines"]


def test_few_modules_stand_at_the_top() -> None:
    modules = sorted(path.name for path in (ROOT / "clada_export").glob("*.py"))
    assert len(modules) <= MOST_AT_THE_TOP, f"{modules}: put a new module into the room of its stage"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Within functions too. `make lint` looks at whole rooms, and at the order of the rooms."""
    assert measure_structure(subjects()[0]).circles == ()
