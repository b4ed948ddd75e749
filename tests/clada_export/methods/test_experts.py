"""Experts and their routers, on small data where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clada_export.decoder.ffn import find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.methods.d2dmoe import train as d2dmoe
from clada_export.methods.dejavu import train as dejavu
from clada_export.methods.ds_moe import train as ds_moe
from clada_export.methods.llama_moe import train as llama_moe
from clada_export.methods.lte import train as lte
from clada_export.methods.moefication import train as moefication
from clada_export.methods.training.cluster import cluster_neurons, within_distance
from clada_export.methods.training.layer import ExpertLayer, Reconstruction, group_neurons
from clada_export.methods.training.metrics import captured_share, top_mask
from clada_export.methods.training.samples import collect_samples
from clada_export.methods.training.train import TrainingReport, TrainingSettings, fit, split_rows
from clada_export.op.reference import activate
from clada_export.op.router import RouterModule
from graph_passes.router import Router
from tests.tiny_models import tiny_model

D, G, E = 24, 4, 8
F = G * E
ROWS = 600

Trainer = Callable[[ExpertLayer], tuple[Router, TrainingReport]]
TRAINERS: dict[str, Trainer] = {
    "dejavu": dejavu.train_dejavu,
    "moefication": moefication.train_moefication,
    "d2dmoe": d2dmoe.train_d2dmoe,
    "lte": lambda layer: lte.train_lte(layer, efficiency=0.5),
    "llama_moe": lambda layer: llama_moe.train_llama_moe(layer, k=2),
    "ds_moe": lambda layer: ds_moe.train_ds_moe(layer, k=2),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted_weights(seed: int = 0, spread: float = 0.3) -> tuple[Tensor, np.ndarray]:
    """(w_in [F, 2, D] whose gate rows lie around E directions of very different lengths, the true expert of each neuron)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:E]
    truth = torch.arange(E).repeat_interleave(G)[torch.randperm(F, generator=generator)]
    gate = directions[truth] + spread * torch.randn(F, D, generator=generator) / D**0.5
    length = torch.logspace(-1, 1, F)[torch.randperm(F, generator=generator)]
    up = torch.randn(F, D, generator=generator)
    return torch.stack((gate * length.unsqueeze(1), up), dim=1), truth.numpy()


def planted_layer(seed: int = 0, activation: str = "relu", granule: int = G) -> ExpertLayer:
    """A plain FFN whose experts' neurons look the same way, each row of x near the directions of two experts."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:E]
    w_in = directions.repeat_interleave(G, dim=0) + 0.05 * torch.randn(F, D, generator=generator)
    w_out = torch.randn(F, D, generator=generator) / D**0.5
    strength = torch.zeros(ROWS, E).scatter_(1, torch.rand(ROWS, E, generator=generator).topk(2, dim=1).indices, 4.0)
    x = (strength - 1.0) @ directions + 0.3 * torch.randn(ROWS, D, generator=generator)
    h = activate(activation, x @ w_in.t())
    return group_neurons(x, h, w_in.unsqueeze(1), w_out, None, granule, activation)


# clustering


def test_planted_clusters_are_found_whatever_the_length_of_the_rows() -> None:
    w_in, truth = planted_weights()
    order = cluster_neurons(w_in, G)
    assert order.dtype == np.int64
    groups = truth[order].reshape(E, G)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == E


def test_only_the_gate_row_counts() -> None:
    w_in, _ = planted_weights()
    changed = w_in.clone()
    changed[:, 1] = torch.randn(F, D)
    assert np.array_equal(cluster_neurons(w_in, G), cluster_neurons(changed, G))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([(12, 3), (12, 12), (12, 1), (30, 5), (48, 8), (7, 7)]), st.booleans())
def test_the_order_is_a_permutation_with_sorted_experts(seed: int, sizes: tuple[int, int], equal: bool) -> None:
    f, granule = sizes
    w_in = torch.randn(f, 1, 6, generator=torch.Generator().manual_seed(seed))
    if equal:
        w_in[:] = w_in[:1]
    order = cluster_neurons(w_in, granule, seed)
    assert np.array_equal(np.sort(order), np.arange(f))
    experts = order.reshape(-1, granule)
    assert (np.diff(experts, axis=1) > 0).all() and (np.diff(experts[:, 0]) > 0).all()


def test_rows_of_zeros_can_be_clustered() -> None:
    w_in = torch.randn(12, 1, 6, generator=torch.Generator().manual_seed(0))
    w_in[:5] = 0.0
    assert np.array_equal(np.sort(cluster_neurons(w_in, 4)), np.arange(12))


def test_near_the_best_split_of_few_neurons() -> None:
    for seed in range(8):
        w_in = torch.randn(8, 1, 3, generator=torch.Generator().manual_seed(seed))
        halves = [(0, *rest) for rest in combinations(range(1, 8), 3)]
        splits = [np.array((*half, *sorted(set(range(8)) - set(half)))) for half in halves]
        distances = sorted(within_distance(w_in, split, 4) for split in splits)
        found = min(within_distance(w_in, cluster_neurons(w_in, 4, start), 4) for start in range(4))
        assert found <= distances[2] + 1e-6  # among the best three of 35


def test_beats_random_groups_without_planted_clusters() -> None:
    w_in = torch.randn(256, 1, 16, generator=torch.Generator().manual_seed(3))
    random = within_distance(w_in, np.random.default_rng(0).permutation(256), 16)
    assert within_distance(w_in, cluster_neurons(w_in, 16), 16) < 0.75 * random


def test_clusters_are_the_same_for_a_seed() -> None:
    w_in = torch.randn(128, 2, 16, generator=torch.Generator().manual_seed(4))
    assert np.array_equal(cluster_neurons(w_in, 8, 5), cluster_neurons(w_in, 8, 5))
    assert not np.array_equal(cluster_neurons(w_in, 8, 5), cluster_neurons(w_in, 8, 6))


def test_cluster_errors() -> None:
    w_in = torch.randn(48, 2, 8)
    with pytest.raises(UsageError, match=r"layer 3: 48 neurons can't be split into experts of 32; sizes that fit: 8, 16$"):
        cluster_neurons(w_in, 32, name="layer 3")
    with pytest.raises(UsageError, match="can't be split"):
        cluster_neurons(w_in, 0)
    w_in[0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match="not finite"):
        cluster_neurons(w_in, 8)


# samples


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3", "opt", "gpt2"])
def test_samples_are_what_flows_through_the_model(kind: str) -> None:
    model = tiny_model(kind)
    ffns = find_eager_ffns(model).found
    windows = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(1))
    steps: list[tuple[int, int]] = []
    samples = collect_samples(TorchDecoder(model), windows, 20, 0, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    down = dict(model.named_modules())[ffns[1].name]
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().reshape(16, -1)))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    handle.remove()
    layer = samples.layer(1)
    assert layer.x.shape == (20, 64) and layer.h.shape == (20, 96)
    candidates = torch.stack(seen)
    distance = torch.cdist(layer.h, candidates.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert float(distance.values.max()) < 1e-3
    places = distance.indices
    assert len(set(places.tolist())) == 20  # without replacement
    assert (places % 16 != 0).all()  # never a window's first token
    assert [item.ffn.name for item in samples] == [ffn.name for ffn in ffns]


def test_samples_depend_on_the_seed_only() -> None:
    model = tiny_model("llama")
    windows = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    first, second, other = (collect_samples(TorchDecoder(model), windows, 8, seed).inputs[0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert len(collect_samples(TorchDecoder(model), windows, 1000, 0).inputs[0]) == 30


def test_sample_errors() -> None:
    model = tiny_model("llama")
    ffns = find_eager_ffns(model).found
    with pytest.raises(UsageError, match="at least one row"):
        collect_samples(TorchDecoder(model), torch.zeros(2, 1, dtype=torch.int64), 8, 0)
    windows = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    samples = collect_samples(TorchDecoder(model), windows, 8, 0)
    with torch.no_grad():
        ffns[1].inputs[0].weight[0, 0] = float("inf")  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"layers\.1\..*activations are not finite"):
        samples.layer(1)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.0.post_attention_layernorm" in n)[0] = float("nan")
    with pytest.raises(UsageError, match=r"layers\.0\..*inputs are not finite"):
        collect_samples(TorchDecoder(model), windows, 8, 0)


# the layer


def test_neurons_move_together() -> None:
    layer = planted_layer(activation="silu")
    order = np.random.default_rng(0).permutation(F)
    moved = group_neurons(layer.x, layer.h, layer.w_in, layer.w_out, order, G, "silu")
    assert torch.equal(moved.h, layer.h[:, order]) and torch.equal(moved.w_in, layer.w_in[order])
    torch.testing.assert_close(moved.h @ moved.w_out, layer.h @ layer.w_out)
    expert = torch.from_numpy(order[2 * G : 3 * G])
    norm = (layer.h[:, expert] @ layer.w_out[expert]).norm(dim=1)
    torch.testing.assert_close(moved.expert_norms()[:, 2], norm)
    torch.testing.assert_close(moved.expert_norms(torch.tensor([5, 3]))[:, 2], norm[[5, 3]])
    torch.testing.assert_close(
        moved.contributions()[:, 0], (layer.h[:, order[0], None] * layer.w_out[order[0]]).norm(dim=-1), atol=1e-5, rtol=1e-5
    )


def test_layer_errors() -> None:
    layer = planted_layer()
    x, h, w_in, w_out = layer.x, layer.h, layer.w_in, layer.w_out
    with pytest.raises(UsageError, match="do not fit together"):
        group_neurons(x[1:], h, w_in, w_out, None, G, "relu")
    with pytest.raises(UsageError, match="experts of 5"):
        group_neurons(x, h, w_in, w_out, None, 5, "relu")
    with pytest.raises(UsageError, match="9 rows"):
        group_neurons(x[:9], h[:9], w_in, w_out, None, G, "relu")
    with pytest.raises(UsageError, match="not a permutation"):
        group_neurons(x, h, w_in, w_out, np.zeros(F, dtype=np.int64), G, "relu")
    with pytest.raises(UsageError, match="L7: its inputs or activations are not finite"):
        group_neurons(x, h * float("nan"), w_in, w_out, None, G, "relu", "L7")


def test_both_ways_to_the_error_are_its_definition() -> None:
    layer = planted_layer(activation="silu")
    rows = torch.tensor([3, 500, 11, 42])
    weights = torch.rand(4, E, generator=torch.Generator().manual_seed(0)) * 2
    y = (layer.h @ layer.w_out)[rows]
    mixed = (layer.expert_outputs(rows) * weights.unsqueeze(-1)).sum(1)
    wanted = (mixed - y).square().sum(-1) / y.square().sum(-1)
    gradients = []
    for gram_bytes in (2**30, 0):
        variable = weights.clone().requires_grad_(True)
        errors = Reconstruction(layer, gram_bytes).error(rows, variable)
        torch.testing.assert_close(errors.detach(), wanted, rtol=1e-4, atol=1e-6)
        errors.sum().backward()
        assert variable.grad is not None
        gradients.append(variable.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert float(Reconstruction(layer).error(rows, torch.ones(4, E)).max()) < 1e-6


# the loop


def test_fit_stops_early_and_keeps_the_best() -> None:
    parameter = torch.zeros(1)
    path = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    values: list[float] = []

    def metric(rows: Tensor) -> float:
        values.append(float(parameter))
        return next(path)

    fitted = fit(
        (parameter,), lambda rows: (parameter - 9).square().sum(), metric, 50, TrainingSettings(6, 10, 0.1, patience=2)
    )
    assert fitted.epochs == len(fitted.losses) == 4
    assert float(parameter) == values[1]
    assert not parameter.requires_grad


def test_fit_stops_when_it_is_enough() -> None:
    parameter = torch.zeros(1)
    steps: list[tuple[int, int]] = []
    settings_ = TrainingSettings(9, 10, 0.1, enough=0.5)
    fit((parameter,), lambda rows: parameter.sum(), lambda rows: 0.6, 50, settings_, lambda *step: steps.append(step))
    assert steps == [(1, 9)]


@given(st.integers(2, 500), st.integers(0, 9))
def test_the_split_is_a_partition(rows: int, seed: int) -> None:
    training, heldout = split_rows(rows, seed)
    assert sorted((*training.tolist(), *heldout.tolist())) == list(range(rows))
    assert len(heldout) == max(1, round(rows / 10))


def test_metrics_by_hand() -> None:
    mass = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert captured_share(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), mass, 2) == pytest.approx((0.3, 0.7))
    assert top_mask(torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), torch.tensor([0, 2])).tolist() == [
        [False, False, False],
        [False, True, True],
    ]


# each method


@pytest.mark.parametrize("method", TRAINERS)
def test_a_router_is_the_same_for_a_seed_and_fits_the_layer(method: str) -> None:
    layer = planted_layer(activation="silu")
    before = [tensor.clone() for tensor in (layer.x, layer.h, layer.w_in, layer.w_out)]
    state = torch.random.get_rng_state()
    router, report = TRAINERS[method](layer)
    again, _ = TRAINERS[method](layer)
    assert all(np.array_equal(a, b) for a, b in zip(router.weights, again.weights, strict=True))
    assert router.scale == again.scale
    assert (router.hidden_size, router.granules) == (D, E)
    assert all(weight.dtype == np.float32 for weight in router.weights)
    scores = RouterModule(router)(layer.x)
    assert bool(torch.isfinite(scores).all()) and float(scores.min()) >= 0.0 and float(scores.std()) > 0.0
    assert report.epochs == len(report.losses) >= 1 and report.losses[-1] < report.losses[0]
    assert report.seconds > 0.0 and all(np.isfinite(value) for value in report.metrics.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    for tensor, old in zip((layer.x, layer.h, layer.w_in, layer.w_out), before, strict=True):
        assert torch.equal(tensor, old) and not tensor.requires_grad


@pytest.mark.parametrize("method", TRAINERS)
def test_the_size_of_x_does_not_matter(method: str) -> None:
    layer = planted_layer(activation="silu")
    router, _ = TRAINERS[method](layer)
    larger = replace(layer, x=layer.x * 64.0, w_in=layer.w_in / 64.0)
    same, _ = TRAINERS[method](larger)
    torch.testing.assert_close(RouterModule(router)(layer.x), RouterModule(same)(larger.x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", TRAINERS)
def test_training_works_where_gradients_are_off(method: str) -> None:
    layer = planted_layer(activation="silu")
    with torch.no_grad():
        _, report = TRAINERS[method](layer)
    assert report.losses[-1] < report.losses[0]


def test_dejavu_learns_which_neurons_fire() -> None:
    layer = planted_layer(granule=1)
    labels = dejavu.dejavu_labels(layer)
    assert torch.equal(labels, layer.h > 0)
    router, report = dejavu.train_dejavu(layer)
    assert router.output == "sigmoid" and router.hidden == "identity" and router.biases == (None, None)
    assert report.metrics["chance"] < 0.45
    assert report.metrics["recall"] > 0.85
    scores = RouterModule(router)(layer.x)
    assert float(scores[labels].mean()) > float(scores[~labels].mean()) + 0.3


def test_dejavu_labels_of_smooth_activations_are_the_largest_outputs() -> None:
    layer = planted_layer(activation="silu", granule=1)
    labels = dejavu.dejavu_labels(layer, 0.25)
    assert (labels.sum(-1) == F // 4).all()
    size = layer.h.abs() * layer.w_out.norm(dim=1)
    assert bool((size.masked_fill(~labels, float("inf")).amin(-1) >= size.masked_fill(labels, 0.0).amax(-1)).all())
    assert dejavu.train_dejavu(layer, label_share=0.25)[1].metrics["recall"] > 0.6  # 0.25 by chance
    assert (dejavu.dejavu_labels(planted_layer(activation="silu")).sum(-1) == E // 2).all()


def test_dejavu_rank_and_errors() -> None:
    layer = planted_layer()
    assert dejavu.predictor_rank(layer) == E  # never more than the product can use
    big = replace(layer, x=torch.zeros(10, 576), h=torch.zeros(10, 1536), granule=1)
    assert dejavu.predictor_rank(big) == 61
    assert dejavu.train_dejavu(layer, rank=3)[0].weights[0].shape == (3, D)
    with pytest.raises(UsageError, match="rank 0"):
        dejavu.train_dejavu(layer, rank=0)
    for share in (0.0, 1.0):
        with pytest.raises(UsageError, match="label share"):
            dejavu.train_dejavu(layer, label_share=share)


def test_moefication_ranks_experts_by_their_activity() -> None:
    layer = planted_layer()
    assert torch.equal(moefication.expert_activity(layer), layer.h.reshape(ROWS, E, G).sum(-1))
    router, report = moefication.train_moefication(layer)
    assert router.normalise and router.hidden == "tanh" and router.output == "sigmoid"
    assert report.metrics["captured"] <= report.metrics["oracle"] + 1e-6
    assert report.metrics["ratio"] > 0.95
    smooth = planted_layer(activation="silu")
    torch.testing.assert_close(moefication.expert_activity(smooth)[:, 0], smooth.contributions()[:, :G].sum(-1))
    begun, _ = moefication.train_moefication(layer, settings=replace(moefication.SETTINGS, learning_rate=0.0))
    centre = torch.nn.functional.normalize(layer.w_in[:G, 0], dim=-1).mean(0)
    np.testing.assert_allclose(begun.weights[0][0], centre.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(begun.weights[1], np.eye(E, dtype=np.float32))


def test_d2dmoe_foretells_the_norms_in_their_own_units() -> None:
    layer = planted_layer()
    router, report = d2dmoe.train_d2dmoe(layer)
    assert router.output == "abs" and router.hidden == "relu" and router.weights[0].shape == (128, D)
    assert report.metrics["r2"] > 0.85
    norms = layer.expert_norms()
    assert router.scale == pytest.approx(float(norms.mean()))
    off = (RouterModule(router)(layer.x) - norms).square().mean()
    assert float(off) < 0.15 * float((norms - norms.mean(0)).square().mean())


def test_lte_shuts_more_with_more_weight_on_efficiency() -> None:
    layer = planted_layer(activation="silu")
    shut = [lte.train_lte(layer, efficiency=value)[1].metrics["sparsity"] for value in (0.0, 0.05, 0.5)]
    assert shut[0] < 0.05 and shut[0] < shut[1] < shut[2]
    sure, unsure = (lte.train_lte(layer, efficiency=0.5, separability=value)[1].metrics["unsure"] for value in (0.02, 0.0))
    assert sure < unsure


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.8])
def test_lte_hits_a_sparsity(wanted: float) -> None:
    layer = planted_layer(activation="silu")
    router, report = lte.lte_for_sparsity(layer, wanted)
    assert report.metrics["sparsity"] == pytest.approx(wanted, abs=0.02)
    heldout = layer.x[split_rows(ROWS, 0)[1]]
    assert float((RouterModule(router)(heldout) <= 0.5).float().mean()) == pytest.approx(wanted, abs=0.021)
    # Experts are shut where they matter least: far better than shutting as many at random.
    assert report.metrics["captured"] > (1 - wanted) + 0.6 * (report.metrics["oracle"] - (1 - wanted))


def test_lte_hits_a_sparsity_that_no_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lte, "TRIALS", 1)
    _, report = lte.lte_for_sparsity(planted_layer(activation="silu"), 0.9)
    assert report.metrics["bias_shift"] < 0.0 and report.metrics["trainings"] == 1.0
    assert report.metrics["sparsity"] == pytest.approx(0.9, abs=0.02)


def test_lte_errors() -> None:
    layer = planted_layer()
    for sparsity in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="sparsity"):
            lte.lte_for_sparsity(layer, sparsity)
    with pytest.raises(UsageError, match="efficiency is -1"):
        lte.train_lte(layer, efficiency=-1.0)


def test_llama_moe_finds_the_experts_that_make_the_output() -> None:
    layer = planted_layer()
    router, report = llama_moe.train_llama_moe(layer, k=2)
    assert router.output == "softmax" and router.scale == pytest.approx(report.metrics["scale"])
    assert report.metrics["captured"] > 0.9 * report.metrics["oracle"]
    rows = split_rows(ROWS, 0)[1]
    scores = RouterModule(router)(layer.x[rows])
    chosen = scores * top_mask(scores, 2)
    y = (layer.h @ layer.w_out)[rows]
    mixed = (layer.expert_outputs(rows) * chosen.unsqueeze(-1)).sum(1)
    assert report.metrics["error"] == pytest.approx(float(((mixed - y).norm(dim=-1) / y.norm(dim=-1)).mean()), rel=1e-3)
    assert report.metrics["error"] < 0.5


def test_ds_moe_finds_the_experts_and_spreads_rows_over_them() -> None:
    layer = planted_layer()
    router, report = ds_moe.train_ds_moe(layer, k=2)
    less = ds_moe.train_ds_moe(layer, k=2, information=0.0)[1]
    assert router.output == "softmax" and router.scale == 2.0
    assert less.metrics["information"] < report.metrics["information"] < np.log(E)
    assert report.metrics["captured"] > 0.95 * report.metrics["oracle"]
    assert report.metrics["error"] < 0.4 and report.metrics["unweighted"] < 0.1


def test_mutual_information_at_its_ends() -> None:
    assert float(ds_moe.mutual_information(torch.full((5, E), 1 / E))) == pytest.approx(0.0, abs=1e-6)
    assert float(ds_moe.mutual_information(torch.eye(E))) == pytest.approx(np.log(E))
    assert float(ds_moe.mutual_information(torch.eye(E)[:1].expand(5, E))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("train", [llama_moe.train_llama_moe, ds_moe.train_ds_moe])
@pytest.mark.parametrize("k", [0, E + 1])
def test_k_must_be_a_number_of_experts(train: Callable[..., object], k: int) -> None:
    with pytest.raises(UsageError, match=f"{k} experts to run of {E}"):
        train(planted_layer(), k=k)
