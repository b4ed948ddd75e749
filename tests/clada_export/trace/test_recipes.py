"""What is done to weights as constants, recorded and done again."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx.reference.ops
import onnx_ir as ir
import pytest
import torch

from clada_export.trace.recipes import SMALL, StandIn, Weight, constant, is_lost, recipe_of, renamed, same_recipe, weights_in

LARGE = (200, 300)
CHANGES: dict[str, Any] = {
    "transpose": lambda a, b: np.transpose(a, axes=(1, 0)),
    "method": lambda a, b: a.transpose(1, 0).reshape(-1)[10:],
    "concatenate": lambda a, b: np.concatenate([np.transpose(a), np.transpose(b)], axis=1),
    "contiguous": lambda a, b: np.ascontiguousarray(np.concatenate([a, b], axis=0)),
    "arithmetic": lambda a, b: 1.0 + a * b,
    "operator": lambda a, b: onnx.reference.ops.load_op("", "Transpose", 18).eval(a, perm=[1, 0]),
    "cast": lambda a, b: a.astype(np.float16),
}


@pytest.mark.parametrize("shape", [(3, 5), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_recipe_gives_of_weights_what_was_done_to_stand_ins(change: str, shape: tuple[int, int]) -> None:
    weights = {name: torch.randn(shape) for name in ("a", "b")}
    stand_ins = [StandIn(torch.zeros(shape), name).numpy() for name in weights]
    made = ir.Tensor(CHANGES[change](*stand_ins), name="made")
    recipe = recipe_of(made)
    assert recipe is not None and not is_lost(made)
    assert set(weights_in(recipe)) <= {"a", "b"}
    expected = CHANGES[change](*(weight.numpy() for weight in weights.values()))
    found = constant(recipe, made, "found", weights)
    assert (found.name, tuple(found.shape), found.dtype) == ("found", expected.shape, ir.DataType.from_numpy(expected.dtype))
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_large_constant_is_a_view_or_made_when_it_is_read() -> None:
    weight = torch.randn(LARGE)
    made = ir.Tensor(np.transpose(StandIn(torch.zeros(LARGE), "a").numpy()))
    assert made.size > SMALL
    recipe = recipe_of(made)
    assert recipe is not None
    found = constant(recipe, made, "found", {"a": weight})
    weight.fill_(7.0)
    assert np.shares_memory(found.numpy(), weight.numpy())
    assert (found.numpy() == 7.0).all()


def test_bfloat16_stays_itself() -> None:
    weight = torch.randn(3, 5).bfloat16()
    made = ir.Tensor(np.transpose(StandIn(torch.zeros(3, 5, dtype=torch.bfloat16), "a").numpy()))
    recipe = recipe_of(made)
    assert recipe is not None
    found = constant(recipe, made, "found", {"a": weight})
    assert found.dtype == ir.DataType.BFLOAT16
    np.testing.assert_array_equal(found.numpy(), weight.float().numpy().T.astype(ml_dtypes.bfloat16))


def test_recipes_are_compared_and_renamed() -> None:
    one, other = (
        recipe_of(ir.Tensor(np.transpose(StandIn(torch.zeros(3, 5), name).numpy(), axes=[1, 0]))) for name in ("a.1", "a.2")
    )
    assert one is not None and other is not None
    assert not same_recipe(one, other)
    assert same_recipe(renamed(one, lambda name: name.replace("1", "2")), other)
    assert renamed(Weight("a"), str.upper) == Weight("A")
    reversed_axes = recipe_of(ir.Tensor(np.transpose(StandIn(torch.zeros(3, 5), "a.2").numpy(), axes=[0, 1])))
    assert not same_recipe(reversed_axes, other)


def test_what_was_not_recorded_is_lost() -> None:
    array = StandIn(torch.zeros(LARGE), "a").numpy()
    assert is_lost(ir.Tensor(array.swapaxes(0, 1).copy()))
    assert is_lost(ir.Tensor(np.array(array)))
    assert not is_lost(ir.Tensor(np.ones(LARGE, np.float32)))
    assert not is_lost(ir.Tensor(np.zeros(3, np.float32)))
    assert recipe_of(ir.Tensor(np.ones(3))) is None and recipe_of(None) is None
