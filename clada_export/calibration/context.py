"""What calibration hands to a method, and what it asks of one whose thresholds or segment state it is to settle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.plan.method import Method

Progress = Callable[[str, int, int], None]
"""Progress within a stage: what, how many are done, how many there are (0: not known)."""


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
    progress: Progress = lambda what, done, total: None

    @property
    def ffns(self) -> tuple[EagerFFN, ...]:
        """Of the decoder."""
        return self.decoder.ffns


class MethodMaker(Protocol):
    """A policy that makes methods, and leaves it to calibration to measure them."""

    @property
    def name(self) -> str:
        """What `--policy` calls it."""
        ...

    @property
    def trained(self) -> bool:
        """Whether it trains routers on the calibration text, so that what it makes is worth keeping."""
        ...

    @property
    def responds(self) -> bool:
        """Whether a response to the load is fitted. Any engine can be run under a load of the user's choice."""
        ...

    @property
    def made_with(self) -> Mapping[str, Any]:
        """What its methods depend on beside the context, as JSON values."""
        ...

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        """The variants to measure, the plainest first.

        Raises:
            UsageError: the model can't carry the policy; names the layer.
        """
        ...
