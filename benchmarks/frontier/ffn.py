"""One gated FFN with quantised weights and skipped neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.frontier.compensate import codes_of
from benchmarks.frontier.grids import Grid, round_input
from benchmarks.frontier.llama import LlamaFormat
from clada_export.decoder.ffn import EagerFFN
from clada_export.op.reference import activate

Format = Grid | LlamaFormat


@dataclass(frozen=True)
class Exact:
    """An FFN's float32 weights, neuron-major: gate over up [2 f, d] and down [f, d]."""

    name: str
    activation: str
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, ffn: EagerFFN) -> Exact:
        """The weights of a gated FFN without biases."""
        w_in = ffn.w_in()
        return cls(ffn.name, ffn.activation, torch.cat((w_in[:, 0], w_in[:, 1])), ffn.w_out().contiguous())

    @property
    def width(self) -> int:
        """Neurons."""
        return len(self.down)

    def hidden(self, x: Tensor, gate_up: Tensor | None = None) -> Tensor:
        """h [n, f] of x [n, d], with these weights or other ones."""
        gate, up = (x @ (self.gate_up if gate_up is None else gate_up).t()).chunk(2, dim=-1)
        return activate(self.activation, gate).mul_(up)


@dataclass(frozen=True)
class Quantised:
    """An FFN in a format, decoded to float32: all planes, and the high plane alone (None: there is one plane).

    `norms` [f] are those of the down rows; `high_bits`, `low_bits` of a weight, scales counted with the high plane.
    """

    exact: Exact
    gate_up: Tensor
    down: Tensor
    high_gate_up: Tensor | None
    high_down: Tensor | None
    norms: Tensor
    high_bits: float
    low_bits: float

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(h with all planes, h with the high planes, the score by these) [n, f], for x [n, d]."""
        x = round_input(x)
        full = self.exact.hidden(x, self.gate_up)
        high = full if self.high_gate_up is None else self.exact.hidden(x, self.high_gate_up)
        return full, high, high.abs() * self.norms

    def output(self, full: Tensor, high: Tensor, score: Tensor, drop: float, refine: float, dense: Tensor) -> Result:
        """The FFN's output.

        Args:
            full, high, score: of `score`.
            drop: a neuron with a lower score gets nothing.
            refine: one with a lower score gets the high planes alone.
            dense: rows in which every neuron gets all planes, bool [n].
        """
        whole = score >= max(drop, refine)
        whole[dense] = True
        y = torch.where(whole, full, 0.0) @ self.down
        medium = torch.zeros(len(score), device=score.device)
        if refine > drop:
            between = (score >= drop) & ~whole
            y += torch.where(between, high, 0.0) @ (self.down if self.high_down is None else self.high_down)
            medium = between.float().mean(-1)
        return Result(y, whole.float().mean(-1), medium)

    def bits(self, whole: float, medium: float) -> float:
        """Bits read, a weight of the FFN: high planes of gate and up for all neurons, and what the neurons get."""
        return (2 * (self.high_bits + self.low_bits * whole) + self.high_bits * (whole + medium) + self.low_bits * whole) / 3


@dataclass(frozen=True)
class Result:
    """y [n, d], and the share of neurons that got all planes and the high ones alone, [n]."""

    y: Tensor
    whole: Tensor
    medium: Tensor


class Kitchen:
    """Quantises FFNs. What takes long (search, compensation) is kept in files.

    Args:
        work: where it is kept; the folder is made.
        inputs: for every FFN the rows x [n, d] (in the rotated basis) that compensation goes by; None where it is not used.
    """

    def __init__(self, work: Path, inputs: list[Tensor] | None) -> None:
        self._work, self._inputs = work, inputs
        work.mkdir(parents=True, exist_ok=True)

    def quantised(self, index: int, exact: Exact, form: Format) -> Quantised:
        """FFN number `index` in a format."""
        row = exact.down.shape[1]
        if isinstance(form, LlamaFormat):
            # Its blocks of the down projection lie along the neurons.
            gate_up, down = form(exact.gate_up), form(exact.down.t().contiguous()).t().contiguous()
            bits = (2 * form.bits(row) + form.bits(exact.width)) / 3
            return Quantised(exact, gate_up, down, None, None, _norms(down), bits, 0.0)
        parts = (("gate_up", exact.gate_up), ("down", exact.down))
        codes = [self._codes(index, exact, form, part, weights) for part, weights in parts]
        full = [form.decode(*one) for one in codes]
        high = [form.decode_high(*one) for one in codes] if form.low else [None, None]
        return Quantised(exact, full[0], full[1], high[0], high[1], _norms(full[1]), form.high + form.overhead(row), form.low)

    def _codes(self, index: int, exact: Exact, grid: Grid, part: str, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def make() -> dict[str, Tensor]:
            scale, low = grid.levels_of(weights)
            if not grid.compensated:
                return {"codes": grid.nearest(weights, scale, low), "scale": scale, "low": low}
            assert self._inputs is not None
            rows = self._inputs[index].float()
            down = part == "down"
            codes = codes_of(grid, weights, scale, low, exact.hidden(rows) if down else rows, exact.name, down)
            return {"codes": codes, "scale": scale, "low": low}

        # The codes of 4 + 1 bits are those of 5.
        same = grid if grid.fit_high else replace(grid, high=grid.bits, low=0)
        found = self._kept(f"{same.name}-{index}-{part}", make) if grid.search or grid.compensated else make()
        return found["codes"], found["scale"], found["low"]

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self._work / f"{name.replace(' ', '-')}.pt"
        if path.is_file():
            found: dict[str, Tensor] = torch.load(path, weights_only=True)
            return found
        made = make()
        part = path.with_suffix(".part")
        torch.save(made, part)
        part.replace(path)
        return made


def _norms(down: Tensor) -> Tensor:
    return down.square().sum(1).sqrt()
