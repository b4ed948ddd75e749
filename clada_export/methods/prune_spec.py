"""What the user asks for: a method, a pattern and a sparsity."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from clada_export.errors import UsageError

METHODS = ("wanda", "sparsegpt")
UNSTRUCTURED, NEURONS = "unstructured", "neurons"

_NUMBER = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?")
_GROUP = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_FORMS = (
    "METHOD=0.5 (half of the weights), METHOD=2:4 (keep 2 of every 4) or METHOD=neurons:0.25 (a quarter of the neurons), "
    f"where METHOD is {' or '.join(METHODS)}"
)


@dataclass(frozen=True)
class PruneSpec:
    """How FFN weights are pruned.

    Args:
        method: `wanda` (arXiv 2306.11695) or `sparsegpt` (arXiv 2301.00774).
        pattern: `unstructured`, `neurons`, or `n:m` (of every m consecutive inputs of an output, n are kept).
        sparsity: the share of weights (of neurons) that goes, above 0 and below 1; 1 - n/m for `n:m`.

    Raises:
        UsageError: anything else.
    """

    method: str
    pattern: str
    sparsity: float

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"pruning method {self.method!r} is not known; give {' or '.join(METHODS)}")
        if not (math.isfinite(self.sparsity) and 0.0 < self.sparsity < 1.0):
            raise UsageError(f"pruning sparsity {self.sparsity:g} is out of range: it must be above 0 and below 1")
        match = check_pattern(self.pattern)
        if match is None:
            return
        if not math.isclose(self.sparsity, 1.0 - int(match[1]) / int(match[2])):
            raise UsageError(
                f"pruning pattern {self.pattern} is sparsity {1 - int(match[1]) / int(match[2]):g}, not {self.sparsity:g}"
            )

    @classmethod
    def parse(cls, text: str) -> PruneSpec:
        """Read `wanda=0.5`, `sparsegpt=2:4` or `wanda=neurons:0.25`; `str` gives the same form back.

        Raises:
            UsageError: another form, a sparsity that is not above 0 and below 1, or n:m without n < m.
        """
        method, equals, rest = (part.strip() for part in text.partition("="))
        if method not in METHODS or not equals:
            raise UsageError(f"pruning {text!r} is not understood; give {_FORMS}")
        group = _GROUP.fullmatch(rest)
        if group is not None:
            n, m = int(group[1]), int(group[2])
            _check_group(n, m)
            return cls(method, f"{n}:{m}", 1.0 - n / m)
        pattern = NEURONS if rest.startswith(f"{NEURONS}:") else UNSTRUCTURED
        number = rest.removeprefix(f"{NEURONS}:").strip()
        if _NUMBER.fullmatch(number) is None:
            raise UsageError(f"pruning {text!r} is not understood; give {_FORMS}")
        return cls(method, pattern, float(number))

    def __str__(self) -> str:
        number = repr(float(self.sparsity))
        return f"{self.method}=" + {UNSTRUCTURED: number, NEURONS: f"{NEURONS}:{number}"}.get(self.pattern, self.pattern)

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern, else None."""
        match = _GROUP.fullmatch(self.pattern)
        return None if match is None else (int(match[1]), int(match[2]))

    def removed(self, size: int) -> int:
        """How many of `size` weights or neurons go: sparsity * size, rounded down; at least one stays."""
        # 0.29 * 100 is 28.999999999999996, and 29 is meant.
        return min(int(self.sparsity * size + 1e-6), size - 1)


def check_pattern(pattern: str) -> re.Match[str] | None:
    """Refuse a pattern that is none. Returns the two numbers of n:m, or None of another.

    Raises:
        UsageError: lists those there are.
    """
    if pattern in (UNSTRUCTURED, NEURONS):
        return None
    match = _GROUP.fullmatch(pattern)
    if match is None:
        raise UsageError(f"pruning pattern {pattern!r} is not known; give {UNSTRUCTURED}, {NEURONS} or n:m, like 2:4")
    _check_group(int(match[1]), int(match[2]))
    return match


def _check_group(n: int, m: int) -> None:
    if n >= m:
        raise UsageError(f"pruning pattern {n}:{m} keeps everything: n of every m weights are kept, and n must be below m")
