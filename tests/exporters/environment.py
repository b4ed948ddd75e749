"""Environments of other exporters, kept in `.cache/exporters/`: their own packages laid over those that are installed here."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "exporters"


def python_with(*packages: str) -> Path:
    """A Python that has these packages, pinned, before those of this environment; without what they depend on.

    The test is skipped if they can't be installed, as on a machine without a package index.
    """
    python, fault = _environment(packages)
    if fault:
        pytest.skip(f"{', '.join(packages)} can't be installed: {fault}")
    return python


@functools.cache
def _environment(packages: tuple[str, ...]) -> tuple[Path, str]:
    """Its Python, and what pip said if it could not install the packages."""
    key = hashlib.sha256(" ".join((sys.version, sys.prefix, *packages)).encode()).hexdigest()[:16]
    folder = CACHE / key
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        inside = next((folder / "lib").glob("python*/site-packages"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(inside), *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return python, done.stderr.strip().splitlines()[-1][:200]
        # A .pth is read when Python starts, and adds its folder after the environment's own.
        (inside / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "complete").touch()
    return python, ""


def run(python: Path, *arguments: str) -> None:
    """Run Python with these arguments; what it says is shown if it fails."""
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
