"""Files are hashed once and again after any change; what was hashed is remembered where nobody else can write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clada_export.artifact.manifest import file_record
from clada_export.errors import BackendError, UsageError
from clada_export.files import check as file_check
from clada_export.files.check import SMALL_BYTES, ListedFiles
from clada_export.files.stamps import SETTLED_NS, Known, Stamp, StampFile, cache_home

LARGE = b"\x17" * SMALL_BYTES
DIGEST = "d" * 64


class Counter:
    """A folder of files, and which of them a check reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.read: list[str] = []
        hash_file, read_file = ListedFiles._hash, ListedFiles.read

        def hashed(files: ListedFiles, name: str, *rest: object) -> Stamp | None:
            self.read.append(name)
            return hash_file(files, name, *rest)  # type: ignore[arg-type]

        def whole(files: ListedFiles, name: str) -> bytes:
            self.read.append(name)
            return read_file(files, name)

        monkeypatch.setattr(ListedFiles, "_hash", hashed)
        monkeypatch.setattr(ListedFiles, "read", whole)
        for name, content in {"a.data": LARGE, "b.data": LARGE + b"!", "config.json": b"{}", "lib.so": LARGE}.items():
            (folder / name).write_bytes(content)
        self.files = {path.name: file_record(path) for path in sorted(folder.iterdir())}

    def check(self, digest: str = DIGEST) -> list[str]:
        self.read.clear()
        ListedFiles(self.folder, self.files).check_hashes(digest)
        return sorted(self.read)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    return Counter(tmp_path / "out", monkeypatch)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the clock of the check run ahead, so that files count as settled without a test that sleeps."""

    def turn() -> None:
        real = time.time_ns
        monkeypatch.setattr(file_check.time, "time_ns", lambda: real() + 2 * SETTLED_NS)

    return turn


ALWAYS = ["config.json", "lib.so"]
ALL = ["a.data", "b.data", *ALWAYS]


def test_large_files_are_read_once(folder: Counter, later: Callable[[], None]) -> None:
    later()
    assert folder.check() == ALL
    assert folder.check() == ALWAYS
    assert folder.check("e" * 64) == ALL  # another manifest
    home = cache_home()
    assert home is not None
    kept = sorted((home / "checked").iterdir())
    assert len(kept) == 2
    assert [path.stat().st_mode & 0o777 for path in (home / "checked", *kept)] == [0o700, 0o600, 0o600]
    shutil.copytree(folder.folder, folder.folder.with_name("copy"))
    folder.folder = folder.folder.with_name("copy")
    assert folder.check() == ALL  # another folder


def test_a_file_that_has_just_changed_is_read_again(folder: Counter, later: Callable[[], None]) -> None:
    assert folder.check() == ALL
    assert folder.check() == ALL
    later()
    assert folder.check() == ALL
    assert folder.check() == ALWAYS


def _write(path: Path) -> None:
    """In place, the same size."""
    with path.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\0")


def _write_and_hide(path: Path) -> None:
    """Like `_write`, and the time of the change is set back."""
    before = path.stat()
    _write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(path: Path) -> None:
    """Another file takes its place, with its size and times."""
    other = path.with_name("other")
    other.write_bytes(b"\0" * path.stat().st_size)
    shutil.copystat(path, other)
    other.replace(path)


def _link(path: Path) -> None:
    """A link to another file of the folder."""
    other = path.with_name("other")
    other.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    path.symlink_to("other")


@pytest.mark.parametrize("change", [_write, _write_and_hide, _replace, _link])
@pytest.mark.parametrize("name", ALL)
def test_every_change_is_found(folder: Counter, later: Callable[[], None], change: Callable[[Path], None], name: str) -> None:
    later()
    folder.check()
    if name == "config.json":
        (folder.folder / name).write_bytes(b"[]")
    else:
        change(folder.folder / name)
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"{name}: changed after the export"):
            folder.check()


def test_a_touched_file_is_read_again_and_passes(folder: Counter, later: Callable[[], None]) -> None:
    later()
    folder.check()
    (folder.folder / "a.data").touch()
    assert folder.check() == ["a.data", *ALWAYS]
    assert folder.check() == ALWAYS


def test_a_stamp_makes_no_other_content_pass(folder: Counter, later: Callable[[], None]) -> None:
    """Not even with the very stamp of the file, if it was hashed to something else."""
    later()
    folder.check()
    folder.files["a.data"] = {"sha256": "0" * 64, "bytes": len(LARGE)}
    with pytest.raises(UsageError, match=r"a\.data: changed after the export"):
        folder.check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_broken_file_of_stamps_is_as_good_as_none(folder: Counter, later: Callable[[], None], content: bytes) -> None:
    later()
    folder.check()
    home = cache_home()
    assert home is not None
    (kept,) = (home / "checked").iterdir()
    kept.write_bytes(content)
    assert folder.check() == ALL
    assert folder.check() == ALWAYS


@pytest.mark.parametrize(
    "record", ["x", 5, [], ["0" * 64], ["0" * 64, 1, 2, 3, 4], ["0" * 64, 1, 2, 3, 4, 5.0], ["0" * 64, 1, 2, 3, 4, True], None]
)
def test_a_record_that_is_no_stamp(folder: Counter, later: Callable[[], None], record: object) -> None:
    later()
    folder.check()
    home = cache_home()
    assert home is not None
    (kept,) = (home / "checked").iterdir()
    value = json.loads(kept.read_text())
    value["files"]["a.data"] = record
    kept.write_text(json.dumps(value))
    assert folder.check() == ALL


def test_stamps_that_others_could_have_written_are_not_believed(folder: Counter, later: Callable[[], None]) -> None:
    later()
    folder.check()
    home = cache_home()
    assert home is not None
    (kept,) = (home / "checked").iterdir()
    kept.chmod(0o622)
    assert folder.check() == ALL
    assert kept.stat().st_mode & 0o777 == 0o600
    moved = kept.rename(kept.with_name("elsewhere"))
    kept.symlink_to(moved)
    assert folder.check() == ALL
    if os.geteuid() == 0:
        os.chown(kept, 12345, -1)
        assert folder.check() == ALL


@pytest.mark.parametrize("place", ["file/below", "folder", "none"])
def test_a_cache_that_cannot_be_written(
    folder: Counter, later: Callable[[], None], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later()
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "clada-export").mkdir(parents=True)
    (tmp_path / "folder" / "clada-export" / "checked").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    if place == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
        assert cache_home() is None
    assert folder.check() == ALL
    assert folder.check() == ALL


def test_a_name_that_is_no_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stamps = StampFile("/out/\udcff", DIGEST)
    known = {"a": Known("0" * 64, Stamp(1, 2, 3, 4, 5))}
    stamps.write(known)
    assert StampFile("/out/\udcff", DIGEST).read() == known
    assert StampFile("/out/\udcfe", DIGEST).read() == {}


@pytest.mark.parametrize("name", ["a.data", "config.json"])
def test_links_that_lead_nowhere(folder: Counter, name: str, tmp_path: Path) -> None:
    path = folder.folder / name
    path.unlink()
    path.symlink_to(name)
    for checked in (True, False):
        files = ListedFiles(folder.folder, folder.files)
        with pytest.raises(UsageError, match=rf"{name}: can't be read: Too many levels of symbolic links"):
            files.check_hashes(DIGEST) if checked else files.check_sizes()
    path.unlink()
    path.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="leads out of the folder"):
        folder.check()
    path.unlink()
    path.symlink_to("nothing")
    with pytest.raises(UsageError, match=rf"{name}: .* missing"):
        folder.check()
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="not a regular file"):
        folder.check()
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="not a regular file"):
        folder.check()


def test_folders_of_links_and_deep_folders(folder: Counter) -> None:
    (folder.folder / "round").symlink_to(".")
    inner = folder.folder
    for _ in range(1200):
        inner = inner / "d"
        inner.mkdir()
    files = ListedFiles(folder.folder, folder.files)
    files.check_libraries()
    (inner / "libx.so.1").touch()
    with pytest.raises(UsageError, match=r"libx\.so\.1: a library that the manifest does not list"):
        files.check_libraries()
    (inner / "libx.so.1").unlink()
    while inner != folder.folder:
        inner.rmdir()
        inner = inner.parent
    (folder.folder / "libx.so").symlink_to("libx.so")
    with pytest.raises(UsageError, match=r"libx\.so: a library"):
        files.check_libraries()


def test_a_folder_that_is_a_loop(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop: can't be read"):
        ListedFiles(tmp_path / "loop", {})


def test_the_first_error_stops_the_others(folder: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several large files, one that is damaged is not waited for by those that are read beside it."""
    (folder.folder / "b.data").write_bytes(b"\0" * (len(LARGE) + 1))
    monkeypatch.setattr(file_check.os, "sched_getaffinity", lambda _: {0, 1, 2})
    with pytest.raises(UsageError, match=r"b\.data"):
        folder.check()


def test_read_gives_what_was_checked(folder: Counter) -> None:
    files = ListedFiles(folder.folder, folder.files, "lib.so")
    content = files.read("lib.so")
    assert hashlib.sha256(content).hexdigest() == folder.files["lib.so"]["sha256"]
    (folder.folder / "lib.so").write_bytes(b"\x18" * len(LARGE))
    with pytest.raises(UsageError, match=r"lib\.so: changed"):
        files.read("lib.so")
    (folder.folder / "lib.so").unlink()
    with pytest.raises(BackendError, match="library is missing"):
        files.read("lib.so")
