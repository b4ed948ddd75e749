"""The cost model counts what a weight format stores."""

from __future__ import annotations

import pytest

from clada_export.plan import reads
from clada_export.plan.layer import LayerPlan
from clada_export.plan.reads import WEIGHT_BYTES, read_bytes
from graph_passes.op import WEIGHT_FORMATS


def layer() -> LayerPlan:
    return LayerPlan(name="ffn", hidden_size=64, intermediate_size=96, activation="silu", gated=True, threshold=(0.1,))


def test_every_format_of_the_contract_has_a_cost() -> None:
    assert set(WEIGHT_BYTES) == set(WEIGHT_FORMATS)


@pytest.mark.parametrize("item", [2, 4])
def test_plain_weights_are_numbers_of_their_type(item: int) -> None:
    # Score prefix reads nothing before it decides: three rows of each neuron that runs.
    assert read_bytes(layer(), "prefix", 0.5, item, weight_format="plain") == 96 * 0.5 * 3 * 64 * item


def test_weights_are_counted_in_their_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "WEIGHT_BYTES", {**WEIGHT_BYTES, "halved": lambda item: item / 2})
    plain, halved = (read_bytes(layer(), "gate", 0.25, 4, 10, kind) for kind in ("plain", "halved"))
    assert halved - 10 * reads.ROUTER_ITEM == pytest.approx((plain - 10 * reads.ROUTER_ITEM) / 2)
