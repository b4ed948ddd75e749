"""FFNs of eager models are found by structure, and their weights give the model's own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clada_export.decoder.ffn import find_eager_ffns
from clada_export.decoder.tap import FFNTap
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.op.reference import sparse_ffn
from clada_export.op.scorer import layer_attributes, layer_tensors
from tests.tiny_models import KINDS, ffn_names, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_dense_op_equals_the_module(kind: str) -> None:
    model = tiny_model(kind, 0)
    ffns = find_eager_ffns(model)
    assert [ffn.name for ffn in ffns.found] == list(ffn_names(kind))
    assert not ffns.skipped
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        inputs[index] = x

    def outer(index: int, y: Tensor) -> None:
        seen[index] = (inputs[index], y)

    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), FFNTap(ffns.found, inner=inner, outer=outer):
        model(input_ids=ids, use_cache=False)
    assert len(seen) == 2
    for index, ffn in enumerate(ffns.found):
        x, y = seen[index]
        attributes = layer_attributes(ffn, "gate", "threshold")
        tensors = layer_tensors(ffn, "gate", torch.zeros(1))
        load = torch.full(x.shape[:-1], float("inf"))
        with torch.no_grad():
            found = sparse_ffn(x, load, tensors, attributes)
        torch.testing.assert_close(found.y, y, rtol=1e-5, atol=1e-6)
        assert bool((found.active == ffn.intermediate_size).all())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3"])
def test_tap_replaces_outputs_and_leaves_no_trace(kind: str) -> None:
    model = tiny_model(kind, 0)
    ffns = find_eager_ffns(model).found
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with FFNTap(ffns, replace=lambda index, x: torch.zeros_like(x)):
            without = model(input_ids=ids, use_cache=False).logits
        after = model(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(before, without)
    assert torch.equal(before, after)


def test_experts_stay_dense_and_are_named() -> None:
    ffns = find_eager_ffns(tiny_model("mixtral", 0))
    assert not ffns.found
    assert {item.name for item in ffns.skipped} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all("experts" in item.reason for item in ffns.skipped)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp: mixture of experts"):
        TorchDecoder(tiny_model("mixtral", 0)).require_ffns()
