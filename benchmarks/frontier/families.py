"""What is compared: formats, alone or shared among layers, with and without skipping, at several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.frontier.ffn import Format
from benchmarks.frontier.grids import Grid
from benchmarks.frontier.llama import LlamaFormat

ROUND = Grid(4)
BASE = Grid(4, scales="super", search=True)
"""Four bits with offset, as Q4_K stores scales."""
TIGHT = replace(BASE, compensated=True)
PLAIN = Grid(4, offset=False, search=True)
"""Symmetric with a float16 scale a block: what `com.clada::QuantMatMul` reads."""


def planes(base: Grid, *low: int) -> tuple[Grid, ...]:
    """A base with low planes of these bits."""
    return tuple(replace(base, low=bits) for bits in low)


def deeper(base: Grid, *bits: int) -> tuple[Grid, ...]:
    """One plane of so many bits."""
    return tuple(replace(base, high=count) for count in bits)


@dataclass(frozen=True)
class Family:
    """A curve of the picture.

    Attributes:
        group: `users` (formats that users have), `dense` (ours without skipping), `skip`.
        forms: what a layer may have.
        skip: one of `benchmarks.frontier.tables.SKIPS`.
    """

    name: str
    group: str
    forms: tuple[Format, ...]
    skip: str = "none"

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose: one cell."""
        return len(self.forms) == 1 and self.skip == "none"


def _dense(form: Grid) -> Family:
    words = {"f16": "round to nearest", "super": "search"}[form.scales]
    name = f"dense {form.bits}, {'compensated' if form.compensated else words}"
    return Family(name + ("" if form.offset else ", symmetric"), "dense", (form,))


_LLAMA = tuple(LlamaFormat(name) for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0"))

FAMILIES = (
    *(Family(name, "users", (LlamaFormat(name),)) for name in ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")),
    Family("Q4_K to Q8_0, shared", "users", _LLAMA),
    *(_dense(form) for form in deeper(ROUND, 4, 5, 6, 8)),
    *(_dense(replace(form, offset=False)) for form in deeper(ROUND, 4, 8)),
    *(_dense(form) for form in deeper(BASE, 4, 5, 6)),
    *(_dense(replace(form, offset=False)) for form in deeper(BASE, 4, 5)),
    *(_dense(form) for form in deeper(TIGHT, 4, 5, 6)),
    *(Family(f"dense {form.name}", "dense", (form,)) for form in deeper(PLAIN, 4, 5, 6)),
    *(Family(f"dense {form.name}", "dense", (form,)) for form in deeper(replace(PLAIN, compensated=True), 4, 5)),
    Family("dense 4 to 6 compensated, shared", "dense", deeper(TIGHT, 4, 5, 6)),
    Family("4+4 round to nearest, one", "skip", planes(ROUND, 4), "one"),
    Family("4+4 round to nearest, two", "skip", planes(ROUND, 4), "two"),
    Family("4+4 round to nearest, symmetric, two", "skip", planes(replace(ROUND, offset=False), 4), "two"),
    *(Family(f"4+{low} search, {skip}", "skip", planes(BASE, low), skip) for low in (1, 2, 4) for skip in ("one", "two")),
    Family("4+2 search, symmetric, two", "skip", planes(replace(BASE, offset=False), 2), "two"),
    Family("4+2 symmetric f16 search, two", "skip", planes(PLAIN, 2), "two"),
    Family("4+2 symmetric f16 compensated, two", "skip", planes(replace(PLAIN, compensated=True), 2), "two"),
    Family("4+2 compensated, symmetric, two", "skip", planes(replace(TIGHT, offset=False), 2), "two"),
    Family("4+2 search, block 64, two", "skip", planes(replace(BASE, block=64), 2), "two"),
    Family("4+2 fit to the high plane, two", "skip", planes(replace(BASE, fit_high=True), 2), "two"),
    Family("3+2 search, two", "skip", planes(replace(BASE, high=3), 2), "two"),
    Family("4 search, one", "skip", (BASE,), "one"),
    Family("4 compensated, one", "skip", (TIGHT,), "one"),
    Family("5 compensated, one", "skip", deeper(TIGHT, 5), "one"),
    *(Family(f"4+{low} compensated, {skip}", "skip", planes(TIGHT, low), skip) for low in (1, 2) for skip in ("one", "two")),
    Family("4+0 to 4+4 search, shared, two", "skip", planes(BASE, 0, 1, 2, 4), "two"),
    Family("4+0 to 4+4 compensated, shared, two", "skip", (*planes(TIGHT, 0, 1, 2), *planes(BASE, 4)), "two"),
)


@dataclass(frozen=True)
class Cell:
    """One measurement: the FFNs of a family at a budget of bits a weight, attention and LM head in a format or as they are."""

    family: str | None
    bits: float | None = None
    attention: str | None = None
    head: str | None = None

    @property
    def key(self) -> list[str | float | None]:
        """What it is found by."""
        return [self.family, self.bits, self.attention, self.head]


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        KeyError: there is none.
    """
    return {one.name: one for one in FAMILIES}[name]


def cells_of(families: Sequence[Family], budgets: Sequence[float]) -> list[Cell]:
    """A cell for each family and budget (one for a family in which nothing is chosen)."""
    return [Cell(one.name, bits) for one in families for bits in ((None,) if one.single else budgets)]
