"""The gated FFN: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from graph_passes.matchers.candidate import Candidate, assemble, refuse_leaves
from graph_passes.matchers.common import FFNMatch, Refusal
from graph_passes.matchers.elementwise import recognise_gated
from graph_passes.matchers.projection import NoProjection

KINDS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "relu": "reglu",
    "relu2": "relu2_glu",
    "identity": "bilinear",
}


def match(found: Candidate) -> FFNMatch | Refusal:
    """Match a gated FFN at its down projection."""
    if len(found.hidden.leaves) != 2:
        return Refusal(f"{len(found.hidden.leaves)} values meet in front of the down projection; a gated FFN has 2")
    leaves = {value: found.leaf(value) for value in found.hidden.leaves}
    refusal = refuse_leaves(found, list(leaves.values()))
    if refusal is not None:
        return refusal
    recognised = recognise_gated(found.hidden)
    if recognised is None:
        return Refusal(f"activation unknown: no act(gate) * up of the op computes {found.hidden.operators}", ffn_like=True)
    if isinstance(found.product, str):
        return Refusal(found.product, ffn_like=True)
    activation, gate, up = recognised[0], leaves[recognised[1]], leaves[recognised[2]]
    assert not isinstance(gate, NoProjection) and not isinstance(up, NoProjection)
    return assemble(found, KINDS[activation], activation, gate, up, found.product)
