"""What an export was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clada_export.calibration import Budget
from clada_export.calibration.budget import parse_sparsity
from clada_export.calibration.cache import default_cache_folder
from clada_export.calibration.choose import AUTO
from clada_export.errors import UsageError
from clada_export.methods import PolicySettings, get_policy
from clada_export.methods.static import PruneSpec
from clada_export.plan.goal import DEFAULT_BUDGET
from clada_export.plan.ranges import CONTEXT, SEED, require_between
from clada_export.plan.targets import merging_refused
from clada_export.targets.common import WEIGHT_TYPES
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.registry import TARGETS
from clada_export.workers.start import parse_pool

DTYPES = tuple(WEIGHT_TYPES)


@dataclass(frozen=True)
class ExportOptions:
    """What `clada-export` was asked for; the defaults are those of the command line. `tensorrt` is for target `trt` only."""

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
