"""The price of an export: a line for each stage, of what grows with the model, the text and the machine.

    seconds = fixed + layers * a_layer + GB of float32 weights * a_gb + tokens * 2 * weights used / speed of matrix products
    memory  = base + weights + FFNs of one layer * copies + largest weight * copies + logits of one window * copies

The numbers of the lines were fitted by hand to eight exports, of 4 to 30 layers and 0.3 to 7 GB. `docs/export-cost.md`
holds them to measurements, stage by stage: what was predicted stands beside what was measured, and what is off there is to be
changed here (`python -m benchmarks.export_cost`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from clada_export.plan.weights_form import AUTO, FORMS, WeightsForm
from clada_export.price.machine import Machine
from clada_export.price.size import FLOAT32, ModelSize

WITHIN = 2.0
"""Of seconds: an export is meant to take between the price divided by this and the price times this."""
WINDOWS = 9
"""Of the text: five that statistics read, four held out."""
SHADOW = 0.42
"""Bytes of 4-bit copies and their scales for each weight of the FFNs: gate and up are two thirds of these."""
BESIDE = 8_000_000
"""Bytes of an engine's tokenizer, library and report."""
CODES = 1.1
"""Bytes of a weight's code and its share of a scale, while there is no engine yet."""
ITEMS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What is asked for.

    Attributes:
        measured: how many policies without routers are calibrated: more than one with `--policy auto`.
        trained: how many policies train routers.
        planned: whether the plan is given, so that nothing is calibrated.
        context: tokens of a calibration window.
        weights: the form of quantised weights, or None for numbers of `dtype`; `auto` counts as the widest.
        workers: more processes on this machine that each hold the model while it is calibrated.
        shadow: whether the engine may score neurons with 4-bit copies of gate and up.
    """

    target: str = "ort"
    dtype: str = "float32"
    measured: int = 1
    trained: int = 0
    planned: bool = False
    verified: bool = True
    context: int = 512
    shadow: bool = True
    workers: int = 0
    weights: str | None = None

    @property
    def form(self) -> WeightsForm | None:
        """That of `weights`."""
        return None if self.weights is None else FORMS.get(self.weights, next(iter(FORMS.values())))


@dataclass(frozen=True)
class StagePrice:
    """Seconds of a stage, and the most bytes that are resident in it, mapped weights among them."""

    stage: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Price:
    """What an export costs.

    Attributes:
        start: seconds of Python and its imports.
        memory: bytes that are resident at the peak.
        needed: bytes of these that the system can't take back: mapped weights are read again when they are wanted.
        output: bytes of the folder.
        temporary: bytes on the disk of the temporary folder, until the export ends.
    """

    start: float
    stages: tuple[StagePrice, ...]
    memory: int
    needed: int
    output: int
    temporary: int

    @property
    def seconds(self) -> float:
        """Of the whole command."""
        return self.start + sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return {"seconds": self.seconds, **asdict(self), "within": WITHIN}


@dataclass(frozen=True)
class _Line:
    """A stage's line; see the module. `packed` says whether an engine is open, which packs a copy of all but the FFNs."""

    fixed: float
    a_layer: float = 0.0
    a_gb: float = 0.0
    tokens: float = 0.0
    base: float = 0.6
    ffns: float = 0.0
    largest: float = 0.0
    logits: float = 0.0
    packed: bool = False


START = 10.5
_EFFICIENCY = 0.5
"""Of the speed of square products, what a model's pass reaches."""
_SOURCE = _Line(2.0, a_gb=4.2)
_CALIBRATE = _Line(2.0, a_layer=0.35, tokens=14_000.0, base=0.7, ffns=3.0, logits=5.5)
_EACH_POLICY, _EACH_TRAINED = 3_000.0, 60_000.0
"""More tokens for each policy that is measured, and for each that trains routers."""
_TRACE = _Line(10.0, a_layer=0.1, a_gb=0.8, base=0.8)
_WRITE = _Line(0.5, a_layer=0.02, a_gb=4.0, base=0.8, largest=1.0)
_VERIFY = _Line(3.0, a_gb=12.0, tokens=2_000.0, base=0.8, ffns=3.0, logits=2.0, packed=True)
_FINISH = _Line(2.3, a_gb=1.6)


def resident(size: ModelSize, work: Work, memory: int | None) -> int:
    """Bytes of memory that an export needs at its peak and that the system can't take back.

    Args:
        memory: bytes that are available, or None: where the engine is large beside them, nothing is packed.
    """
    lines = [_SOURCE, _TRACE, _WRITE, *((_VERIFY,) if work.verified else ())]
    calibrating = 0.0 if work.planned else (1 + work.workers) * _own(_CALIBRATE, size, work, memory)
    return round(max(calibrating, *(_own(line, size, work, memory) for line in lines)))


def price(size: ModelSize, machine: Machine, work: Work) -> Price:
    """What an export of a model costs on a machine."""
    output = output_bytes(size, work)
    stages = tuple(_stages(size, machine, work, output))
    temporary = 0 if size.graph else size.float32_bytes * (1 + work.workers)
    if work.form is not None:
        temporary += round(CODES * size.parameters) * (len(FORMS) if work.weights == AUTO else 1)
    needed = resident(size, work, machine.memory)
    return Price(START, stages, max(stage.memory for stage in stages), needed, output, temporary)


def output_bytes(size: ModelSize, work: Work) -> int:
    """Of the engine's folder: the FFNs in the engine's type, the rest in float32; quantised weights each in its bits; with
    TensorRT all in one type."""
    if (form := work.form) is not None:
        others = max(form.weight_bytes(kind) for kind in ("attention", "head", "embedding"))
        return round(size.ffn * form.weight_bytes("ffn") + (size.parameters - size.ffn) * others) + BESIDE
    item = ITEMS[work.dtype]
    if work.target != "ort":
        return size.parameters * item + BESIDE
    copies = round(SHADOW * size.ffn) if work.shadow else 0
    return size.ffn * item + (size.parameters - size.ffn) * FLOAT32 + copies + BESIDE


def _stages(size: ModelSize, machine: Machine, work: Work, output: int) -> Iterator[StagePrice]:
    yield _stage("source", _SOURCE, size, machine, work)
    if not work.planned:
        more = _EACH_POLICY * work.measured + _EACH_TRAINED * work.trained
        yield _stage("calibrate", _CALIBRATE, size, machine, work, more)
    yield _stage("trace" if not size.graph else "read graph", _TRACE if not size.graph else _SOURCE, size, machine, work)
    written = _stage("rewrite and write", _WRITE, size, machine, work)
    disk = output / 1e9 / machine.disk_gb_s if machine.disk_gb_s else 0.0
    yield StagePrice(written.stage, written.seconds + disk, written.memory)
    if work.verified:
        yield _stage("verify", _VERIFY, size, machine, work)
    yield _stage("finish", _FINISH, size, machine, work)


def _stage(name: str, line: _Line, size: ModelSize, machine: Machine, work: Work, more: float = 0.0) -> StagePrice:
    gb = size.float32_bytes / 1e9
    products = (line.tokens + more) * work.context / 512 * 2.0 * size.used / (_EFFICIENCY * machine.gflops * 1e9)
    seconds = line.fixed + line.a_layer * size.layers + line.a_gb * gb + products
    own = _own(line, size, work, machine.memory)
    return StagePrice(name, seconds, round(own + size.float32_bytes))


def _own(line: _Line, size: ModelSize, work: Work, memory: int | None) -> float:
    """Bytes of a stage beside the weights."""
    elements = line.ffns * size.widest + line.largest * size.largest + line.logits * work.context * size.vocabulary
    if line.packed and (memory is None or output_bytes(size, work) <= memory / 2):
        elements += size.used - size.ffn
    return line.base * 1e9 + elements * FLOAT32
