"""The view of a model with quantised weights: what it computes, where, and that nothing of the model changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.op.quant_reference import quant_matmul, quantise_rows
from clada_export.plan.weights_form import FORMS, NEAREST, WeightsForm
from clada_export.quantise.make import make_store
from clada_export.quantise.matrices import find_matrices
from clada_export.quantise.store import QuantStore
from clada_export.quantise.view import QuantisedView, round_inputs
from graph_passes.quant.layout import pack
from tests.tiny_models import tiny_model

KINDS = ("llama", "phi3", "gpt2", "gemma", "opt")
"""Gate and up apart, packed, transposed matrices with biases, a table that is scaled, and one with a padding token."""
IDS = torch.arange(3, 67).reshape(2, 32)


def decoder_of(kind: str) -> TorchDecoder:
    return TorchDecoder(tiny_model(kind))


def store_of(decoder: Decoder, name: str = "int8") -> QuantStore:
    return make_store(decoder, find_matrices(decoder), FORMS[name], IDS.repeat(2, 4))


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.run(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_view_is_near_to_the_model_and_leaves_it_as_it_was(kind: str) -> None:
    decoder = decoder_of(kind)
    before = logits(decoder)
    view = QuantisedView(store_of(decoder))
    with view.on():
        found = logits(decoder)
    assert 0 < float((found - before).norm() / before.norm()) < 0.05
    assert torch.equal(logits(decoder), before)
    assert not any("forward" in vars(module) for module in decoder.model.modules())


def test_a_view_is_off_after_an_error() -> None:
    decoder = decoder_of("llama")
    before = logits(decoder)
    with pytest.raises(KeyError), QuantisedView(store_of(decoder)).on():
        raise KeyError
    assert torch.equal(logits(decoder), before)


def test_a_product_is_that_of_the_op() -> None:
    decoder = decoder_of("llama")
    store = store_of(decoder, "int5")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    module = decoder.model.get_submodule("model.layers.1.self_attn.q_proj")
    with QuantisedView(store).on(), torch.inference_mode():
        found = module(x)
    matrix = store.coded("model.layers.1.self_attn.q_proj").matrix()
    assert matrix.bits == 6
    wanted = quant_matmul(x.numpy(), pack(matrix), matrix.attributes())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_inputs_are_rounded_as_the_op_rounds_them() -> None:
    x = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    x[0, :32], x[1, 32:64], x[2, 5], x[3, 40], x[4] = 0.0, 1e-30, np.inf, np.nan, 3e38
    q, scale = quantise_rows(x)
    with np.errstate(invalid="ignore"):
        wanted = (q * scale[..., None]).astype(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(round_inputs(torch.from_numpy(x)).numpy(), wanted)


def test_hidden_activations_are_rounded_after_they_are_masked() -> None:
    decoder = decoder_of("llama")
    store = store_of(decoder)
    seen: dict[int, torch.Tensor] = {}

    def inner(index: int, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        kept = torch.where(h.abs() < h.abs().median(), 0.0, h)
        seen[index] = kept
        return kept

    outputs: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), QuantisedView(store).on():
        tap = decoder.tap(inner=inner, outer=lambda index, y: outputs.__setitem__(index, y))
        with tap:
            decoder.run(IDS)
    down = store.coded("model.layers.0.mlp.down_proj").decoded()
    torch.testing.assert_close(outputs[0], round_inputs(seen[0]) @ down.T)


def test_inputs_that_are_moved_a_little_make_a_little_difference() -> None:
    decoder = decoder_of("llama")
    view = QuantisedView(store_of(decoder))
    exact = logits(decoder)
    with view.on():
        first, again = logits(decoder), logits(decoder)
    with view.on(torch.Generator().manual_seed(0)):
        moved = logits(decoder)
    assert torch.equal(first, again)
    assert 0 < float((moved - first).norm()) < float((first - exact).norm())


def test_other_codes_are_another_view() -> None:
    decoder = decoder_of("llama")
    matrices = find_matrices(decoder)
    forms = [FORMS["int8"], FORMS["int6"], WeightsForm("int8", 8, 8, 8, 8, NEAREST), FORMS["int8"]]
    keys = [QuantisedView(make_store(decoder, matrices, form, IDS)).key for form in forms]
    assert len(set(keys)) == 3 and keys[0] == keys[3]
