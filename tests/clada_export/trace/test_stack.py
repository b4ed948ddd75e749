"""Which layers of a decoder are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clada_export.trace.stack import Stack, WholeError, find_stack
from tests.tiny_models import tiny_model


class Layer(nn.Module):
    """A layer of a kind, which knows its number."""

    def __init__(self, number: int, kind: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.window = 100 * kind
        self.projection = nn.Linear(2, 2 + kind)


class Config:
    """As much of a configuration as is read."""

    def __init__(self, depth: int, **lists: Any) -> None:
        self.num_hidden_layers = depth
        vars(self).update(lists)


class Decoder(nn.Module):
    """Layers of given kinds."""

    def __init__(self, kinds: list[int], **lists: Any) -> None:
        super().__init__()
        self.config = Config(len(kinds), **lists)
        self.layers = nn.ModuleList(Layer(*pair) for pair in enumerate(kinds))


@pytest.mark.parametrize(
    ("kinds", "expected", "traced", "repeats"),
    [
        ([0] * 9, Stack("layers", 9, 1, 1), 4, 5),
        ([1] + [0] * 9, Stack("layers", 10, 1, 1), 4, 6),
        ([1, 1, 1] + [0] * 9, Stack("layers", 12, 3, 1), 6, 6),
        ([0, 1] * 6, Stack("layers", 12, 1, 2), 6, 3),
        ([0, 0, 0, 0, 0, 1] * 4 + [0, 0], Stack("layers", 26, 1, 6), 14, 2),
    ],
    ids=["alike", "another first", "three others first", "alternating", "five to one"],
)
def test_the_period_of_layers(kinds: list[int], expected: Stack, traced: int, repeats: int) -> None:
    stack = find_stack(Decoder(kinds))
    assert stack == expected
    assert (stack.traced, stack.repeats) == (traced, repeats)


@given(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(3, 6), st.integers(0, 3))
def test_repeating_the_block_gives_the_kinds_of_all_layers(first: int, block: list[int], times: int, left: int) -> None:
    kinds = [7] * first + block * times + block[: left % len(block)]
    try:
        stack = find_stack(Decoder(kinds))
    except WholeError:
        # Besides the first ones, two blocks and what is left are traced, and what is left is one layer at least.
        assert len(kinds) - max(first, 1) <= 3 * len(block)
        return
    end = stack.first + 2 * stack.period
    second = kinds[stack.first + stack.period : end]
    assert kinds == kinds[:end] + second * stack.repeats + kinds[len(kinds) - (stack.traced - end) :]
    assert kinds[stack.first : stack.first + stack.period] == second
    assert 1 <= stack.traced - end <= stack.period


def test_a_list_of_the_configuration_makes_layers_different() -> None:
    lists = {"layer_types": ["sliding", "full"] * 5, "other": [1, 2, 3]}
    assert find_stack(Decoder([0] * 10, **lists)).period == 2


@pytest.mark.parametrize("change", ["buffer", "attribute", "type", "shape", "method"])
def test_one_layer_that_differs_is_no_period(change: str) -> None:
    decoder = Decoder([0] * 9)
    for layer in decoder.layers:
        layer.register_buffer("slopes", torch.ones(3))
    odd = decoder.layers[5]
    assert isinstance(odd, Layer)
    if change == "buffer":
        odd.slopes = torch.tensor([1.0, 1.0, 2.0])
    elif change == "attribute":
        odd.window = 5
    elif change == "type":
        odd.projection = nn.Linear(2, 2).double()
    elif change == "shape":
        odd.projection = nn.Linear(2, 3)
    else:
        odd.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(WholeError):
        find_stack(decoder)


def test_models_without_one_stack_say_why() -> None:
    with pytest.raises(WholeError, match="does not say how many layers"):
        find_stack(nn.Linear(2, 2))
    twice = Decoder([0] * 9)
    twice.more = nn.ModuleList(nn.Identity() for _ in range(9))
    with pytest.raises(WholeError, match="2 lists of 9 modules"):
        find_stack(twice)
    mixed = Decoder([0] * 9)
    mixed.layers[3].projection.to(torch.float64)
    with pytest.raises(WholeError, match="several types"):
        find_stack(mixed)
    with pytest.raises(WholeError, match="its 4 layers are not alike in a period that comes more than 2 times"):
        find_stack(Decoder([0] * 4))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "opt", "gpt2", "mixtral"])
def test_tiny_models_have_a_period_of_one(kind: str) -> None:
    model = tiny_model(kind, 0, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 6})
    stack = find_stack(model)
    assert (stack.first, stack.period, stack.traced) == (1, 1, 4)
