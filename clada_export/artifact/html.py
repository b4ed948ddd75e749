"""Pieces of an HTML page that escape by default.

A piece is a `Markup`: a constant of the program, filled in by `html`, which escapes whatever is not a `Markup` itself. A plain
`str` that gets in among the pieces, however it came about, is text and shows as such.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

NOTHING = Markup("")


def html(template: str, *values: object) -> Markup:
    """A constant with values filled in at its `{}`, escaped unless they are `Markup`.

    Args:
        template: a literal; nothing that comes from outside.
    """
    return Markup(template).format(*values)


def joined(pieces: Iterable[str], between: str = "") -> Markup:
    """Pieces one after the other; those that are no `Markup` are escaped.

    Args:
        between: a literal.
    """
    return Markup(between).join(pieces)


def code(value: object) -> Markup:
    """A value in the font of code."""
    return html("<code>{}</code>", value)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> Markup:
    """A table, its numeric columns set to the right."""
    classes = [Markup(' class="n"') if index in numeric else NOTHING for index in range(len(head))]
    first = joined(html("<th{}>{}</th>", kind, name) for kind, name in zip(classes, head, strict=True))
    body = joined(
        html("<tr>{}</tr>", joined(html("<td{}>{}</td>", kind, cell) for kind, cell in zip(classes, row, strict=True)))
        for row in rows
    )
    return html('<div class="scroll"><table><tr>{}</tr>{}</table></div>', first, body)


def bars(title: str, names: Sequence[str], values: Sequence[float], colour: str, top: float | None) -> Markup:
    """A bar chart as SVG, one bar a layer in the model's order; the name shows when the pointer rests on it."""
    width, height, left, bottom, head = 860, 190, 46, 24, 26
    plot_width, plot_height = width - left - 6, height - bottom - head
    top = top or _round_up(max(values))
    slot = plot_width / len(values)
    parts = [html('<text x="{}" y="14">{}</text>', left, title)]
    for tick in range(5):
        y = head + plot_height * (1 - tick / 4)
        parts.append(html('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="#e4e8ed"/>', left, width - 6, y, y))
        parts.append(html('<text x="{}" y="{:.1f}" text-anchor="end">{:.3g}%</text>', left - 6, y + 4, top * tick * 25))
    every = max(1, math.ceil(len(values) / 32))
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        x, bar = left + index * slot, plot_height * min(max(value / top, 0.0), 1.0)
        place = (x + slot * 0.12, head + plot_height - bar, slot * 0.76, bar)
        parts.append(
            html(
                '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" fill="{}"><title>{}: {}</title></rect>',
                *(*place, colour, name, percent(value)),
            )
        )
        if index % every == 0:
            parts.append(html('<text x="{:.2f}" y="{}" text-anchor="middle">{}</text>', x + slot / 2, height - 8, index))
    view = html("0 0 {} {}", width, height)
    return html('<svg viewBox="{}" role="img" aria-label="{}">{}</svg>', view, title, joined(parts))


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, so that quarters of the axis read well."""
    if value < 1e-12 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))


def number(value: Any) -> str:
    """Three significant digits; whole numbers in full. Text."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.3g}"


def percent(value: float, digits: int = 1) -> str:
    """A share in percent. Text."""
    return f"{value:.{digits}%}"


def size(count: int) -> str:
    """Bytes. Text."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


__all__ = ["NOTHING", "Markup", "bars", "code", "html", "joined", "number", "percent", "size", "table"]
