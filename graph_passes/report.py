"""What the FFN rewrite did, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from graph_passes.search import FFNMiss


@dataclass(frozen=True)
class RewrittenFFN:
    """One layer: `nodes_before` nodes became `nodes_after`; `weight_bytes` are those of the repacked weights and biases,
    `constant_bytes` those of threshold and score constants. `shares_weights_with` names the layer whose weights it uses.
    `bytes_before` are those of the matrices as the graph had them."""

    name: str
    node: str
    kind: str
    hidden_size: int
    intermediate_size: int
    nodes_before: int
    nodes_after: int
    weight_bytes: int
    constant_bytes: int
    shares_weights_with: str | None = None
    bytes_before: int = 0


@dataclass
class RewriteReport:
    """`ffns` in graph order, `misses` with reasons, node counts of the main graph before and after."""

    ffns: list[RewrittenFFN] = field(default_factory=list)
    misses: list[FFNMiss] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)
