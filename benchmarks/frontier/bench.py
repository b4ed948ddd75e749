"""A model loaded for the simulation: prices, tables, and its cells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier.families import Cell, Family, family
from benchmarks.frontier.ffn import Format, Kitchen
from benchmarks.frontier.llama import LlamaFormat
from benchmarks.frontier.model import Plan, Read, Simulation, Yardstick, precise
from benchmarks.frontier.tables import Choice, choices, predicted, share_out
from benchmarks.frontier.turn import Turn
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.decoder.torch_decoder import TorchDecoder

TABLE_ROWS = 64
"""Tokens that errors are measured on for the tables of choices."""
PRICED = 2
"""Calibration windows for the prices."""
AS_IT_IS = 16.0
"""Bits a weight of attention and LM head that no format is asked for, in the bytes of a whole model."""


@dataclass(frozen=True)
class Settings:
    """How it is measured; cells of other settings are not comparable."""

    context: int = 512
    prompt: int = 128
    windows: int = 2
    calibration: int = 5
    rotated: bool = True
    seed: int = 0
    precision: str = "ieee"
    """Of matrix products in the measured passes: `ieee` (float32) or `bf16`."""
    turned_block: int | None = None
    """See `Turn`; None mixes all coordinates."""

    def key(self) -> dict[str, Any]:
        """For a result; what is None stays out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Bench:
    """What is made once for a model.

    Args:
        heldout: int64 [N, context]; calibration: int64 [settings.calibration, context]: the last one for tables, the others for
            compensation, the first of them for prices.
        work: where formats that take long to make are kept.
        compensates: whether any cell has a compensated format.
    """

    def __init__(
        self,
        decoder: TorchDecoder,
        heldout: Tensor,
        calibration: Tensor,
        settings: Settings,
        work: Path,
        compensates: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._settings, self._heldout, self._say = settings, heldout, say
        with self._passes():
            self.prices = layer_sensitivity(decoder, calibration[:PRICED])
            say("prices are there")
            size = decoder.ffns[0].hidden_size
            turn = Turn(size, settings.seed, settings.turned_block) if settings.rotated else None
            self._simulation = Simulation(decoder.model, decoder.ffns, turn)
            self._kitchen = Kitchen(work, self._simulation.inputs(calibration[:-1]) if compensates else None)
            rows = torch.linspace(settings.prompt, settings.context - 1, TABLE_ROWS).long()
            self._rows = [x[rows] for x in self._simulation.inputs(calibration[-1:])]
            states, _ = self._simulation.states(heldout, settings.prompt, [None], self._kitchen)
            head = self._simulation.head
            self._yardstick = Yardstick(head, states[0], heldout, settings.prompt)
        self._exact_states = states[0]
        ffn = decoder.ffns[0]
        self.sizes = {
            "layers": len(decoder.ffns),
            "hidden_size": ffn.hidden_size,
            "intermediate_size": ffn.intermediate_size,
            "ffn": sum(3 * one.hidden_size * one.intermediate_size for one in decoder.ffns),
            "attention": sum(module.weight.numel() for _, module in self._simulation.attention()),
            "head": head.weight.numel(),
        }
        say("the exact model is measured")

    @contextmanager
    def _passes(self) -> Iterator[None]:
        settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = settings.fp32_precision
        settings.fp32_precision = self._settings.precision
        try:
            yield
        finally:
            settings.fp32_precision = before

    def measure(self, cells: Sequence[Cell], tables: dict[tuple[Format, str], list[list[Choice]]]) -> list[dict[str, Any]]:
        """Measure cells that have the same format of attention, side by side."""
        start = time.perf_counter()
        plans = [self._plan(cell, tables) for cell in cells]
        attention = None if cells[0].attention is None else LlamaFormat(cells[0].attention)
        with self._passes(), self._simulation.attention_in(attention):
            if attention is None and all(plan is None for plan in plans):
                states, reads = self._exact_states.expand(len(cells), -1, -1, -1), [Read(32.0, 1.0, 0.0)] * len(cells)
            else:
                states, reads = self._simulation.states(self._heldout, self._settings.prompt, plans, self._kitchen)
            results = []
            for cell, plan, read, one in zip(cells, plans, reads, states, strict=True):
                results.append(self._result(cell, plan, read, one))
        seconds = (time.perf_counter() - start) / len(cells)
        return [result | {"seconds": round(seconds, 2)} for result in results]

    def _result(self, cell: Cell, plan: Plan | None, read: Read, states: Tensor) -> dict[str, Any]:
        head = None
        if cell.head is not None:
            weight = self._simulation.head.weight.detach()
            head = self._simulation.quantised_linear("lm_head", weight, LlamaFormat(cell.head))
        row = self.sizes["hidden_size"]
        bits = {
            "ffn": read.bits,
            "attention": AS_IT_IS if cell.attention is None else LlamaFormat(cell.attention).bits(row),
            "head": AS_IT_IS if cell.head is None else LlamaFormat(cell.head).bits(row),
        }
        found: dict[str, Any] = {"bits": bits, **self._yardstick.compare(states, head)}
        if plan is not None:
            found |= {"whole": read.whole, "medium": read.medium, "predicted_kl": predicted(plan.layers, self.prices)}
            if len(plan.forms) > 1:
                found["forms"] = [plan.forms[choice.form].name for choice in plan.layers]
        return found

    def _plan(self, cell: Cell, tables: dict[tuple[Format, str], list[list[Choice]]]) -> Plan | None:
        if cell.family is None:
            return None
        one = family(cell.family)
        if one.single:
            return Plan(one.forms, (Choice(0, 0.0, 0.0, 0.0, 0.0),) * self.sizes["layers"])
        assert cell.bits is not None
        layers: list[list[Choice]] = [[] for _ in range(self.sizes["layers"])]
        for place, form in enumerate(one.forms):
            for layer, table in zip(layers, tables[form, one.skip], strict=True):
                layer += [replace(choice, form=place) for choice in table]
        return Plan(one.forms, tuple(share_out(layers, self.prices, cell.bits)))

    def tables(self, families: Sequence[Family]) -> dict[tuple[Format, str], list[list[Choice]]]:
        """The choices that each format gives each layer, under each way of skipping that a family has."""
        wanted = {(form, one.skip): None for one in families if not one.single for form in one.forms}
        result: dict[tuple[Format, str], list[list[Choice]]] = {key: [] for key in wanted}
        with precise():
            for index in range(self.sizes["layers"]):
                exact = self._simulation.exact(index)
                for form in {form: None for form, _ in wanted}:
                    made = self._kitchen.quantised(index, exact, form)
                    skips = [skip for other, skip in wanted if other == form]
                    most = "two" if "two" in skips else "one" if "one" in skips else "none"
                    table = choices(exact, [(0, made)], self._rows[index], most)
                    for skip in skips:
                        kept = [choice for choice in table if _allowed(choice, skip)]
                        result[form, skip].append(kept or choices(exact, [(0, made)], self._rows[index], skip))
                self._say(f"choices of layer {index + 1} of {self.sizes['layers']}")
        return result


def _allowed(choice: Choice, skip: str) -> bool:
    if skip == "two":
        return True
    return choice.refine <= choice.drop and (skip == "one" or choice.drop == 0.0)
