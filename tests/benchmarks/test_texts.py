"""Held-out text: what is kept of a page, and where the texts come from."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from benchmarks import texts
from benchmarks.texts import heldout_texts, strip_html
from clada_export.errors import BackendError, UsageError

PAGE = """<html><head><title>t</title><style>p {}</style></head>
<body><p>One
 two &amp; <b>three</b>.</p><ul><li>four</li></ul></body>"""
PROSE = "This line has more than eight words, so it is kept."


def test_html_becomes_lines() -> None:
    assert strip_html(PAGE) == "One two & three.\nfour"


def test_files_take_the_place_of_packages(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("some text")
    (text,) = heldout_texts(tmp_path / "cache", [tmp_path / "mine.txt"])
    assert (text.name, text.text) == ("mine", "some text")
    with pytest.raises(UsageError, match=r"none\.txt"):
        heldout_texts(tmp_path, [tmp_path / "none.txt"])


def test_packages_are_stripped_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(packages: list[str], work: Path) -> None:
        calls.append(list(packages))
        pages = work / "debian-handbook/usr/share/doc/debian-handbook/html/en-US"
        pages.mkdir(parents=True)
        (pages / "a.html").write_text(f"<p>{PROSE}</p><p>Next page</p>")
        jargon = work / "jargon-text/usr/share/doc/jargon-text"
        jargon.mkdir(parents=True)
        with gzip.open(jargon / "jargon.txt.gz", "wt") as stream:
            stream.write("Title\n\n   " + PROSE.replace(" kept", "\n   kept"))

    monkeypatch.setattr(texts, "_download", download)
    first = heldout_texts(tmp_path)
    assert [text.text for text in first] == [PROSE, PROSE]
    assert heldout_texts(tmp_path) == first
    assert calls == [["debian-handbook", "jargon-text"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["debian-handbook.txt", "jargon-text.txt"]


def test_without_apt_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="--text FILE"):
        heldout_texts(tmp_path)
