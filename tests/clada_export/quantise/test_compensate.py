"""Rounding that makes up for its own errors."""

import numpy as np
import pytest
import torch
from torch import nn

from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.plan.weights_form import FORMS
from clada_export.quantise.codes import Codes
from clada_export.quantise.compensate import compensate, compensated, inverse_factor
from clada_export.quantise.matrices import find_matrices
from clada_export.quantise.store import QuantStore
from clada_export.quantise.view import QuantisedView
from graph_passes.quant.quantise import quantise
from tests.tiny_models import tiny_model

WINDOWS = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(1))


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs that share a few directions, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    return shared + 0.3 * torch.randn(rows, columns, generator=generator)


def product_error(x: torch.Tensor, weight: torch.Tensor, decoded: np.ndarray) -> float:
    return float((x @ (torch.from_numpy(decoded) - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("bits", (4, 5, 6))
def test_the_product_changes_much_less_than_with_the_nearest_codes(bits: int) -> None:
    x, weight = correlated(512, 192, 0), torch.randn(64, 192, generator=torch.Generator().manual_seed(2))
    made = compensated(weight, inverse_factor(x, "w"), bits)
    nearest = quantise(weight.numpy(), bits, search=True)
    assert made.bits == bits
    assert product_error(x, weight, made.dequantise()) < 0.6 * product_error(x, weight, nearest.dequantise())


def test_inputs_that_have_nothing_in_common_get_the_nearest_codes() -> None:
    weight = torch.randn(40, 160, generator=torch.Generator().manual_seed(3))
    made = compensated(weight, torch.eye(160), 4)
    nearest = quantise(weight.numpy(), 4, search=True)
    np.testing.assert_array_equal(made.codes, nearest.codes)
    np.testing.assert_array_equal(made.scale, nearest.scale)


def test_codes_are_those_of_the_algorithm_as_the_paper_has_it() -> None:
    """Eq. 2 and 3 of arXiv 2210.17323 with the whole inverse, in float64, a column at a time."""
    x, weight = correlated(400, 160, 4), torch.randn(24, 160, generator=torch.Generator().manual_seed(5))
    factor = inverse_factor(x, "w")
    made = compensated(weight, factor, 5)
    inverse, w = (factor.double().t() @ factor.double()).numpy(), weight.double().numpy().copy()
    same = total = 0
    for column in range(160):
        scale = made.scale[:, column // 32].astype(np.float64)
        q = np.clip(np.rint(w[:, column] / scale), -16, 15)
        error = (w[:, column] - q * scale) / inverse[column, column]
        w[:, column:] -= np.outer(error, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        same += int((made.codes[:, column] == q + 16).sum())
        total += len(q)
    # A weight that lies on a half within float32's rounding may fall to either side, and takes a few later ones with it.
    assert same >= 0.99 * total


def test_an_input_that_is_always_zero_keeps_its_weights() -> None:
    x, weight = correlated(256, 64, 6), torch.randn(32, 64, generator=torch.Generator().manual_seed(7))
    x[:, 10] = 0.0
    decoded = compensated(weight, inverse_factor(x, "w"), 6).dequantise()
    step = np.abs(weight.numpy()).max() / 31
    assert np.abs(decoded[:, 10] - weight[:, 10].numpy()).max() <= step


def test_a_model_changes_less() -> None:
    decoder = TorchDecoder(tiny_model("llama"))
    decoder.model.eval()
    matrices = find_matrices(decoder)
    with torch.no_grad():
        exact = decoder.run_whole(WINDOWS).logits
        errors = []
        for made_up in (False, True):
            store = QuantStore(Codes(decoder, matrices), FORMS["int4"])
            if made_up:
                compensate(decoder, store, WINDOWS)
            store.make()
            with QuantisedView(store).on():
                errors.append(float((decoder.run_whole(WINDOWS).logits - exact).norm()))
        again = decoder.run_whole(WINDOWS).logits
    assert errors[1] < 0.8 * errors[0]
    assert torch.equal(again, exact)  # nothing of the pass is left


def test_every_product_is_counted_once_and_neighbours_share_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TorchDecoder(tiny_model("llama"))
    store = QuantStore(Codes(decoder, find_matrices(decoder)), FORMS["int4"])
    factors: list[str] = []
    monkeypatch.setattr(
        "clada_export.quantise.compensate.inverse_factor", lambda x, name: factors.append(name) or inverse_factor(x, name)
    )
    told: list[tuple[int, int]] = []
    compensate(decoder, store, WINDOWS, lambda done, total: told.append((done, total)))
    products = [name for name in store.names if not isinstance(store.codes.matrices.found[name].module, nn.Embedding)]
    assert told == [(done + 1, len(products)) for done in range(len(products))]
    # q, k and v; o; gate and up; down.
    expected = ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2 + ["lm_head"]
    assert [name.rsplit(".", 1)[-1] for name in factors] == expected


def test_weights_and_activations_that_are_not_finite_are_told_by_name() -> None:
    decoder = TorchDecoder(tiny_model("llama"))
    weight = dict(decoder.model.named_parameters())["model.layers.1.self_attn.o_proj.weight"]
    kept = float(weight[3, 5].detach())
    with torch.no_grad():
        weight[3, 5] = torch.nan
    store = QuantStore(Codes(decoder, find_matrices(decoder)), FORMS["int4"])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.o_proj.*row 3, column 5"):
        compensate(decoder, store, WINDOWS)
    with torch.no_grad():
        weight[3, 5] = kept
        dict(decoder.model.named_parameters())["model.layers.0.input_layernorm.weight"][0] = torch.inf
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_proj: the activations are not finite"):
        compensate(decoder, QuantStore(Codes(decoder, find_matrices(decoder)), FORMS["int4"]), WINDOWS)
