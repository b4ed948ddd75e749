"""How much memory and disk are left, by what the system says in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clada_export.files.capacity import available_memory, disk

GB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    return tmp_path


def _left(machine: Path) -> int | None:
    return available_memory(machine / "meminfo", machine / "cgroup", machine / "groups")


def _group(folder: Path, limit: object, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {used - cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
    )


def test_without_limits_the_system_says(machine: Path) -> None:
    assert _left(machine) == 32 * GB


def test_a_groups_page_cache_is_free(machine: Path) -> None:
    _group(machine / "groups", 8 * GB, 7 * GB, 5 * GB)
    assert _left(machine) == 6 * GB


def test_no_limit_is_none(machine: Path) -> None:
    _group(machine / "groups", "max", 7 * GB, 0)
    assert _left(machine) == 32 * GB


def test_the_tightest_group_around_the_process_counts(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/slice/inner\n")
    _group(machine / "groups" / "slice", 4 * GB, 3 * GB, 0)
    _group(machine / "groups" / "slice" / "inner", 8 * GB, GB, 0)
    _group(machine / "groups" / "beside", 1, 1, 0)
    assert _left(machine) == GB


def test_the_first_version_of_groups(machine: Path) -> None:
    (machine / "cgroup").write_text("3:cpu:/a\n2:memory,hugetlb:/job\n")
    job = machine / "groups" / "memory" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text(str(3 * GB))
    (job / "memory.usage_in_bytes").write_text(str(2 * GB))
    (job / "memory.stat").write_text(f"total_inactive_file {GB}\n")
    assert _left(machine) == 2 * GB


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert _left(tmp_path) is None


def test_the_disk_of_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    found = disk(tmp_path / "not" / "made" / "yet")
    assert found.device == tmp_path.stat().st_dev
    assert 0 < found.free <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
