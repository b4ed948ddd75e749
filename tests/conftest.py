"""Settings of all tests, and which of them run in which order and where."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cores import keep_to_own_cores
from tests.order import longest_first

# Wall-clock deadlines say more about the machine than about the code.
settings.register_profile("clada", deadline=None)
settings.load_profile("clada")

# A test must not find what another run's calibration left in the user's cache; what other packages keep there may stay.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("HF_HOME", str(_CACHE / "huggingface"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
_FOLDER = tempfile.TemporaryDirectory(prefix="clada-tests-")
os.environ["XDG_CACHE_HOME"] = _FOLDER.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what is marked long, too (make test-long runs only that)")


def pytest_configure() -> None:
    keep_to_own_cores()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked long unless it is asked for, and let the longest files begin."""
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("long")]
    longest_first(items)
