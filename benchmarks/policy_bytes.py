"""What the cells of a policy benchmark say together: the bytes a policy needs for a quality, and who needs the fewest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clada_export.calibration.cost import relative_bytes
from clada_export.plan.plan import SparsityPlan

TARGETS = (0.03, 0.08)
"""KL, nats a token."""
PACKED_MASK = 1 / 32
"""A bit for each float32 weight says where the kept ones are: a bitmap, or two bits for each of two kept of four."""

EXACT, BELOW, ABOVE = "", "at most", "more than"


@dataclass(frozen=True)
class Needed:
    """FFN bytes a token relative to dense; `bound` says whether the true number lies `at most` or `more than` there."""

    bytes: float
    bound: str = EXACT


def measured_bytes(plan: SparsityPlan, layer_sparsity: Sequence[float]) -> float:
    """`relative_bytes` of a plan at the sparsity that its layers were measured to have.

    Args:
        layer_sparsity: in the order of the plan's layers.
    """
    layers = tuple(
        replace(layer, expected_sparsity=float(share)) for layer, share in zip(plan.layers, layer_sparsity, strict=True)
    )
    return relative_bytes(plan.with_layers(layers))


def packed_bytes(sparsity: float) -> float:
    """What pruned float32 weights would read if the engine stored them packed, relative to dense (our own count)."""
    return 1.0 - sparsity + PACKED_MASK


def needed_bytes(points: Iterable[tuple[float, float]], target: float) -> Needed | None:
    """The fewest bytes at which the KL is `target`, between points by the logarithm of the KL.

    Args:
        points: (bytes, KL).

    Returns:
        None without points. `at most` where even the fewest bytes are good enough, `more than` where none are; exactly 1, a
        dense model, where no point reads less than that (weights that are pruned but not packed).
    """
    ordered = sorted((size, max(kl, 1e-12)) for size, kl in points)
    if not ordered:
        return None
    if ordered[0][0] >= 1.0 - 1e-9:
        return Needed(1.0, EXACT)
    good = [index for index, (_, kl) in enumerate(ordered) if kl <= target]
    if not good:
        return Needed(ordered[-1][0], ABOVE)
    size, kl = ordered[good[0]]
    if good[0] == 0:
        return Needed(size, BELOW)
    worse_size, worse_kl = ordered[good[0] - 1]
    share = (math.log(target) - math.log(kl)) / (math.log(worse_kl) - math.log(kl))
    return Needed(size + share * (worse_size - size), EXACT)


def reads_less(ours: Needed, theirs: Needed) -> bool | None:
    """Whether the first surely needs fewer bytes than the second; None where the bounds do not say."""
    if ours.bound != ABOVE and theirs.bound != BELOW:
        return (
            ours.bytes < theirs.bytes if ours.bound == EXACT and theirs.bound == EXACT else ours.bytes <= theirs.bytes or None
        )
    if ours.bytes >= theirs.bytes and ours.bound != BELOW and theirs.bound != ABOVE:
        return False
    return None


def curve(cells: Iterable[Mapping[str, Any]], contender: str) -> list[tuple[float, float]]:
    """(bytes, KL) of a contender's finished cells."""
    return [
        (float(cell["bytes"]), float(cell["quality"]["kl"]))
        for cell in cells
        if cell["contender"] == contender and "quality" in cell
    ]


def summarise(cells: Sequence[Mapping[str, Any]], targets: Sequence[float] = TARGETS) -> list[dict[str, Any]]:
    """For each target KL the bytes that each contender needs, and whether `clada` needs the fewest.

    `holds` compares it with every other policy that trains nothing, `simulated` ones included: True, False, or None where
    points are missing.
    """
    names = list(dict.fromkeys(str(cell["contender"]) for cell in cells if "quality" in cell))
    trained = {str(cell["contender"]) for cell in cells if cell.get("trained")}
    result = []
    for target in targets:
        found = {name: needed_bytes(curve(cells, name), target) for name in names}
        ours = found.get("clada")
        verdicts: dict[str, bool | None] = {}
        for name, theirs in found.items():
            if name != "clada" and name not in trained and ours is not None and theirs is not None:
                verdicts[name] = reads_less(ours, theirs)
        holds = False if False in verdicts.values() else None if None in verdicts.values() or not verdicts else True
        result.append(
            {
                "kl": target,
                "needed": {name: {"bytes": one.bytes, "bound": one.bound} for name, one in found.items() if one is not None},
                "clada_reads_less": verdicts,
                "holds": holds,
            }
        )
    return result


def next_extra(
    points: Sequence[tuple[float, float, float]], targets: Sequence[float], candidates: Sequence[float]
) -> float | None:
    """A sparsity to measure so that the targets lie between points; None if they do, or none is left.

    Args:
        points: (sparsity, bytes, KL) that are known.
        candidates: sparsities that may be measured.
    """
    if not points:
        return None
    known = [sparsity for sparsity, _, _ in points]
    worst, best = max(kl for _, _, kl in points), min(kl for _, _, kl in points)
    lower = [value for value in candidates if value < min(known) - 1e-9]
    higher = [value for value in candidates if value > max(known) + 1e-9]
    if best > min(targets) and lower:
        return max(lower)
    if worst < max(targets) and higher:
        return min(higher)
    return None
