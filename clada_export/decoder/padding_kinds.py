"""What a row may give when it is padded on the left. Apart from what finds out which: engines run without PyTorch."""

from __future__ import annotations

LEFT, NONE = PADDINGS = ("left", "none")
"""The same as alone, or something else: then rows of a batch have to be of one length."""
