"""Held-out text: what calibration never saw (it uses the Python language reference unless it is given a text).

Two Debian packages: the Debian Administrator's Handbook, which is technical prose like the calibration text, and the Jargon
File, which is not. They are downloaded with apt (no root needed, nothing is installed) and kept as plain text.

    python -m benchmarks.texts build/benchmarks/texts
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from clada_export.errors import BackendError, CladaError, UsageError

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BREAKS = frozenset(
    ("p", "div", "br", "li", "dt", "dd", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "table", "ul", "ol", "dl")
)
_SILENT = frozenset(("head", "script", "style"))


@dataclass(frozen=True)
class Text:
    """A held-out text; `digest` is the sha256 of its UTF-8 bytes."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Says which text it was."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class _Prose(HTMLParser):
    """Keeps the text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent += tag in _SILENT
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in _SILENT))
        if tag in _BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def strip_html(page: str) -> str:
    """The text of an HTML page: one line a paragraph, empty lines dropped."""
    prose = _Prose()
    prose.feed(page)
    lines = (re.sub(r"\s+", " ", line).strip() for line in _block_lines(prose.parts))
    return "\n".join(line for line in lines if line)


def _block_lines(parts: Sequence[str]) -> list[str]:
    """Join what stands between two breaks; a line end inside a paragraph is a space."""
    lines = [""]
    for part in parts:
        if part == "\n":
            lines.append("")
        else:
            lines[-1] += part
    return lines


def _handbook(root: Path) -> str:
    pages = sorted((root / "usr/share/doc/debian-handbook/html/en-US").glob("*.html"))
    texts = [strip_html(page.read_text(encoding="utf-8")) for page in pages]
    # Navigation and lists of links are not prose: only lines of a few words are kept.
    return "\n\n".join("\n".join(line for line in text.split("\n") if len(line.split()) >= 8) for text in texts)


def _jargon(root: Path) -> str:
    path = root / "usr/share/doc/jargon-text/jargon.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    # Lines are wrapped and indented for a terminal.
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", text))
    return "\n".join(line for line in paragraphs if len(line.split()) >= 8)


PACKAGES: dict[str, Callable[[Path], str]] = {"debian-handbook": _handbook, "jargon-text": _jargon}


def heldout_texts(cache: Path, files: Sequence[Path] = ()) -> list[Text]:
    """The held-out texts.

    Args:
        cache: a folder that keeps what was downloaded.
        files: texts to use instead.

    Raises:
        UsageError: a file can't be read.
        BackendError: no apt, or it can't reach the packages; says what to do.
    """
    if files:
        return [Text(path.stem, _read(path)) for path in files]
    cache = cache.resolve()
    missing = [name for name in PACKAGES if not (cache / f"{name}.txt").is_file()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _download(missing, Path(work))
            for name in missing:
                text = PACKAGES[name](Path(work) / name)
                if not text.strip():
                    raise BackendError(f"Debian's package {name} does not hold its text where it did; use --text FILE")
                part = Path(work) / f"{name}.txt"
                part.write_text(text, encoding="utf-8")
                part.replace(cache / part.name)
    return [Text(name, _read(cache / f"{name}.txt")) for name in PACKAGES]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"held-out text {path}: can't be read: {error}") from error
    if not text.strip():
        raise UsageError(f"held-out text {path}: it is empty")
    return text


def _download(packages: Sequence[str], work: Path) -> None:
    """Unpack each package into `work/NAME`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BackendError("held-out text comes from Debian packages, and there is no apt-get here; use --text FILE")
    # The machine's own package lists, where it has them; else lists of our own, which leaves the system as it is.
    if not _fetch(packages, work, []):
        own = _own_lists(work)
        if own is None or not _run(["apt-get", *own, "-qq", "update"], work) or not _fetch(packages, work, own):
            raise BackendError(f"apt can't download {', '.join(packages)}; use --text FILE")
    for name in packages:
        (archive,) = work.glob(f"{name}_*.deb")
        if not _run(["dpkg-deb", "-x", str(archive), str(work / name)], work):
            raise BackendError(f"{archive.name} can't be unpacked")


def _fetch(packages: Sequence[str], work: Path, options: Sequence[str]) -> bool:
    command = ["apt-get", *options, "-qq", "-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=2", "download", *packages]
    return _run(command, work) and all(any(work.glob(f"{name}_*.deb")) for name in packages)


def _own_lists(work: Path) -> list[str] | None:
    """Options that keep apt in a folder of its own, with Debian's stable release as the only source."""
    if not _KEYRING.is_file():
        return None
    for folder in ("sources", "lists/partial", "cache/archives/partial"):
        (work / "apt" / folder).mkdir(parents=True)
    apt = work / "apt"
    (apt / "status").touch()
    (apt / "sources" / "debian.sources").write_text(
        f"Types: deb\nURIs: http://deb.debian.org/debian\nSuites: stable\nComponents: main\nSigned-By: {_KEYRING}\n"
    )
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": apt / "sources",
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _run(command: Sequence[str], folder: Path) -> bool:
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path, help="where the texts are kept")
    try:
        for text in heldout_texts(parser.parse_args().cache):
            print(f"{text.name}: {len(text.text)} characters, sha256 {text.digest[:16]}")
    except CladaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
