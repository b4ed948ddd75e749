"""Which neurons of an eager FFN would run under a method: the op's decision, simulated with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clada_export.calibration.axis import AXES, Axis
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.spool import Spool
from clada_export.op.reference import granule_prior, per_granule, prompt_shares
from clada_export.op.router import RouterModule
from clada_export.op.scorer import LayerScorer
from clada_export.plan.layer import LayerPlan, layer_attributes
from clada_export.plan.method import Method
from clada_export.plan.tensors import LayerTensors

SHELF_LIMIT = 256 * 2**20
"""Bytes of 4-bit copies of weights that are kept in memory."""


@dataclass(frozen=True)
class Selection:
    """What a layer decided for some rows: `values` [rows or 1, E] (see `axis`), `scores` likewise if h is weighted by them."""

    values: Tensor
    scores: Tensor | None


class LayerSelector:
    """Simulates one FFN of a method on rows of one sequence. Masks and hidden activations are in the model's neuron order.

    Args:
        scorer: makes what scores the neurons, which methods that differ in other things share; None if scores come from
            elsewhere.
    """

    def __init__(
        self, layer: LayerPlan, score: str, rule: str, tensors: LayerTensors, scorer: Callable[[], LayerScorer] | None
    ) -> None:
        self.axis: Axis = AXES[rule]
        self.layer = layer
        self._scorer = scorer
        self._attributes = layer_attributes(layer, score, rule)
        self._order = None if tensors.neurons is None else torch.from_numpy(tensors.neurons)
        self._router = None if tensors.router is None else RouterModule(tensors.router)
        self.granules = layer.width // layer.granule

    @property
    def scorer(self) -> LayerScorer | None:
        """The neurons' scores, made when they are first asked for; None if they come from elsewhere."""
        return None if self._scorer is None else self._scorer()

    @property
    def needs_stat(self) -> bool:
        """Whether the prompt decides."""
        return self._attributes.use_stat

    @property
    def stat_kind(self) -> tuple[str, bytes]:
        """What `stat` depends on beside the activations; selectors of a layer with the same kind have the same statistic."""
        return self._attributes.stat_norm, b"" if self._order is None else self._order.numpy().tobytes()

    def stat(self, h: Tensor) -> Tensor:
        """The prompt statistic [1, f'] of a prompt's hidden activations [rows, f]."""
        return prompt_shares(self._ordered(h), self._attributes).sum(0, keepdim=True)

    def decide(self, x: Tensor, neuron_scores: Tensor | None, stat: Tensor | None) -> Selection:
        """The values of every granule.

        Args:
            x: FFN inputs [rows, d].
            neuron_scores: of `self.scorer`, [rows, f].
            stat: [1, f'], with `needs_stat` only.
        """
        attributes = self._attributes
        if self._router is not None:
            scores = self._router(x)
        elif attributes.score == "prefix":
            assert stat is not None
            scores = per_granule(stat.sqrt(), attributes.granule)
        else:
            assert neuron_scores is not None
            scores = per_granule(self._ordered(neuron_scores), attributes.granule)
        allowed = scores
        if attributes.prior_gamma > 0.0 or attributes.backbone_min > 0.0:
            assert stat is not None
            prior = granule_prior(stat, attributes.granule)[:, 0]
            if attributes.prior_gamma > 0.0:
                allowed = allowed * prior.pow(attributes.prior_gamma)
            allowed = torch.where(prior >= attributes.backbone_min, allowed, torch.tensor(float("-inf")))
        return Selection(self.axis.values(allowed), scores if attributes.combine == "weighted" else None)

    def hidden(self, h: Tensor, selection: Selection, level: Tensor | float) -> tuple[Tensor, Tensor]:
        """(what remains of h [rows, f], the active granules [rows or 1, E]).

        Args:
            level: a number, or [rows, 1].
        """
        active = ~(selection.values < level)
        factor = active if selection.scores is None else torch.where(active, selection.scores, torch.zeros(()))
        factor = factor.repeat_interleave(self.layer.granule, dim=-1) if self.layer.granule > 1 else factor
        if self._order is not None:
            whole = torch.zeros(*factor.shape[:-1], h.shape[-1], dtype=factor.dtype)
            whole[..., self._order] = factor
            factor = whole
        return (torch.where(factor, h, torch.zeros(())) if factor.dtype == torch.bool else h * factor), active

    def _ordered(self, values: Tensor) -> Tensor:
        return values if self._order is None else values[..., self._order]


class ScorerShelf:
    """The scorers of a model's FFNs, each made when it is first asked for, and kept.

    Their 4-bit copies are in memory up to `SHELF_LIMIT`, and beyond it in a file.

    Args:
        ffns: with weights that do not change while the shelf is used.
    """

    def __init__(self, ffns: Sequence[EagerFFN]) -> None:
        self._ffns = tuple(ffns)
        self._made: dict[tuple[str, int], LayerScorer] = {}
        self._spool: Spool | None = None
        self._size = 0

    def scorer(self, score: str, index: int) -> LayerScorer:
        """Of the FFN with this index."""
        if (score, index) not in self._made:
            self._made[score, index] = LayerScorer(self._ffns[index], score, self._keep)
        return self._made[score, index]

    def _keep(self, value: Tensor) -> Tensor:
        self._size += value.nbytes
        if self._size <= SHELF_LIMIT:
            return value
        self._spool = self._spool or Spool()
        return self._spool.copy(value)


class MethodSelectors(tuple[LayerSelector, ...]):
    """The selectors of all layers of one method."""

    method: Method

    @classmethod
    def of(cls, method: Method, layers: Sequence[LayerSelector]) -> MethodSelectors:
        """Of a method with these layers."""
        found = cls(layers)
        found.method = method
        return found


class Selectors:
    """All layers of several methods over one model; methods with the same score share their scorers.

    Args:
        methods: their layers are those of `ffns`, in the same order.
        shelf: scorers of the same FFNs that others use too.
    """

    def __init__(self, ffns: Sequence[EagerFFN], methods: Sequence[Method], shelf: ScorerShelf | None = None) -> None:
        self.ffns = tuple(ffns)
        self.methods = tuple(methods)
        self.shelf = shelf or ScorerShelf(ffns)
        self.layers = tuple(MethodSelectors.of(method, self._layers(method)) for method in methods)

    def of(self, method: Method) -> MethodSelectors:
        """The selectors of one method."""
        return self.layers[self.methods.index(method)]

    def _layers(self, method: Method) -> list[LayerSelector]:
        scored = method.score not in ("prefix", "external")
        return [
            LayerSelector(
                layer,
                method.score,
                method.rule,
                method.arrays.get(layer.name, LayerTensors()),
                partial(self.shelf.scorer, method.score, index) if scored else None,
            )
            for index, (_, layer) in enumerate(zip(self.ffns, method.layers, strict=True))
        ]


def decide(selector: LayerSelector, x: Tensor, h: Tensor, prompt: int, known: dict[int, Tensor] | None = None) -> Selection:
    """Decide for the rows of one sequence that come after its prompt.

    Args:
        x, h: FFN inputs [rows, d] and hidden activations [rows, f] of the whole sequence.
        prompt: how many rows are the prompt.
        known: neuron scores by scorer, so that methods which share one compute them once.
    """
    stat = selector.stat(h[:prompt]) if selector.needs_stat else None
    scores = None
    scorer = selector.scorer
    if scorer is not None:
        memo = {} if known is None else known
        if id(scorer) not in memo:
            memo[id(scorer)] = scorer(x[prompt:], h[prompt:])
        scores = memo[id(scorer)]
    return selector.decide(x[prompt:], scores, stat)
