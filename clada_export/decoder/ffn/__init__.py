"""The feed-forward layers of an eager model: what they are, and how they are found whatever the model is called."""

from __future__ import annotations

from clada_export.decoder.ffn.layer import EagerFFN, EagerFFNs, ScoredFFN, SkippedFFN, on_copy, plain_ffns
from clada_export.decoder.ffn.search import find_eager_ffns

__all__ = [
    "EagerFFN",
    "EagerFFNs",
    "ScoredFFN",
    "SkippedFFN",
    "find_eager_ffns",
    "on_copy",
    "plain_ffns",
]
