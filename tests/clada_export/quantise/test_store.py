"""Which matrices of a model are quantised, in which form, and what a graph gets of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.plan.weights_form import FORMS, SEARCH, WeightsForm
from clada_export.quantise.codes import Codes
from clada_export.quantise.matrices import find_matrices
from clada_export.quantise.store import QuantStore
from graph_passes.quant.op import ContractError
from graph_passes.quant.quantiser import QuantFormat, ffn_matrix
from graph_passes.quant.table import table_name
from tests.tiny_models import tiny_model

DOWN = "model.layers.0.mlp.down_proj"
MIXED = WeightsForm("mixed", 4, 5, 6, 8, SEARCH)


def store_of(kind: str, form: WeightsForm = MIXED) -> QuantStore:
    decoder = TorchDecoder(tiny_model(kind))
    return QuantStore(Codes(decoder, find_matrices(decoder)), form)


def weight(store: QuantStore, name: str) -> np.ndarray:
    return store.codes.matrices.found[name].rows().numpy()


def test_each_kind_has_its_bits() -> None:
    store = store_of("llama")
    attention = "model.layers.0.self_attn.q_proj"
    names = {ffn_matrix(DOWN, role): 4 for role in ("gate", "up", "down")} | {
        attention: 5,
        "lm_head": 6,
        table_name("model.embed_tokens"): 8,
    }
    assert {name: store.form(name) for name in names} == {name: QuantFormat(bits) for name, bits in names.items()}
    assert store.form("node_MatMul_7") == QuantFormat(5), "what a fusion packed is attention's"
    assert store.form(table_name("model.embed_positions")) is None, "a table that the model does not have stays"
    assert store.matrix(attention, weight(store, attention)).bits == 5


def test_a_tied_table_has_the_codes_of_the_head() -> None:
    store = store_of("gemma")
    assert store.form(table_name("model.embed_tokens")) == store.form("lm_head") == QuantFormat(6)
    assert store.sizes()["embedding"]["bytes"] == 0 < store.sizes()["head"]["bytes"]
    assert store.coded("model.embed_tokens") is store.coded("lm_head")


def test_packed_gate_and_up_are_given_apart() -> None:
    store = store_of("phi3")
    packed = weight(store, "model.layers.0.mlp.gate_up_proj")
    whole = store.coded("model.layers.0.mlp.gate_up_proj").decoded().numpy()
    half = len(packed) // 2
    for role, rows in (("gate", slice(0, half)), ("up", slice(half, None))):
        found = store.matrix(ffn_matrix(DOWN, role), packed[rows])
        np.testing.assert_array_equal(found.dequantise(), whole[rows])


def test_a_product_that_a_fusion_packed_is_put_together() -> None:
    store = store_of("llama")
    names = [f"model.layers.1.self_attn.{name}_proj" for name in ("q", "k", "v")]
    packed = np.concatenate([weight(store, name) for name in names])
    found = store.matrix("node_MatMul_7", packed)
    wanted = torch.cat([store.coded(name).decoded() for name in names])
    np.testing.assert_array_equal(found.dequantise(), wanted.numpy())
    with pytest.raises(ContractError, match="rows 64 and on of 'node_MatMul_7' are those of no matrix"):
        store.matrix("node_MatMul_7", np.concatenate([packed[:64], packed[65:]]))


def test_a_matrix_of_another_size_is_refused() -> None:
    store = store_of("llama")
    with pytest.raises(ContractError, match=r"'lm_head' is \[100, 64\] in the graph and \[256, 64\] in the model"):
        store.matrix("lm_head", weight(store, "lm_head")[:100])


def test_sizes_are_those_of_the_records() -> None:
    sizes = store_of("llama", FORMS["int8"]).sizes()
    assert sizes["head"] == {"bits": 8, "matrices": 1, "bytes": 256 * 64 * 34 // 32}
    assert sizes["ffn"]["matrices"] == 6 and sizes["attention"]["matrices"] == 8


def test_an_ffn_that_blocks_do_not_divide_is_named() -> None:
    decoder = TorchDecoder(tiny_model("llama", intermediate_size=80))
    with pytest.raises(UnsupportedModelError, match=rf"{DOWN}: its intermediate size is 80.*blocks of 32"):
        find_matrices(decoder)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.inf
    decoder = TorchDecoder(model)
    store = QuantStore(Codes(decoder, find_matrices(decoder)), FORMS["int8"])
    with pytest.raises(UnsupportedModelError, match=r"lm_head: .*row 3, column 5 is inf"):
        store.make()
