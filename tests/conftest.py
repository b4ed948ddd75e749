"""Settings of all tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import settings

# Wall-clock deadlines say more about the machine than about the code.
settings.register_profile("clada", deadline=None)
settings.load_profile("clada")

# A test must not find what another run's calibration left in the user's cache; what other packages keep there may stay.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("HF_HOME", str(_CACHE / "huggingface"))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
_FOLDER = tempfile.TemporaryDirectory(prefix="clada-tests-")
os.environ["XDG_CACHE_HOME"] = _FOLDER.name
