"""The rows of a policy benchmark, and the file that its cells are kept in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.decode import write_json
from clada_export.errors import UsageError
from clada_export.methods import POLICIES, PolicySettings

FORMAT = 1
SIMULATED = ("teal", "teal-greedy")


@dataclass(frozen=True)
class Contender:
    """A row of the table: a policy with settings. `only` is the one sparsity that it has, if it has one."""

    name: str
    policy: str
    kind: str
    trained: bool
    settings: PolicySettings = field(default_factory=PolicySettings)
    only: float | None = None


@dataclass(frozen=True)
class Settings:
    """What is measured and how; a result holds cells of equal settings only."""

    context: int
    windows: int
    window_tokens: int
    prompt: int
    prompts: int
    new_tokens: int
    threads: int
    seed: int


def contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """All policies, with the patterns of static pruning, and TEAL.

    Args:
        names: of policies or rows; None takes all.

    Raises:
        UsageError: an unknown name; lists those that there are.
    """
    found = []
    for name, policy in POLICIES.items():
        if policy.segment_state:
            # Two experts merged into one; more lie further apart than the table's sparsities.
            found.append(Contender(name, name, "dynamic", policy.trained, only=0.5))
            continue
        if not policy.prunes:
            found.append(Contender(name, name, "dynamic", policy.trained))
            if policy.finetunes:
                found.append(Contender(f"{name}-finetuned", name, "dynamic", True, PolicySettings(finetune=True)))
            continue
        found.append(Contender(name, name, "static", policy.trained))
        found.append(Contender(f"{name}-neurons", name, "static", policy.trained, PolicySettings(pattern="neurons")))
        found.append(Contender(f"{name}-2:4", name, "static", policy.trained, PolicySettings(pattern="2:4"), 0.5))
    found += [Contender(name, "teal", "simulated", False) for name in SIMULATED]
    if names is None:
        return found
    known = {one.name for one in found} | {one.policy for one in found}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown policy {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return [one for one in found if one.name in names or one.policy in names]


class Results:
    """The file of results, written whole after every cell.

    Args:
        key: settings and texts; cells of others are not mixed with these.

    Raises:
        UsageError: the file holds cells of another key, or is no such file.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path = path
        # Through JSON, so that what is read back compares equal.
        key = json.loads(json.dumps(key))
        self.value: dict[str, Any] = {"benchmark": "policies", "format": FORMAT, "key": key, "cells": []}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("benchmark") != "policies" or kept.get("format") != FORMAT:
                raise UsageError(f"{path}: not a result of this benchmark; choose another --out")
            if kept["key"] != key:
                changed = [name for name in key if kept["key"].get(name) != key[name]]
                raise UsageError(f"{path}: its cells were measured with other {', '.join(changed)}; choose another --out")
            self.value = kept

    @property
    def cells(self) -> list[dict[str, Any]]:
        """All cells, failed ones included."""
        cells: list[dict[str, Any]] = self.value["cells"]
        return cells

    def has(self, contender: Contender, sparsity: float, speed: bool) -> bool:
        """Whether a cell is finished, with speed where it is wanted and the cell can have one."""
        cell = self.finished(contender, sparsity)
        return cell is not None and (not speed or contender.kind == "simulated" or "speed" in cell)

    def finished(self, contender: Contender, sparsity: float) -> dict[str, Any] | None:
        """The cell, if its quality is there."""
        return next((one for one in self.cells if _is(one, contender, sparsity) and "quality" in one), None)

    def put(self, cell: dict[str, Any]) -> None:
        """Add a cell, in the place of an older one, and write the file."""
        name, sparsity = cell["contender"], cell["sparsity"]
        kept = [one for one in self.cells if (one["contender"], one["sparsity"]) != (name, sparsity)]
        order = [one.name for one in contenders()]

        def place(one: dict[str, Any]) -> tuple[int, float]:
            known = one["contender"] in order
            return (order.index(one["contender"]) if known else len(order), one["sparsity"])

        self.value["cells"] = sorted([*kept, cell], key=place)
        self.write()

    def describe(self, **values: Any) -> None:
        """Set what is beside the cells, and write the file.

        Raises:
            UsageError: the cells are of another model.
        """
        known = self.value.get("model", {}).get("weights_digest")
        given = values.get("model", {}).get("weights_digest", known)
        if self.cells and known is not None and known != given:
            raise UsageError(f"{self.path}: its cells are of another model (digest {known[:16]}...); choose another --out")
        self.value.update(values)
        self.write()

    def write(self) -> None:
        """Write or replace the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.value)


def _is(cell: dict[str, Any], contender: Contender, sparsity: float) -> bool:
    return bool(cell["contender"] == contender.name and abs(cell["sparsity"] - sparsity) < 1e-9)


def grid(chosen: Iterable[Contender], sparsities: Sequence[float]) -> list[tuple[Contender, float]]:
    """The cells of a table. The sparsities of a policy come one after the other."""
    result = []
    for contender in chosen:
        if contender.only is None:
            result += [(contender, sparsity) for sparsity in sparsities]
        elif any(abs(contender.only - sparsity) < 1e-9 for sparsity in sparsities):
            result.append((contender, contender.only))
    return result
