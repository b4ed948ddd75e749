"""Tokens as they come: text to stdout, coloured on a terminal by what the engine did for it, and the rest to stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clada_export.runtime import Engine, TokenPiece

_LOADS = (
    (-1.0, "34", "below -1"),
    (0.0, "36", "-1 to 0"),
    (1.0, "32", "0 to 1"),
    (2.0, "33", "1 to 2"),
    (math.inf, "31", "2 and above"),
)
"""Up to which load, its colour (SGR), and what the legend calls it."""
_DENSE = ("35", "dense")
_FEW, _MANY = 1 / 3, 2 / 3
"""Active shares below the first are dim, above the second bold."""


def colours(stream: object) -> bool:
    """Whether escape codes go to this stream: to a terminal, unless NO_COLOR (https://no-color.org) forbids it."""
    is_terminal = getattr(stream, "isatty", lambda: False)()
    return bool(is_terminal) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(piece: TokenPiece) -> str:
    """A piece's text in the colour of its load, dim or bold by its active share."""
    if not piece.text:
        return ""
    code = _DENSE[0] if math.isinf(piece.load) else next(colour for most, colour, _ in _LOADS if piece.load < most)
    share = 0.5 if piece.active_share is None else piece.active_share
    weight = "2;" if share < _FEW else "1;" if share > _MANY else ""
    return f"\x1b[{weight}{code}m{piece.text}\x1b[0m"


def legend(coloured: bool) -> str:
    """What the colours mean; without escape codes the colours by name."""
    names = {"31": "red", "32": "green", "33": "yellow", "34": "blue", "35": "magenta", "36": "cyan"}
    entries = [(colour, text) for _, colour, text in _LOADS] + [_DENSE]
    shown = [f"\x1b[{code}m{text}\x1b[0m" if coloured else f"{names[code]} {text}" for code, text in entries]
    return f"load: {', '.join(shown)}; neurons: dim below {_FEW:.0%}, bold above {_MANY:.0%}"


class TokenOutput:
    """Writes the pieces of one text, and keeps what is told of them afterwards.

    Args:
        show_load: colour tokens on a terminal, and tell loads and shares at the end.
        quiet: nothing on stderr.
    """

    def __init__(self, *, show_load: bool, quiet: bool) -> None:
        self._painted = show_load and colours(sys.stdout)
        self._show_load = show_load
        self._quiet = quiet
        self._pieces: list[TokenPiece] = []
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Before the first text of a program: the legend, where there are colours."""
        if self._painted and not self._quiet:
            print(legend(colours(sys.stderr)), file=sys.stderr)

    def write(self, pieces: Iterable[TokenPiece]) -> None:
        """All pieces, each when it comes, and the end of the line."""
        before = time.perf_counter()
        for piece in pieces:
            self._seconds.append(time.perf_counter() - before)
            self._pieces.append(piece)
            text = painted(piece) if self._painted else piece.text
            if text:
                print(text, end="", flush=True)
            before = time.perf_counter()
        print(flush=True)

    def speed(self) -> None:
        """Tell tokens a second, the first token's time, and the neurons that were skipped."""
        if len(self._seconds) < 2:
            return
        shares = [piece.active_share for piece in self._pieces[1:] if piece.active_share is not None]
        later = sorted(self._seconds[1:])
        tell_speed(later[len(later) // 2], self._seconds[0], 1 - _mean(shares) if shares else None, quiet=self._quiet)

    def loads(self) -> None:
        """With `show_load`: the range of what was shown."""
        if not self._show_load or self._quiet:
            return
        loads = [piece.load for piece in self._pieces if math.isfinite(piece.load)]
        shares = [piece.active_share for piece in self._pieces if piece.active_share is not None]
        said = f"load {min(loads):+.2f} to {max(loads):+.2f}, mean {_mean(loads):+.2f}" if loads else "every token dense"
        if shares:
            said += f"; active share {min(shares):.1%} to {max(shares):.1%}, mean {_mean(shares):.1%}"
        print(said, file=sys.stderr)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def tell_speed(seconds: float, first: float, sparsity: float | None, *, quiet: bool) -> None:
    """A line on stderr: seconds a token, seconds to the first, share of neurons that were skipped."""
    if not quiet:
        skipped = f", {sparsity:.1%} of FFN neurons skipped" if sparsity is not None else ""
        print(f"{1 / seconds:.1f} tokens/s, first token after {first:.2f} s{skipped}", file=sys.stderr)


def tell_cut(engine: Engine, finish: str | None, tokens: int, *, quiet: bool, row: int | None = None) -> None:
    """A line on stderr where a text did not end by itself.

    Args:
        row: of a batch, for the message.
    """
    whose = "" if row is None else f"prompt {row + 1}: "
    if quiet or finish not in ("length", "context"):
        return
    why = "--max-new-tokens lets it go on" if finish == "length" else f"the model takes {engine.max_positions} tokens at most"
    print(f"{whose}cut at {tokens} tokens; {why}", file=sys.stderr)
