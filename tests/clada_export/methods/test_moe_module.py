"""The module of an imported mixture of experts: what taps and rounding do to it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from clada_export.decoder.ffn import find_eager_ffns, plain_ffns
from clada_export.decoder.rounding import in_dtype, round_ffn_weights
from clada_export.decoder.tap import FFNTap
from clada_export.source.mixtures import RoutedMLP
from clada_export.source.mixtures.ds_moe import LAYOUT
from graph_passes.op import ContractError
from graph_passes.router import Router
from tests.token_models import TokenModel


def mixture(**settings: Any) -> RoutedMLP:
    rng = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(12, 8, generator=rng), torch.randn(12, 8, generator=rng), torch.randn(8, 12, generator=rng))
    weights = (torch.randn(3, 8, generator=rng).numpy(),)
    router = Router(
        weights, (np.ones(3, np.float32),), **{"output": "topk_softmax", "k": 1, "dense_rows": "scores", **settings}
    )
    return RoutedMLP(gate, up, down, torch.nn.functional.silu, router, LAYOUT)


def test_plain_is_undone_after_an_error() -> None:
    model = nn.Sequential(mixture())
    x = torch.randn(4, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), plain_ffns(model):
        torch.testing.assert_close(
            model(x), model[0].down_proj(torch.nn.functional.silu(model[0].gate_proj(x)) * model[0].up_proj(x))
        )
        raise RuntimeError("inside")
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_tap_sees_and_replaces_a_mixture() -> None:
    block = mixture()
    x = torch.randn(4, 8)
    y = block(x)
    seen: list[Tensor] = []
    ffns = find_eager_ffns(TokenModel(block, width=8)).found
    assert [ffn.name for ffn in ffns] == ["blocks.0.down_proj"]
    with FFNTap(ffns, inner=lambda index, x, h: seen.append(h)):
        block(x)
    torch.testing.assert_close(block.down_proj(seen[0]), y)
    with FFNTap(ffns, replace=lambda index, x: x * 2):
        torch.testing.assert_close(block(x), x * 2)


def test_rounding_leaves_the_router() -> None:
    model = nn.Sequential(mixture())
    before = model[0].router_weight_0.clone()
    ffns = find_eager_ffns(TokenModel(model[0], width=8)).found
    assert len(ffns) == 1
    round_ffn_weights(ffns, "bfloat16")
    assert (model[0].router_weight_0 == before).all()
    model.config = PreTrainedConfig()  # which a copy says its type in
    copy = in_dtype(model, "bfloat16")
    x = torch.randn(4, 8)
    assert copy(x.bfloat16()).dtype == torch.bfloat16 and copy[0].router_weight_0.dtype == torch.float32
    torch.testing.assert_close(copy(x.bfloat16()).float(), model(x.bfloat16().float()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fault", ["dense_rows", "granules", "shapes"])
def test_the_module_refuses_what_does_not_fit(fault: str) -> None:
    good = mixture()
    gate, up, down = (layer.weight for layer in (good.gate_proj, good.up_proj, good.down_proj))
    router = good.router
    if fault == "dense_rows":
        router = replace(router, dense_rows="ones")
    if fault == "granules":
        gate, up, down = gate[:11], up[:11], down[:, :11]
    if fault == "shapes":
        down = down.T
    with pytest.raises(ContractError, match="RoutedMLP"):
        RoutedMLP(gate, up, down, good.act_fn, router, good.layout)
