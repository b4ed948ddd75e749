"""What a worker is told, and what it does: opens the model once, and measures windows of job after job."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clada_export import __version__
from clada_export.artifact.versions import installed_versions
from clada_export.calibration.cache import code_digest
from clada_export.calibration.precision import has_fast_products
from clada_export.calibration.weights import FFNWeights, Pruning
from clada_export.calibration.windows import Desk, Job
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError
from clada_export.plan.tensors import LayerTensors
from clada_export.source.load import load_source
from clada_export.targets.registry import TARGETS

PACKAGES = ("torch", "transformers", "numpy")
"""Those whose version shapes numbers."""


@dataclass(frozen=True)
class Order:
    """What a worker needs to know, on any machine.

    Attributes:
        model: a Hub id, or a path that leads to the same files on every machine.
        hub: further arguments of `clada_export.source.load.load_source`.
        dtype: of the engine's weights.
        target: of the export; rounds the weights.
        calibration, heldout: token windows, int64 [N, context] and [M, context].
        prompt: tokens of every window that are its prompt.
        threads: of a worker.
        at_once: the most held-out windows that are run as one batch.
    """

    model: str
    hub: Mapping[str, Any]
    dtype: str
    target: str
    calibration: Tensor
    heldout: Tensor
    prompt: int
    threads: int
    at_once: int | None = None


@dataclass(frozen=True)
class Task:
    """A job, and the state of the weights that it is for.

    Attributes:
        number: tells the tasks of one run apart.
        digest: of the weights in this state.
    """

    number: int
    job: Job[Any]
    digest: str
    pruning: Pruning | None = None
    adapters: Mapping[str, LayerTensors] = field(default_factory=dict)


def identity(decoder: Decoder) -> dict[str, str]:
    """What has to be the same in all processes for their parts to be the same: code, packages, Python, weights."""
    return {
        "clada-export": __version__,
        "code": code_digest(),
        "python": platform.python_version(),
        **installed_versions(PACKAGES),
        "weights": decoder.weights_digest(),
    }


def instructions() -> str:
    """What PyTorch computes with: on another instruction set, sums may be rounded in another way."""
    return f"{torch.backends.cpu.get_cpu_capability()}{' and bfloat16 products' if has_fast_products() else ''}"


class CalibrationWorker:
    """Holds the model, and measures windows. Nothing long is done before `open`."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._desk: Desk | None = None
        self._digest = ""
        self._task: tuple[int, Callable[[int], Any]] | None = None

    def open(self) -> dict[str, Any]:
        """Load the model.

        Returns:
            `identity`, `host` and `instructions`.

        Raises:
            CladaError: the model can't be used.
        """
        order = self._order
        torch.set_num_threads(order.threads)
        decoder = load_source(order.model, dtype=torch.float32, **order.hub).decoder
        decoder.require_ffns()

        def rounded() -> None:
            if order.dtype != "float32":
                TARGETS[order.target].round_weights(decoder, order.dtype)

        rounded()
        weights = FFNWeights(decoder, order.calibration, rounded)
        self._desk = Desk(decoder, order.calibration, order.heldout, order.prompt, weights, order.at_once)
        found = identity(decoder)
        self._digest = found["weights"]
        return {"identity": found, "host": socket.gethostname(), "instructions": instructions()}

    def holds(self, number: int) -> bool:
        """Whether the task with this number is open here."""
        return self._task is not None and self._task[0] == number

    def take(self, task: Task) -> None:
        """Bring the weights into the task's state, and open its job.

        Raises:
            UsageError: pruning or adapters give other weights here.
            CladaError: as the job.
        """
        assert self._desk is not None and self._desk.weights is not None
        self._task = None
        if task.digest != self._digest:
            self._desk.weights.follow(task.pruning, task.adapters)
            self._digest = self._desk.decoder.weights_digest()
            if self._digest != task.digest:
                raise UsageError(
                    f"a worker on {socket.gethostname()} has other weights after pruning ({task.pruning}) or tuning than this "
                    f"process: sha256 {self._digest:.16}..., here {task.digest:.16}...; calibrate in one process, or on "
                    "machines of one kind"
                )
        self._task = task.number, task.job.open(self._desk)

    def measure(self, window: int) -> Any:
        """The part of one window under the task that was taken last."""
        assert self._task is not None
        return self._task[1](window)
