"""DS-MoE's router (arXiv 2404.05567): trained with every expert running, used with few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.methods.training.experts import require_k
from clada_export.methods.training.gates import LinearGates
from clada_export.methods.training.layer import ExpertLayer, Reconstruction
from clada_export.methods.training.metrics import captured_share, output_error, top_mask
from clada_export.methods.training.train import (
    Progress,
    RouterTask,
    TrainingReport,
    TrainingSettings,
    arrays,
    no_progress,
    train_router,
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

    def make(generator: torch.Generator) -> RouterTask:
        return _Gates(layer, reconstruction or Reconstruction(layer), k, information, generator)

    return train_router(make, layer.rows, settings, progress)


class _Gates(LinearGates):
    def __init__(
        self, layer: ExpertLayer, errors: Reconstruction, k: int, information: float, generator: torch.Generator
    ) -> None:
        super().__init__(layer, errors, generator)
        self._k, self._information = k, information
        self.parameters = (self._weight,)

    def loss(self, rows: Tensor) -> Tensor:
        gate = self._softmax(rows)
        return self._errors.error(rows, gate * self._k).mean() - self._information * mutual_information(gate)

    def metrics(self, heldout: Tensor) -> dict[str, float]:
        gate, k = self._softmax(heldout), self._k
        mask = top_mask(gate, k)
        captured, oracle = captured_share(gate, self._layer.expert_norms(heldout), k)
        return {
            "dense_error": output_error(self._errors, heldout, gate * k),
            "error": output_error(self._errors, heldout, gate * mask * k),
            "unweighted": output_error(self._errors, heldout, mask.float()),
            "captured": captured,
            "oracle": oracle,
            "information": float(mutual_information(gate)),
        }

    def router(self) -> Router:
        return Router(arrays(self._weight / self._size), (None,), output="softmax", scale=float(self._k))
