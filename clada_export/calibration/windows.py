"""What calibration does window by window, apart from where the windows run.

A job is data: what is to be measured. It is opened at a desk, the model and the text of one process, and gives the part of one
window at a time. A runner takes a job over some windows and gives the parts back in the order of the windows, whoever computed
them: what is summed up from them is the same to the bit in one process and on many machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from clada_export.calibration.weights import FFNWeights
from clada_export.decoder.decoder import Decoder

Part = TypeVar("Part")
Given = TypeVar("Given", covariant=True)
Made = TypeVar("Made")


class View(Protocol):
    """Another way to compute the model than as its modules say, such as with quantised weights."""

    @property
    def key(self) -> str:
        """Tells what it computes from what any other does, for one model."""
        ...

    def on(self) -> AbstractContextManager[None]:
        """The model computes so meanwhile."""
        ...


class AsItIs:
    """The model as its modules say."""

    key = ""

    def on(self) -> AbstractContextManager[None]:
        """Nothing changes."""
        return nullcontext()


@dataclass
class Desk:
    """What one process runs windows with.

    Attributes:
        decoder: the model, with its weights as `weights` has left them.
        calibration, heldout: token windows, int64 [N, context] and [M, context].
        prompt: tokens of every window that are its prompt.
        weights: what changes the model's weights; None if nothing does.
        at_once: the most held-out windows that are run as one batch; None is as many as their logits allow.
        memo: what jobs of this process keep for each other, by keys of their own.
        view: how the model is computed, but for the dense side of measurements, which is always the model as it is.
    """

    decoder: Decoder
    calibration: Tensor
    heldout: Tensor
    prompt: int
    weights: FFNWeights | None = None
    at_once: int | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    view: View = field(default_factory=AsItIs)

    def as_given(self, make: Callable[[], Made]) -> Made:
        """Call with the model's weights as they were given, whatever has changed them since."""
        return make() if self.weights is None else self.weights.as_given(make)


class Job(Protocol[Given]):
    """What is to be measured of windows: data that can be sent to other machines.

    A part depends on the job, the model and its window alone: not on windows before it, nor on what else the process did.
    """

    def open(self, desk: Desk) -> Callable[[int], Given]:
        """Make what all windows need; the function that it returns measures one, from its number.

        Raises:
            CladaError: the model or its numbers can't be used; so may the function.
        """
        ...


class Runner(Protocol):
    """Runs jobs."""

    @property
    def desk(self) -> Desk:
        """That of the process which decides."""
        ...

    def run(self, job: Job[Part], windows: Sequence[int]) -> Iterator[Part]:
        """The parts of these windows, in their order.

        Raises:
            CladaError: as the job; of the first window, in their order, that has one.
        """
        ...


class InProcess:
    """Runs jobs here, one window after the other."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def run(self, job: Job[Part], windows: Sequence[int]) -> Iterator[Part]:
        """See `Runner.run`."""
        measure = job.open(self.desk)
        for window in windows:
            yield measure(window)
