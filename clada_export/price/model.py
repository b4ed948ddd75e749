"""The price of an export: a line for each stage, of what grows with the model, the text and the machine.

    seconds = fixed + layers * a_layer + GB of float32 weights * a_gb + tokens * 2 * weights used / speed of matrix products
    memory  = fixed + share of float32 weights + weights of one layer * copies + logits of one window * copies

The numbers of each line are fitted to measurements (`python -m benchmarks.export_cost`, `docs/export-cost.md`, which has what
was predicted beside what was measured). They hold within a factor of `WITHIN` where nothing else keeps the machine busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from clada_export.price.machine import Machine
from clada_export.price.size import FLOAT32, ModelSize

WITHIN = 2.0
"""Of seconds: a measured export took between the price divided by this and the price times this."""
WINDOWS = 9
"""Of the text: five that statistics read, four held out."""
SHADOW = 0.42
"""Bytes of 4-bit copies and their scales for each weight of the FFNs: gate and up are two thirds of these."""
BESIDE = 8_000_000
"""Bytes of an engine's tokenizer, library and report."""
ITEMS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What is asked for.

    Attributes:
        measured: how many policies without routers are calibrated: more than one with `--policy auto`.
        trained: how many policies train routers.
        planned: whether the plan is given, so that nothing is calibrated.
        context: tokens of a calibration window.
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
    """A stage's line; see the module."""

    fixed: float
    a_layer: float = 0.0
    a_gb: float = 0.0
    tokens: float = 0.0
    base: float = 0.5
    share: float = 1.0
    layer_copies: float = 0.0
    logit_copies: float = 0.0


START = 6.0
_EFFICIENCY = 0.5
"""Of the speed of square products, what a model's pass reaches."""
_SOURCE = _Line(1.0, a_gb=4.0)
_CALIBRATE = _Line(2.0, a_layer=0.1, tokens=10_000.0, layer_copies=2.0, logit_copies=4.0)
_EACH_POLICY, _EACH_TRAINED = 10_000.0, 60_000.0
"""More tokens for each policy that is measured, and for each that trains routers."""
_TRACE = _Line(8.0, a_layer=0.1)
_WRITE = _Line(0.5, a_layer=0.05, a_gb=1.0, layer_copies=2.0)
_VERIFY = _Line(2.0, a_layer=0.05, a_gb=3.0, tokens=4_000.0, layer_copies=2.0, logit_copies=4.0)


def resident(size: ModelSize, work: Work) -> int:
    """Bytes of memory that an export needs at its peak and that the system can't take back, whatever the machine."""
    lines = [_SOURCE, _TRACE, _WRITE, *((_VERIFY,) if work.verified else ())]
    copies = (1 + work.workers) * _own(_CALIBRATE, size, work) if not work.planned else 0.0
    return round(max(copies, *(_own(line, size, work) for line in lines)))


def price(size: ModelSize, machine: Machine, work: Work) -> Price:
    """What an export of a model costs on a machine."""
    output = output_bytes(size, work)
    stages = tuple(_stages(size, machine, work, output))
    temporary = 0 if size.graph else size.float32_bytes * (1 + work.workers)
    return Price(START, stages, max(stage.memory for stage in stages), resident(size, work), output, temporary)


def output_bytes(size: ModelSize, work: Work) -> int:
    """Of the engine's folder: the FFNs in the engine's type, the rest in float32; with TensorRT all in one type."""
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


def _stage(name: str, line: _Line, size: ModelSize, machine: Machine, work: Work, more: float = 0.0) -> StagePrice:
    gb = size.float32_bytes / 1e9
    products = (line.tokens + more) * work.context / 512 * 2.0 * size.used / (_EFFICIENCY * machine.gflops * 1e9)
    seconds = line.fixed + line.a_layer * size.layers + line.a_gb * gb + products
    return StagePrice(name, seconds, round(_own(line, size, work) + line.share * size.float32_bytes))


def _own(line: _Line, size: ModelSize, work: Work) -> float:
    """Bytes of a stage beside the weights."""
    layer = max(size.widest, size.largest) * FLOAT32
    return line.base * 1e9 + line.layer_copies * layer + line.logit_copies * work.context * size.vocabulary * FLOAT32
