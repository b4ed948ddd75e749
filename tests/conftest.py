"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# Wall-clock deadlines say more about the machine than about the code.
settings.register_profile("clada", deadline=None)
settings.load_profile("clada")
