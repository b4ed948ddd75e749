"""What padding on the left may do to a model's rows. Apart from what finds it out: an engine runs without PyTorch."""

from __future__ import annotations

LEFT, NONE = PADDINGS = ("left", "none")
"""Rows of a batch may be padded on the left, or have to be of one length."""
