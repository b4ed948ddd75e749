"""DS-MoE's router (arXiv 2404.05567): trained with every expert running, used with few of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.llama_moe import require_k
from clada_export.methods.training.metrics import captured_share, output_error, top_mask
from clada_export.methods.training.train import (
    Progress,
    Stopwatch,
    TrainingReport,
    TrainingSettings,
    arrays,
    fit,
    input_size,
    linear_weight,
    no_progress,
    split_rows,
)
from graph_passes.router import Router

INFORMATION = 0.1
SETTINGS = TrainingSettings(epochs=30, batch=128, learning_rate=1e-2, patience=5)


def mutual_information(gate: Tensor) -> Tensor:
    """I(expert; row) = H(mean of the gates) - mean of H(gate), nats, of gates [B, E]; at most log E."""
    average = gate.mean(0)
    marginal = -(average * average.clamp(min=1e-30).log()).sum()
    conditional = -(gate * gate.clamp(min=1e-30).log()).sum(-1).mean()
    return marginal - conditional


def train_ds_moe(
    layer: ExpertLayer,
    *,
    k: int,
    information: float = INFORMATION,
    reconstruction: Reconstruction | None = None,
    settings: TrainingSettings = SETTINGS,
    progress: Progress = no_progress,
) -> tuple[Router, TrainingReport]:
    """Linear(d, E), no bias; score = k * softmax; trained on the sum over *all* experts, used on the best k.

    loss = ||sum_e k G_e y_e - y||^2 / ||y||^2 - information * I(expert; row)

    From the paper: every expert runs in training, and a mutual-information loss makes gates concentrated in each row while
    experts stay evenly used over rows (the form of the loss is from memory). The paper trains the model from scratch; here it
    is frozen, and the first term is the FFN's own error (own derivation).

    The factor k is our own too. Gates sum to 1, and a frozen expert is right at weight 1: with the factor k a gate spread
    evenly over k experts weighs each by 1. A larger factor would do harm: there would be more weight than the experts that
    matter can take, and the error would send the rest to experts whose output is nothing.

    Args:
        k: experts a row in use, 1..E.
        information: weight of the mutual information.
        reconstruction: of the layer, if the caller has one already.

    Returns:
        The router, and a report with the metrics `dense_error` (all experts weighted by k G), `error` (the top k weighted so),
        `unweighted` (the top k summed as they are), `captured` (share of the summed expert norms within the top k), `oracle`
        (the best possible) and `information` (nats).

    Raises:
        UsageError: k is not 1..E.
    """
    require_k(layer, k)
    watch = Stopwatch()
    errors = reconstruction or Reconstruction(layer)
    size = input_size(layer.x)
    inputs = layer.x / size
    weight = linear_weight(layer.experts, layer.hidden_size, torch.Generator().manual_seed(settings.seed)) * 0.1

    def gates(rows: Tensor) -> Tensor:
        return functional.linear(inputs[rows], weight).softmax(-1)

    def loss(rows: Tensor) -> Tensor:
        gate = gates(rows)
        return errors.error(rows, gate * k).mean() - information * mutual_information(gate)

    fitted = fit((weight,), loss, lambda rows: -float(loss(rows)), layer.rows, settings, progress)
    _, heldout = split_rows(layer.rows, settings.seed)
    with torch.no_grad():
        gate = gates(heldout)
        mask = top_mask(gate, k)
        captured, oracle = captured_share(gate, layer.expert_norms(heldout), k)
        metrics = {
            "dense_error": output_error(errors, heldout, gate * k),
            "error": output_error(errors, heldout, gate * mask * k),
            "unweighted": output_error(errors, heldout, mask.float()),
            "captured": captured,
            "oracle": oracle,
            "information": float(mutual_information(gate)),
        }
    return Router(arrays(weight / size), (None,), output="softmax", scale=float(k)), watch.report(fitted, metrics)
