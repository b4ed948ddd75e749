"""What an export was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from clada_export.calibration import Budget
from clada_export.calibration.budget import parse_sparsity
from clada_export.calibration.cache import default_cache_folder
from clada_export.calibration.choose import AUTO
from clada_export.errors import UsageError
from clada_export.methods import MethodPolicy, PolicySettings, all_policies, get_policy
from clada_export.methods.static import PruneSpec
from clada_export.plan.goal import DEFAULT_BUDGET
from clada_export.plan.ranges import CONTEXT, SEED, require_between
from clada_export.plan.targets import TARGET_TRAITS, merging_refused
from clada_export.plan.weights_form import FLOATS, WEIGHTS
from clada_export.targets.common import WEIGHT_TYPES
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.registry import TARGETS
from clada_export.workers.start import parse_pool

DTYPES = tuple(WEIGHT_TYPES)
EXACT = "exact"
"""The score of quantised FFNs."""


@dataclass(frozen=True)
class ExportOptions:
    """What `clada-export` was asked for; the defaults are those of the command line. `tensorrt` is for target `trt` only.

    `weights` is the form of the engine's weights (`clada_export.plan.weights_form.WEIGHTS`); None is what `dtype` says, which
    is an older word for the forms that are types. `settled` makes one of the two.
    """

    target: str = "ort"
    tensorrt: TensorRTOptions | None = None
    policy: str = "clada"
    train: bool = False
    settings: PolicySettings = field(default_factory=PolicySettings)
    budget: str = DEFAULT_BUDGET
    sparsity: float | None = None
    prune: str | None = None
    plan: Path | None = None
    calibration_data: Path | None = None
    calibration_tokens: Path | None = None
    calibration_context: int = 512
    calibration_cache: Path | None = field(default_factory=default_cache_folder)
    calibration_workers: int = 0
    calibration_threads: int | None = None
    ray_address: str | None = None
    dtype: str = "float32"
    portable: bool = False
    weights: str | None = None
    load_response: bool = True
    verify: bool = True
    overwrite: bool = False
    seed: int = 0
    revision: str | None = None
    token: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def settled(self) -> ExportOptions:
        """The same with `weights` set, `dtype` the type of what is not quantised, and the policy told what it can use.

        Raises:
            UsageError: unknown weights, or a `dtype` that contradicts them.
        """
        weights = self.dtype if self.weights is None else self.weights
        if weights not in WEIGHTS and self.weights is not None:
            raise UsageError(f"unknown weights {weights!r}; known: {', '.join(WEIGHTS)}")
        if self.weights is not None and self.dtype not in ("float32", weights):
            raise UsageError(f"--weights {weights} and --dtype {self.dtype} contradict each other; give --weights alone")
        if not quantises(weights):
            return replace(self, weights=weights, dtype=weights)
        # What a quantised SparseFFN has: score `exact`, and no statistic of the prompt.
        return replace(self, weights=weights, settings=replace(self.settings, score=self.settings.score or EXACT, prior=False))

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            UsageError: an unknown target, dtype or policy, a budget or sparsity out of range, options that exclude each other.
            BackendError: workers are asked for, and Ray is not installed.
        """
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}; known: {', '.join(TARGETS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.portable and not TARGET_TRAITS[self.target].fuses_attention:
            raise UsageError(
                f"--portable is for --target ort; --target {self.target} always keeps attention in standard operators"
            )
        self._check_weights()
        if self.policy != AUTO:
            policy = get_policy(self.policy, self.settings)
            if policy.segment_state and (refused := merging_refused(self.target, self.policy)) is not None:
                raise UsageError(refused)
            policy.check_options(pruned=self.prune is not None)
        if self.train and self.policy != AUTO:
            raise UsageError(f"--train is for --policy {AUTO}; policy {self.policy!r} trains routers if it has any")
        self.settings.check()
        if self.prune is not None:
            PruneSpec.parse(self.prune)
            if self.plan is not None:
                raise UsageError("--prune and --plan exclude each other; a plan says how its weights are pruned")
        Budget.parse(self.budget)
        if self.sparsity is not None:
            parse_sparsity(self.sparsity)
        require_between("--calibration-context", self.calibration_context, CONTEXT)
        require_between("--seed", self.seed, SEED)
        parse_pool(self.calibration_workers, self.calibration_threads, self.ray_address)
        if self.calibration_data is not None and self.calibration_tokens is not None:
            raise UsageError("--calibration-data and --calibration-tokens exclude each other; give one")

    def _check_weights(self) -> None:
        """Refuse what quantised weights do not go with; see `settled`."""
        if self.weights is None or not quantises(self.weights):
            return
        asked = f"--weights {self.weights}"
        if (why := TARGET_TRAITS[self.target].no_quantising) is not None:
            able = " or ".join(f"--target {name}" for name, traits in TARGET_TRAITS.items() if traits.no_quantising is None)
            raise UsageError(f"{asked}: {why}; use {able}, or --weights {', '.join(FLOATS)}")
        if self.policy == AUTO:
            raise UsageError(f"{asked} and --policy {AUTO} exclude each other; name a policy with score {EXACT!r}, like clada")
        if self.settings.score not in (None, EXACT):
            raise UsageError(
                f"{asked}: quantised FFNs have score {EXACT!r} only, not {self.settings.score!r}; leave --score out"
            )
        if not _goes(get_policy(self.policy)):
            able = ", ".join(p.name for p in all_policies(self.settings).values() if _goes(p))
            raise UsageError(
                f"{asked}: quantised FFNs have score {EXACT!r} only, which policy {self.policy!r} does not; use {able}"
            )
        for option, given in (("--prune", self.prune is not None), ("--finetune", self.settings.finetune)):
            if given:
                raise UsageError(f"{asked} and {option} exclude each other: weights are quantised as the model has them")
        if self.calibration_workers:
            raise UsageError(f"{asked} is calibrated in one process; leave --calibration-workers out")


def quantises(weights: str) -> bool:
    """Whether `--weights` asks for codes."""
    return weights not in FLOATS


def _goes(policy: MethodPolicy) -> bool:
    return EXACT in policy.scores and not policy.prunes and not policy.trained
