"""What is compared: each arm is a way to give every token of every document a load.

All arms know only what an engine would know: the surprisal of the token just taken and the entropy of the distribution that it
came from, up to the step before (`docs/load-signal.md`); the controls break the tie between load and text on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from clada_export.calibration.load_response import LOAD_SLOPE
from clada_export.load.controllers import limited
from clada_export.load.signal import LoadSignal
from clada_export.load.tracker import loads_along
from clada_export.load.values import Array

SIGNALS = {"surprisal": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (0.5, 0.5)}
"""Weights of surprisal and entropy; `both` is the mean of the two."""
SLOPES = (0.05, 0.1, 0.2)
MIDDLE = 0.1
"""The slope of controls and of controllers other than `exp`."""

PLAIN, PRIOR, TOPK = "threshold", "threshold, prompt as a prior", "topk"
"""The methods that arms are applied to; each has its own still baseline."""
METHODS = (PLAIN, PRIOR, TOPK)


@dataclass(frozen=True)
class Scene:
    """What the loads of one text are made from.

    Attributes:
        surprisal, entropy: nats, [documents, context - 1]: of token t + 1, given those up to t.
        prompt: tokens of each document that run dense.
        base: calibrated statistics; weights are zero.
        prompt_surprisal: mean and standard deviation over windows of the calibration text of a prompt's mean surprisal.
    """

    surprisal: Array
    entropy: Array
    prompt: int
    base: LoadSignal
    prompt_surprisal: tuple[float, float]

    def follow(self, signal: LoadSignal, late: int = 0) -> Array:
        """The loads [documents, context - prompt] of the tokens after the prompt; `late` steps later than they could be."""
        start = max(self.prompt - 1 - late, 0)
        loads = loads_along(signal, self.surprisal[:, start:], self.entropy[:, start:])
        return loads[:, : loads.shape[1] - late]


Loads: TypeAlias = Callable[[Scene, np.random.Generator], Array]


@dataclass(frozen=True)
class Arm:
    """One way to respond.

    Attributes:
        group: arms that belong together in a table.
        loads: [documents, context - prompt]; +inf is a dense step.
        per_layer: whether the load moves the error target, and each layer's threshold by its own table (M6).
        refresh: whether dense steps enter the prompt statistic, as they do in an engine.
    """

    name: str
    group: str
    method: str
    loads: Loads
    per_layer: bool = False
    refresh: bool = True


def still(scene: Scene, rng: np.random.Generator) -> Array:
    """No response."""
    return np.zeros((len(scene.surprisal), scene.surprisal.shape[1] + 1 - scene.prompt))


def response(signal: str, slope: float, late: int = 0, **changes: Any) -> Loads:
    """A controller of `clada_export.load.controllers` (`exp` unless `changes` says otherwise) on one of `SIGNALS`.

    Args:
        slope: how much one standard deviation moves the logarithm of the thresholds.
    """
    weights = SIGNALS[signal]
    scale = slope / LOAD_SLOPE

    def loads(scene: Scene, rng: np.random.Generator) -> Array:
        used = replace(
            scene.base, surprisal_weight=weights[0] * scale, entropy_weight=weights[1] * scale, slope=LOAD_SLOPE, **changes
        )
        return scene.follow(used, late)

    return loads


def shuffled(loads: Loads) -> Loads:
    """The same loads, permuted in time within each document."""

    def permuted(scene: Scene, rng: np.random.Generator) -> Array:
        return np.asarray(rng.permuted(loads(scene, rng), axis=1))

    return permuted


def drawn(loads: Loads) -> Loads:
    """Independent draws from the loads of all documents."""

    def sampled(scene: Scene, rng: np.random.Generator) -> Array:
        found = loads(scene, rng)
        return np.asarray(rng.choice(found.reshape(-1), found.shape))

    return sampled


def by_document(slope: float) -> Loads:
    """One load a document: the mean surprisal of its prompt, in standard deviations of such means."""

    def loads(scene: Scene, rng: np.random.Generator) -> Array:
        mean, deviation = scene.prompt_surprisal
        z = (scene.surprisal[:, : scene.prompt - 1].mean(axis=1) - mean) / deviation
        return np.asarray(limited(slope / LOAD_SLOPE * z)[:, None] + still(scene, rng))

    return loads


def _responses() -> list[Arm]:
    return [
        Arm(f"{signal}, slope {slope:g}", "M2 exp", PLAIN, response(signal, slope)) for signal in SIGNALS for slope in SLOPES
    ]


def _controls() -> list[Arm]:
    found = []
    for signal in SIGNALS:
        real = response(signal, MIDDLE)
        found += [
            Arm(f"{signal}, shuffled in time", "controls", PLAIN, shuffled(real)),
            Arm(f"{signal}, one token late", "controls", PLAIN, response(signal, MIDDLE, late=1)),
            Arm(f"{signal}, drawn at random", "controls", PLAIN, drawn(real)),
        ]
    return found


def _controllers() -> list[Arm]:
    def controller(name: str, **changes: Any) -> Arm:
        return Arm(name, "other rules", PLAIN, response("surprisal", MIDDLE, **changes))

    return [
        controller("M1 affine", rule="affine"),
        controller("M3 sigmoid", rule="sigmoid"),
        controller("M5 rank", rule="rank"),
        controller("M2 exp, running statistics", momentum=0.02),
        Arm("M6 error target", "other rules", PLAIN, response("surprisal", MIDDLE), per_layer=True),
        Arm("M7 k of the best", "other rules", TOPK, response("surprisal", MIDDLE)),
    ]


def _dense_steps() -> list[Arm]:
    gate = response("both", MIDDLE, rule="gate")
    return [
        Arm("M4 gate", "dense steps", PLAIN, gate),
        Arm("M4 gate, shuffled in time", "dense steps", PLAIN, shuffled(gate)),
        *(
            Arm(f"M8 ladder, {signal} above {level}%", "dense steps", PLAIN, ladder)
            for signal in ("surprisal", "entropy")
            for level in (85, 95)
            for ladder in [response(signal, MIDDLE, rule="ladder", parameters={"percentile": float(level)})]
        ),
    ]


def _documents() -> list[Arm]:
    return [
        Arm(f"mean surprisal of the prompt, slope {slope:g}", "per document", PLAIN, by_document(slope))
        for slope in (MIDDLE, 2 * MIDDLE)
    ]


def _refreshes() -> list[Arm]:
    gate = response("both", MIDDLE, rule="gate")
    high = response("both", MIDDLE, rule="refresh")
    return [
        Arm("surprisal, slope 0.1", "prompt as a prior", PRIOR, response("surprisal", MIDDLE)),
        Arm("M4 gate, dense and refresh", "prompt as a prior", PRIOR, gate),
        Arm("M4 gate, dense only", "prompt as a prior", PRIOR, gate, refresh=False),
        Arm("M4 gate, shuffled in time", "prompt as a prior", PRIOR, shuffled(gate)),
        Arm("refresh while the load is high", "prompt as a prior", PRIOR, high),
        Arm("refresh, shuffled in time", "prompt as a prior", PRIOR, shuffled(high)),
    ]


ARMS: tuple[Arm, ...] = (*_responses(), *_controls(), *_controllers(), *_dense_steps(), *_documents(), *_refreshes())
"""All arms but the still ones, which every method has."""
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(arm.group for arm in ARMS))
