"""What a method of this folder is: a policy with its settings, which makes its own plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, Calibrator
from clada_export.calibration.context import PolicyContext
from clada_export.calibration.thresholds import plan_thresholds
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.methods.common.checks import check_score
from clada_export.methods.settings import PolicySettings
from clada_export.plan.method import Method


@dataclass(frozen=True, kw_only=True)
class MethodPolicy(ABC):
    """A policy that chooses thresholds; one that goes another way to a plan has its own `plan`.

    Attributes:
        name: what `--policy` calls it.
        scores: the op's scores that it can use, the default first.
        trained: whether it trains routers on the calibration text.
        responds: whether a response to the load is fitted. Any engine can be run under a load of the user's choice.
        finetunes: whether it can train the model's weights too, if the user asks for it.
        prunes: whether all it does is to prune weights.
        segment_state: whether its layers keep segment state, which not every target has.
        imports: the checkpoint layout (`clada_export.source.mixtures`) whose experts and routers it takes as they are.
        settings: what the user asked of it.
    """

    name: str
    scores: tuple[str, ...]
    trained: bool = False
    responds: bool = False
    finetunes: bool = False
    prunes: bool = False
    segment_state: bool = False
    imports: str | None = None
    settings: PolicySettings = field(default_factory=PolicySettings)

    def check_options(self, pruned: bool) -> None:
        """Refuse, before the model is read, settings that the policy does not have, or that exclude each other.

        Args:
            pruned: whether the user has weights pruned before.

        Raises:
            UsageError: names the option.
        """
        if self.settings.finetune and not self.finetunes:
            raise UsageError(f"--finetune: policy {self.name!r} does not train the model's weights")
        if self.settings.finetune and pruned:
            raise UsageError("--finetune and --prune exclude each other: training would fill the zeros again")
        # Where a router scores, an imported mixture brings its own, and options for making one are named and ignored.
        if "external" not in self.scores:
            check_score(self.name, self.scores, self.settings.score)

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Refuse, before any work, a model that can't carry the policy.

        Raises:
            UsageError: names the layer and the reason.
        """
        check_score(self.name, self.scores, self.settings.score)

    def left_out(self, ffns: Sequence[EagerFFN]) -> str | None:
        """Why `--policy auto` does not measure it for this model; None if it does."""
        try:
            self.check_options(pruned=False)
            self.check(ffns)
        except UsageError as error:
            return str(error)
        return None

    @property
    def made_with(self) -> Mapping[str, Any]:
        """What its methods depend on beside the context."""
        return {"policy": self.name, "settings": asdict(self.settings)}

    def plan(self, calibrator: Calibrator, source: dict[str, Any], options: CalibrationOptions) -> CalibrationResult:
        """Choose thresholds; the model's weights are left pruned as the plan says.

        Args:
            source: goes into the plan; holds at least `weights_digest`.

        Raises:
            UsageError: settings that do not fit, a budget that nothing meets.
        """
        self.check_options(options.prune is not None)
        return plan_thresholds(calibrator, self, source, options, pruning=options.prune, allocation=self.settings.allocation)

    def foreseen(self, context: PolicyContext) -> tuple[Method, ...]:
        """Its methods, if they are made without any training and its plan measures them on the weights as the user has them."""
        return () if self.trained or self.prunes or self.segment_state else self.methods(context)

    @abstractmethod
    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """The variants to measure, the plainest first.

        Raises:
            UsageError: as `check`.
        """
