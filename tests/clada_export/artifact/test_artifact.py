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

from clada_export.artifact import writer as artifact
from clada_export.artifact.manifest import MANIFEST_NAME, Manifest, file_record, read_manifest
from clada_export.artifact.writer import ArtifactWriter
from clada_export.errors import UsageError
from clada_export.files.work_folder import WorkFolder
from clada_export.load.signal import LoadSignal
from clada_export.plan.plan import SparsityPlan
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


def test_a_file_is_hashed_once_unless_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def record(path: Path) -> dict[str, Any]:
        hashed.append(path.name)
        return file_record(path)

    monkeypatch.setattr(artifact, "file_record", record)
    monkeypatch.setattr(artifact, "TICK_NS", 1_000_000)
    with ArtifactWriter(tmp_path / "out") as writer:
        for name in ("model.onnx", "changed"):
            (writer.path / name).write_bytes(b"one")
        time.sleep(0.05)
        writer.draft(make_manifest())
        (writer.path / "changed").write_bytes(b"two")
        manifest = writer.commit(make_manifest())
    assert hashed == ["changed", "model.onnx", "changed"]
    assert manifest.files["changed"] == file_record(tmp_path / "out" / "changed")
    monkeypatch.setattr(artifact, "TICK_NS", 10**12)
    hashed.clear()
    with ArtifactWriter(tmp_path / "young") as writer:
        (writer.path / "model.onnx").write_bytes(b"one")
        writer.draft(make_manifest())
        writer.commit(make_manifest())
    assert hashed == ["model.onnx", "model.onnx"]


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
        if self.name == "new":
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
from clada_export.artifact.writer import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1])) as writer:
    (writer.path / "model.onnx").write_bytes(b"x" * 100000)
    print("writing", flush=True)
    time.sleep(60)
"""


def start_child(out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[2])}
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


def abandoned(out: Path) -> WorkFolder:
    """What a run that was killed leaves."""
    work = WorkFolder.make(out)
    os.close(work.lock)
    return work


def test_a_crash_between_the_two_renames_is_repaired(tmp_path: Path) -> None:
    export(tmp_path / "out", content=b"first")
    (tmp_path / "out").rename(abandoned(tmp_path / "out").old)
    with pytest.raises(UsageError, match="exists already"):
        export(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"first"
    assert leftovers(tmp_path) == []


def test_a_crash_after_both_renames_is_cleaned_up(tmp_path: Path) -> None:
    export(tmp_path / "out", content=b"first")
    export(abandoned(tmp_path / "out").old, content=b"zeroth")
    export(tmp_path / "out", overwrite=True, content=b"second")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"second"


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


STRANGERS = (
    ".out.old-20240101",
    ".out.tmp-20240101",
    ".out.clada-20240101",
    ".out.clada-2024010120240101",
    ".out.clada-00112233aabbccdd",
    ".out",
    "new",
    "old",
)


@pytest.mark.parametrize("outcome", ["fails", "succeeds", "replaces", "is refused"])
def test_folders_of_others_are_not_touched(tmp_path: Path, outcome: str) -> None:
    for name in STRANGERS:
        (tmp_path / name / "old").mkdir(parents=True)
        (tmp_path / name / "lock").write_text("mine")
        (tmp_path / name / "thesis.txt").write_text("precious")
        (tmp_path / name / "old" / MANIFEST_NAME).write_text("{}")
    # The work folder of another output, whose run was killed.
    kept = abandoned(tmp_path / "other")
    (kept.new / "x").write_text("x")
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    match outcome:
        case "fails":
            with pytest.raises(ValueError, match="x"), ArtifactWriter(out):
                raise ValueError("x")
        case "succeeds":
            export(out)
        case "replaces":
            export(out)
            export(out, overwrite=True)
        case _:
            with pytest.raises(UsageError, match="does not exist"), ArtifactWriter(tmp_path / "nowhere" / "out"):
                pytest.fail("the block must not run")
    after = snapshot(tmp_path)
    assert {name: after.get(name, b"gone") for name in before} == before
    assert out.exists() == (outcome in ("succeeds", "replaces"))


def test_files_links_and_fifos_of_such_names_do_no_harm(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "old").mkdir(parents=True)
    (target / "thesis.txt").write_text("precious")
    marked = [WorkFolder.make(tmp_path / "out") for _ in range(4)]
    for work in marked:
        work.remove()
    marked[0].path.symlink_to(target)
    os.mkfifo(marked[1].path)
    marked[2].path.write_text("a file")
    marked[3].path.mkdir()
    os.mkfifo(marked[3].path / "lock")
    os.mkfifo(tmp_path / ".out.tmp-20240101")
    export(tmp_path / "out")
    assert (target / "thesis.txt").read_text() == "precious"
    assert marked[0].path.is_symlink() and marked[1].path.is_fifo() and marked[2].path.is_file()


def test_runs_beside_each_other_do_not_take_what_is_not_theirs(tmp_path: Path) -> None:
    """Threads that all make the same output: one wins, the others are told, nothing is left and nothing breaks."""
    outcomes: list[str] = []

    def run(index: int) -> None:
        try:
            export(tmp_path / "out", overwrite=True, content=b"%d" % index)
            outcomes.append("made")
        except UsageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert "made" in outcomes
    assert all(text == "made" or text.startswith(f"{tmp_path / 'out'}: ") for text in outcomes), outcomes
    read_manifest(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a[b]*?", "-", " ", "out\n"])
def test_any_name_that_a_folder_can_have(tmp_path: Path, name: str) -> None:
    export(tmp_path / name)
    abandoned(tmp_path / name)
    export(tmp_path / name, overwrite=True)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("junk", ["{}", "", "[]", '{"schema_version": 1, "files": {}}', "[" * 900 + "]" * 900])
def test_a_junk_manifest_makes_no_folder_replaceable(tmp_path: Path, junk: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / MANIFEST_NAME).write_text(junk)
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not an earlier export"):
        export(home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "precious"


def test_files_that_the_export_did_not_write_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out)
    (out / "sub" / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"did not write \(sub/notes.txt\)"):
        export(out, overwrite=True)
    (out / "sub" / "notes.txt").unlink()
    export(out, overwrite=True, content=b"second")
    assert (out / "model.onnx").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EFBIG, "File too large"), "out: writing failed: File too large"),
        (OSError(errno.EIO, "Input/output error"), "out: writing failed: Input/output error"),
    ],
)
def test_a_disk_that_fails(tmp_path: Path, error: OSError, said: str) -> None:
    with pytest.raises(UsageError, match=said), ArtifactWriter(tmp_path / "out"):
        raise error
    assert names(tmp_path) == []


def test_an_output_that_can_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "out")

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UsageError, match="out: can't be looked at: Permission denied"):
        export(tmp_path / "out", overwrite=True)


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"out: weights can't be written: Is a directory"),
        ArtifactWriter(tmp_path / "out") as w,
    ):
        (w.path / "weights").mkdir()
        (w.path / "weights").write_bytes(b"")
    # Another file that is missing is no fault of the disk.
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "out"):
        (tmp_path / "nothing").read_bytes()
    assert names(tmp_path) == []


SMALL_DISK = """
import ctypes, os, sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file
from clada_export.artifact.writer import ArtifactWriter
from clada_export.errors import UsageError

def by_numpy(folder):
    np.zeros(1 << 20, np.uint8).tofile(folder / "a.bin")

def by_onnx(folder):
    value = ir.Value(name="w", const_value=ir.tensor(np.zeros(1 << 18, np.float32), name="w"))
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx", external_data="model.onnx.data")

def by_safetensors(folder):
    save_file({"w": np.zeros(1 << 20, np.uint8)}, folder / "plan.safetensors")

def by_python(folder):
    (folder / "a.txt").write_text("x" * (1 << 20))

place = Path(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
for size in (64, 200, 256, 300, 400, 512, 700, 800, 900, 980, 1000, 1016):
    if libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=%dk" % size) != 0:
        print(os.strerror(ctypes.get_errno()))
        sys.exit(77)
    for write in (by_numpy, by_onnx, by_safetensors, by_python):
        try:
            with ArtifactWriter(place / "out") as writer:
                write(writer.path)
                write = None
        except UsageError as error:
            assert "the disk is full" in str(error), error
        assert write is not None, f"{size} kB were enough"
        assert os.listdir(place) == [], os.listdir(place)
    libc.umount(os.fsencode(place))
print("done")
"""


def test_a_disk_that_is_full_whoever_writes(tmp_path: Path) -> None:
    """NumPy's error has no number, others' are only text. The file systems are mounted in a namespace of their own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[2])}
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no small file system can be mounted here: {done.stdout or done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_sigterm_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    export(tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "other"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path) == ["out"]
