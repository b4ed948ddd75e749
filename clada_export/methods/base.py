"""What a policy is: where scores come from, and which rule picks neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.pruning import PruneSpec
from clada_export.methods.pruning.spec import check_pattern
from clada_export.plan.method import Method
from clada_export.plan.ranges import GRANULE, RANK, ROWS, require_between
from graph_passes.op import SCORES

Progress = Callable[[str, int, int], None]

ALLOCATION_NAMES = ("cett", "sparsity", "level", "sensitivity", "fisher", "dense")
"""How layers can share a sparsity: `clada_export.calibration.allocation`."""


@dataclass(frozen=True)
class PolicySettings:
    """What a user may ask of a policy; None is the policy's own choice.

    Attributes:
        score: one of the policy's scores.
        allocation: how layers share (`clada_export.calibration.allocation.ALLOCATIONS`).
        prior: whether the prompt statistic may weigh the thresholds (`clada` only).
        granule: neurons of an expert.
        rank: width of a predictor, or of what fine-tuning adds to the weights.
        rows: token rows that routers are trained on.
        finetune: whether the model's weights are trained along with the routers (`lte` only).
        pattern: of static pruning: `unstructured`, `n:m` or `neurons`.
    """

    score: str | None = None
    allocation: str | None = None
    prior: bool = True
    granule: int | None = None
    rank: int | None = None
    finetune: bool = False
    rows: int = 2048
    pattern: str | None = None

    def check(self) -> None:
        """Refuse what no policy can use.

        Raises:
            UsageError: names the option and what is allowed.
        """
        require_between("--granule", self.granule, GRANULE)
        require_between("--rank", self.rank, RANK)
        require_between("--rows", self.rows, ROWS)
        if self.score is not None and self.score not in SCORES:
            raise UsageError(f"--score {self.score!r} is unknown; known: {', '.join(SCORES)}")
        if self.pattern is not None:
            check_pattern(self.pattern)
        if self.allocation is not None and self.allocation not in ALLOCATION_NAMES:
            raise UsageError(f"--allocation {self.allocation!r} is unknown; known: {', '.join(ALLOCATION_NAMES)}")


@dataclass(frozen=True)
class PolicyContext:
    """What a policy sees of the model.

    Attributes:
        windows: int64 [N, context], the calibration text.
        sparsity: the mean sparsity that is aimed at first; methods trained for a sparsity are trained for this one.
        prompt: tokens of a window that are its prompt.
        kept: the neurons that pruning left of each FFN, int64 ascending, by name; FFNs that are not in it are whole.
        seed: of everything random.
        progress: called with (what, done, total).
    """

    decoder: Decoder
    windows: Tensor
    sparsity: float
    prompt: int
    kept: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0
    settings: PolicySettings = field(default_factory=PolicySettings)
    progress: Progress = lambda what, done, total: None

    @property
    def ffns(self) -> tuple[EagerFFN, ...]:
        """Of the decoder."""
        return self.decoder.ffns


class Policy(Protocol):
    """One method. Its file in `clada_export/methods/` is the only place that knows it."""

    @property
    def name(self) -> str:
        """What `--policy` calls it."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it trains routers on the calibration text."""
        ...

    @property
    def responds(self) -> bool:
        """Whether a response to the load is fitted. Any engine can be run under a load of the user's choice."""
        ...

    @property
    def merges(self) -> bool:
        """Whether it merges experts for each segment: then there is no threshold to choose, and TensorRT can't run it."""
        ...

    @property
    def finetunes(self) -> bool:
        """Whether it can train the model's weights too, if the user asks for it."""
        ...

    @property
    def scores(self) -> tuple[str, ...]:
        """The op's scores that it can use, the default first."""
        ...

    def check(self, ffns: Sequence[EagerFFN], settings: PolicySettings) -> None:
        """Refuse, before any work, a model that can't carry the policy.

        Raises:
            UsageError: names the layer and the reason.
        """
        ...

    def prune_at(self, sparsity: float, settings: PolicySettings) -> PruneSpec | None:
        """How the weights are pruned before a method of this sparsity is measured; None for a dynamic policy.

        Raises:
            UsageError: settings that do not fit.
        """
        ...

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """The variants to measure, the plainest first.

        Raises:
            UsageError: as `check`.
        """
        ...


class Dynamic:
    """What policies share that do not touch the weights."""

    merges = False
    finetunes = False

    def prune_at(self, sparsity: float, settings: PolicySettings) -> PruneSpec | None:
        """Nothing is pruned."""
        return None


def check_finetune(policy: Policy, settings: PolicySettings, pruned: bool) -> None:
    """Refuse fine-tuning where a policy does not have it, or where it would fill what pruning has emptied.

    Raises:
        UsageError: says which.
    """
    if settings.finetune and not policy.finetunes:
        raise UsageError(f"--finetune: policy {policy.name!r} does not train the model's weights; use --policy lte")
    if settings.finetune and pruned:
        raise UsageError("--finetune and --prune exclude each other: training would fill the zeros again")


def check_score(name: str, scores: Sequence[str], settings: PolicySettings) -> None:
    """Refuse a score that the policy does not have.

    Raises:
        UsageError: lists those it has.
    """
    if settings.score is not None and settings.score not in scores:
        raise UsageError(f"policy {name!r} has no score {settings.score!r}; its scores: {', '.join(scores)}")


def check_gated(name: str, ffns: Sequence[EagerFFN]) -> None:
    """Refuse FFNs without a gate.

    Raises:
        UsageError: names the first.
    """
    plain = next((ffn for ffn in ffns if not ffn.gated), None)
    if plain is not None:
        raise UsageError(f"policy {name!r} reads the gate, and {plain.name} has none; use --policy clada or tt")


def check_rank(name: str, ffns: Sequence[EagerFFN], rank: int | None) -> None:
    """Refuse a rank that is larger than the matrices that it is for.

    Raises:
        UsageError: names the layer, its sizes and the rank.
    """
    narrow = next((ffn for ffn in ffns if rank is not None and rank > min(ffn.hidden_size, ffn.intermediate_size)), None)
    if narrow is not None:
        raise UsageError(
            f"policy {name!r}: --rank {rank} is more than {narrow.name} can use, which is {narrow.hidden_size} x "
            f"{narrow.intermediate_size}; give at most {min(narrow.hidden_size, narrow.intermediate_size)}"
        )


def check_granule(name: str, ffns: Sequence[EagerFFN], granule: int) -> None:
    """Refuse experts that do not divide an FFN.

    Raises:
        UsageError: names the layer, its width and the granule.
    """
    misfit = next((ffn for ffn in ffns if granule < 1 or ffn.intermediate_size % granule), None)
    if misfit is not None:
        raise UsageError(
            f"policy {name!r}: {misfit.name} has {misfit.intermediate_size} neurons, which experts of {granule} do not divide; "
            "choose another --granule"
        )
