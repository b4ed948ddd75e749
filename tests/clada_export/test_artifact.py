"""The output folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clada_export import artifact
from clada_export.artifact import ArtifactWriter
from clada_export.errors import UsageError
from clada_export.manifest import MANIFEST_NAME, Manifest, read_manifest
from clada_export.plan import LoadSignal, SparsityPlan
from tests.processes import start


def make_manifest() -> Manifest:
    plan = SparsityPlan("clada", "gate", "threshold", (), LoadSignal(), {"weights_digest": "ab"})
    return Manifest(
        tool_version="0.1.0",
        source={"name": "x", "kind": "folder", "revision": None, "weights_digest": "ab", "files": {}},
        target="ort",
        op={"domain": "com.clada", "name": "SparseFFN", "version": 1},
        plan=plan.to_dict(),
        load_signal=LoadSignal(),
        inputs=(),
        outputs=(),
        dtype="float32",
        cache=(),
        versions={},
    )


def export(out: Path, *, overwrite: bool = False, content: bytes = b"graph") -> None:
    with ArtifactWriter(out, overwrite) as writer:
        (writer.path / "model.onnx").write_bytes(content)
        (writer.path / "sub").mkdir()
        (writer.path / "sub" / "a.txt").write_text("a")
        writer.commit(make_manifest())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftovers(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


def test_writes_a_folder_that_reads_back(tmp_path: Path) -> None:
    export(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.files) == ["model.onnx", "sub/a.txt"]
    assert leftovers(tmp_path) == []
    export(tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST_NAME).read_bytes() == (tmp_path / "out" / MANIFEST_NAME).read_bytes()


def test_refuses_an_existing_folder_at_the_start(tmp_path: Path) -> None:
    export(tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"), ArtifactWriter(tmp_path / "out"):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"), ArtifactWriter(tmp_path / "file", overwrite=True):
        pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="does not exist"), ArtifactWriter(tmp_path / "no" / "out"):
        pytest.fail("the block must not run")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UsageError, match="not a folder"), ArtifactWriter(tmp_path / "link", overwrite=True):
        pytest.fail("the block must not run")
    assert leftovers(tmp_path) == []


def test_refuses_a_parent_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"can't be made in .*: Permission denied"), ArtifactWriter(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_overwrite_replaces_only_an_export_or_an_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, content=b"first")
    export(out, overwrite=True, content=b"second")
    assert (out / "model.onnx").read_bytes() == b"second"
    empty = tmp_path / "empty"
    empty.mkdir()
    export(empty, overwrite=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not an earlier export"):
        export(home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "precious"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), UsageError("y")])
def test_any_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    export(tmp_path / "out", content=b"first")
    with pytest.raises(type(error)), ArtifactWriter(tmp_path / "out", overwrite=True) as writer:
        (writer.path / "model.onnx").write_bytes(b"half")
        raise error
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"first"


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.path / "x").write_text("")
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError, match="inside the with block"):
        _ = writer.path


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UsageError, match=r"out: the disk is full: \d+ bytes were free"), ArtifactWriter(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_a_folder_made_by_someone_else_in_the_meantime(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="can't be put in place: it was made by someone else"),
        ArtifactWriter(tmp_path / "out") as w,
    ):
        (w.path / "model.onnx").write_bytes(b"")
        (tmp_path / "out").mkdir()
        w.commit(make_manifest())
    assert names(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "out", content=b"first")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UsageError, match="Input/output error"):
        export(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"first"


def test_links_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain files"), ArtifactWriter(tmp_path / "out") as writer:
        (writer.path / "x").symlink_to("/etc/passwd")
        writer.commit(make_manifest())
    assert names(tmp_path) == []


def test_works_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=export, args=(tmp_path / "out",))
    thread.start()
    thread.join()
    read_manifest(tmp_path / "out")


CHILD = """
import sys, time
from pathlib import Path
from clada_export.artifact import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1])) as writer:
    (writer.path / "model.onnx").write_bytes(b"x" * 100000)
    print("writing", flush=True)
    time.sleep(60)
"""


def start_child(out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[1])}
    child = start([sys.executable, "-c", CHILD, str(out)], environment)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    child = start_child(tmp_path / "out")
    child.send_signal(number)
    _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert child.returncode != 0
    assert names(tmp_path) == []


def test_a_killed_run_leaves_only_its_temporary_folder_and_the_next_run_removes_it(tmp_path: Path) -> None:
    child = start_child(tmp_path / "out")
    child.kill()
    child.communicate(timeout=30)
    assert len(leftovers(tmp_path)) == 1
    assert not (tmp_path / "out").exists()
    export(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_the_folder_of_a_run_that_still_lives_is_left_alone(tmp_path: Path) -> None:
    child = start_child(tmp_path / "out")
    try:
        export(tmp_path / "out")
        assert len(leftovers(tmp_path)) == 1
    finally:
        child.terminate()
        child.communicate(timeout=30)
    assert names(tmp_path) == ["out"]


def test_a_crash_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    export(tmp_path / "out", content=b"first")
    (tmp_path / "out").rename(tmp_path / ".out.old-0011aabb")
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"first"
    assert leftovers(tmp_path) == []


def test_sigterm_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    export(tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "other"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path) == ["out"]
