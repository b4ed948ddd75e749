"""What the engine asks of a session, whatever runs the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

LOG_SUM_EXP, ENTROPY = "log_sum_exp", "entropy"
LOAD_OUTPUTS = (LOG_SUM_EXP, ENTROPY)
"""Outputs that spare a runtime to read all logits for the load; exports made before they were added have none."""

KEPT_LOGITS = "logits_to_keep"
"""Input of graphs that compute the logits of as many last positions as it says, int64 [1]; 0, also where it is not fed: all."""


@dataclass(frozen=True)
class PassOutput:
    """One run of the graph: `logits` [B, S, V], or of the last positions that were asked for, `active` int32 [B, layers, S] or
    None, and the state for the next run.

    `log_sum_exp` and `entropy`, float32 [B], are those of the last position's logits, in nats; None if the graph has no such
    outputs.
    """

    logits: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32] | None
    state: Any
    log_sum_exp: npt.NDArray[np.float32] | None = None
    entropy: npt.NDArray[np.float32] | None = None


class Session(Protocol):
    """A loaded graph. Its states belong to it; nothing else looks into them."""

    @property
    def longest_run(self) -> int | None:
        """The most new tokens that one run takes, or None for any number."""

    @property
    def max_batch(self) -> int | None:
        """The most sequences in a batch, or None for any number."""

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that can be decoded, or None for any length."""

    def empty_state(self, batch: int) -> Any:
        """The state before the first run, for `batch` sequences."""

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], state: Any) -> PassOutput:
        """Run the graph once.

        Args:
            feeds: `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep` int64 and `load` float32; those the graph
                lacks are left out.
            state: from `empty_state` or the run before; it must not be used again.

        Raises:
            UsageError: sizes that the graph does not take.
            BackendError: what runs the graph fails.
        """
