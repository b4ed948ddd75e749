"""A library is loaded from the bytes that were checked; what lies in the folder afterwards does not matter."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clada_export.artifact.manifest import file_record, write_manifest
from clada_export.cli import main
from clada_export.errors import BackendError, UsageError
from clada_export.native.library import check_content, ort_library_path
from clada_export.native.sealed import sealed_copy
from clada_export.runtime import load_engine, opening
from tests.clada_export.runtime.test_runtime import make_manifest, write_export

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def compiled(path: Path, code: str, size: int = 0) -> bytes:
    """A library, lengthened to `size` bytes."""
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=code, text=True, check=True)
    content = path.read_bytes()
    return content + b"\0" * max(0, size - len(content))


@pytest.fixture
def evil(tmp_path: Path) -> tuple[bytes, Path]:
    """A library as long as ours that leaves a mark as soon as it is loaded, and where that is."""
    mark = tmp_path / "mark"
    code = f"""
#include <stdio.h>
__attribute__((constructor)) static void enter(void) {{ fclose(fopen("{mark}", "w")); }}
int clada_op_version(void) {{ return 1; }}
"""
    content = compiled(tmp_path / "evil.so", code, ort_library_path().stat().st_size)
    assert len(content) == ort_library_path().stat().st_size
    return content, mark


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copyfile(ort_library_path(), out / "libclada_ort.so")
    return write_export(out, library="libclada_ort.so")


def test_the_mark_is_left_where_nothing_is_checked(folder: Path, evil: tuple[bytes, Path]) -> None:
    """That is what the tests below would see if they were not kept."""
    content, mark = evil
    (folder / "libclada_ort.so").write_bytes(content)
    with pytest.raises(BackendError, match="can't load the custom-op library"):
        load_engine(folder, threads=1, verify_files=False)
    assert mark.exists()


def test_a_swapped_library_is_refused_before_it_is_loaded(
    folder: Path, evil: tuple[bytes, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    content, mark = evil
    load_engine(folder, threads=1)
    (folder / "libclada_ort.so").write_bytes(content)
    with pytest.raises(UsageError, match=r"libclada_ort\.so: changed after the export"):
        load_engine(folder, threads=1)
    for command in (["run", "--prompt", "x"], ["bench"], ["inspect"], ["verify"]):
        assert main([command[0], str(folder), *command[1:]]) == 2
        assert "libclada_ort.so: changed" in capsys.readouterr().err
    assert not mark.exists()


def test_a_swap_after_the_check_changes_nothing(
    folder: Path, evil: tuple[bytes, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, mark = evil
    wanted = load_engine(folder, threads=1).generate([[1, 2]], 4).tokens
    swaps: list[Path] = []

    def swap(data: bytes, name: Path) -> Path:
        name.write_bytes(content)
        swaps.append(name)
        return check_content(data, name)

    monkeypatch.setattr(opening, "check_content", swap)
    assert load_engine(folder, threads=1).generate([[1, 2]], 4).tokens == wanted
    assert swaps == [folder / "libclada_ort.so"]
    assert not mark.exists()


def test_a_library_of_the_user_is_loaded_as_it_is(folder: Path, evil: tuple[bytes, Path], tmp_path: Path) -> None:
    content, mark = evil
    load_engine(folder, threads=1, library=ort_library_path())
    (tmp_path / "mine.so").write_bytes(content)
    with pytest.raises(BackendError, match=r"mine\.so"):
        load_engine(folder, threads=1, library=tmp_path / "mine.so")
    assert mark.exists()


def test_a_listed_library_that_is_none(folder: Path) -> None:
    (folder / "libclada_ort.so").write_bytes(b"no library")
    files = {path.name: file_record(path) for path in folder.iterdir() if path.name != "clada.json"}
    write_manifest(folder, make_manifest(library="libclada_ort.so").with_files(files))
    with pytest.raises(BackendError, match=rf"library {folder}/libclada_ort\.so can't be loaded") as error:
        load_engine(folder, threads=1)
    assert "/proc/" not in str(error.value)


# --- the copy ---


def test_a_copy_is_sealed_and_there_is_one(tmp_path: Path) -> None:
    content = compiled(tmp_path / "a.so", "int number(void) { return 41; }")
    path = sealed_copy(content, "a.so")
    assert sealed_copy(bytes(bytearray(content)), "b.so") == path
    descriptor = os.open(path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(descriptor, b"x")
    os.close(descriptor)
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    assert ctypes.CDLL(str(path)).number() == 41


def test_a_path_that_another_library_had_is_not_used_again(tmp_path: Path) -> None:
    """The dynamic loader goes by the path: under one that is known it would give the library that was there before."""
    first = compiled(tmp_path / "a.so", "int number(void) { return 1; }")
    second = compiled(tmp_path / "b.so", "int number(void) { return 2; }")
    descriptor = os.memfd_create("other")
    os.write(descriptor, first)
    assert ctypes.CDLL(f"/proc/self/fd/{descriptor}").number() == 1
    os.close(descriptor)
    assert ctypes.CDLL(str(sealed_copy(second, "b.so"))).number() == 2


WITHOUT_MEMORY = """
import ctypes, os, sys
from pathlib import Path
from clada_export.native.sealed import sealed_copy

def refuse(name, flags):
    raise OSError(13, "Permission denied")

os.memfd_create = refuse
path = sealed_copy(Path(sys.argv[1]).read_bytes(), "a.so")
print(path, oct(path.parent.stat().st_mode & 0o777), ctypes.CDLL(str(path)).number())
"""


def test_a_private_folder_where_memory_holds_no_libraries(tmp_path: Path) -> None:
    compiled(tmp_path / "a.so", "int number(void) { return 41; }")
    command = [sys.executable, "-c", WITHOUT_MEMORY, str(tmp_path / "a.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path, mode, number = done.stdout.split()
    assert (mode, number) == ("0o700", "41")
    assert not Path(path).parent.exists()


def test_both_ways_compute_the_same(folder: Path) -> None:
    checked = load_engine(folder, threads=1).logits([[1, 2, 3]])[0]
    unchecked = load_engine(folder, threads=1, verify_files=False).logits([[1, 2, 3]])[0]
    np.testing.assert_array_equal(checked, unchecked)
