"""What the pages name is there: relative links, and paths of this repository in backticks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ROOMS = ("benchmarks", "clada_export", "docs", "graph_passes", "plugins", "samples", "tests")

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]+)?\)")
_PATH = re.compile(rf"`((?:{'|'.join(ROOMS)})/[^`\s]*)`")
_PLACEHOLDER = re.compile(r"[A-Z]{3,}(?![A-Za-z]*\.md)")
"""What a reader has to fill in: `methods/NAME/`."""


def missing(page: Path, text: str, root: Path = ROOT) -> list[str]:
    """What a page names and is not there."""
    return [*_broken_links(page, text), *(path for path in _paths(text) if not _is_there(root, path))]


def _broken_links(page: Path, text: str) -> Iterator[str]:
    for match in _LINK.finditer(_FENCE.sub("", text)):
        target = match[1]
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
            yield target


def _paths(text: str) -> Iterator[str]:
    for match in _PATH.finditer(text):
        if not _PLACEHOLDER.search(match[1]):
            yield match[1]


def _is_there(root: Path, path: str) -> bool:
    # A path may be a pattern. One of a test (`file.py::test`) starts in `tests/`.
    file, _, test = path.partition("::")
    return any((root / "tests" if test else root).glob(file.rstrip("/")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page, page.read_text(encoding="utf-8")) == []


def test_what_is_not_there_is_found() -> None:
    text = "see [this](nowhere.md), [that](architecture.md#folders), `clada_export/nowhere.py`, `graph_passes/*.nope`, `docs/`"
    assert missing(ROOT / "docs" / "page.md", text) == ["nowhere.md", "clada_export/nowhere.py", "graph_passes/*.nope"]


def test_what_a_reader_fills_in_is_left_alone() -> None:
    assert missing(ROOT / "README.md", "`clada_export/methods/NAME/policy.py` and [a site](https://example.org/x)") == []


def test_every_room_has_its_line() -> None:
    """The map names every folder of the package."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "clada_export").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
