"""The plain FFN: down(act(up(x)))."""

from __future__ import annotations

from graph_passes.matchers.candidate import Candidate, assemble, refuse_leaves
from graph_passes.matchers.common import FFNMatch, Refusal
from graph_passes.matchers.elementwise import recognise_plain
from graph_passes.matchers.projection import NoProjection


def match(found: Candidate) -> FFNMatch | Refusal:
    """Match a plain FFN at its down projection."""
    if len(found.hidden.leaves) != 1:
        return Refusal(f"{len(found.hidden.leaves)} values meet in front of the down projection; a plain FFN has 1")
    up = found.leaf(found.hidden.leaves[0])
    refusal = refuse_leaves(found, [up])
    if refusal is not None:
        return refusal
    activation = recognise_plain(found.hidden)
    if activation == "identity":
        return Refusal("no activation: two projections in a row are a factorised projection, not an FFN")
    if activation is None:
        return Refusal(f"activation unknown: none of the op's computes {found.hidden.operators}", ffn_like=True)
    if isinstance(found.product, str):
        return Refusal(found.product, ffn_like=True)
    assert not isinstance(up, NoProjection)
    hidden_size, intermediate_size = up.weight.shape
    if intermediate_size <= hidden_size:
        # A gated one may be narrow: a shared expert of a mixture.
        sizes = f"it is {intermediate_size} wide, and its input {hidden_size}"
        return Refusal(f"no FFN: {sizes}, like an adapter's or a router's network")
    return assemble(found, activation, activation, None, up, found.product)
