"""Search and rewrite take work in proportion to the number of nodes, whatever there is to find or to explain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import onnx_ir as ir
import pytest
from handmade import HIDDEN, WIDTH, Handmade, dense_rewrite

from graph_passes import find_ffns, rewrite_ffns


def _calls(work: Callable[[], object]) -> int:
    """How many Python functions are called: unlike seconds, the same on every machine."""
    count = 0

    def tick(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tick)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def _layers(count: int, *, variable: bool = False) -> tuple[ir.Model, list[str]]:
    """That many residual layers after norms; `variable`: their down projections are inputs, so that no matcher takes them."""
    g = Handmade()
    x, scale = g.x, g.weight("scale", HIDDEN)
    for index in range(count):
        normed = g.op("LayerNormalization", x, scale, shape=["b", "s", HIDDEN])
        if variable:
            hidden = g.op("Relu", g.matmul(normed, g.weight(f"u{index}", HIDDEN, WIDTH)))
            y = g.matmul(hidden, g.add_input(f"w{index}", WIDTH, HIDDEN), module=f"layers.{index}.mlp.down_proj")
        else:
            y = g.swiglu(f"layers.{index}.mlp", x=normed)
        x = g.op("Add", x, y, shape=["b", "s", HIDDEN])
    return g.model(x), [f"layers.{index}.mlp.down_proj" for index in range(count)]


def _search(count: int) -> int:
    model, names = _layers(count)
    return _calls(lambda: find_ffns(model, names))


def _rewrite(count: int) -> int:
    model, names = _layers(count)
    return _calls(lambda: rewrite_ffns(model, dict.fromkeys(names, dense_rewrite())))


def _refuse(count: int) -> int:
    model, names = _layers(count, variable=True)
    return _calls(lambda: find_ffns(model, names))


def _explain(count: int) -> int:
    """Names that are not in the graph: for each it is said what is there in its place."""
    model, names = _layers(count)
    absent = [name.replace("down_proj", "experts.down_proj") for name in names]
    return _calls(lambda: find_ffns(model, absent))


@pytest.mark.parametrize("work", [_search, _rewrite, _refuse, _explain])
def test_four_times_the_layers_are_four_times_the_work(work: Callable[[int], int]) -> None:
    work(2)  # Imports and caches.
    few, many = work(10), work(40)
    assert many < 4.4 * few
