"""What a user may ask of a policy."""

from __future__ import annotations

from dataclasses import dataclass

from clada_export.calibration.allocation import ALLOCATIONS
from clada_export.errors import UsageError
from clada_export.methods.prune_spec import check_pattern
from clada_export.plan.ranges import GRANULE, RANK, ROWS, require_between
from graph_passes.op import SCORES


@dataclass(frozen=True)
class PolicySettings:
    """What a user may ask of a policy; None is the policy's own choice. A policy takes of it what it has.

    Attributes:
        score: one of the policy's scores.
        allocation: how layers share (`clada_export.calibration.allocation.ALLOCATIONS`).
        prior: whether the prompt statistic may weigh the thresholds.
        granule: neurons of an expert.
        rank: width of a predictor, or of what fine-tuning adds to the weights.
        rows: token rows that routers are trained on.
        finetune: whether the model's weights are trained along with the routers.
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
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UsageError(f"--allocation {self.allocation!r} is unknown; known: {', '.join(ALLOCATIONS)}")
