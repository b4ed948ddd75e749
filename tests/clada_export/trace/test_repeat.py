"""Cutting a graph into blocks and repeating one, on handmade graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clada_export.trace.blocks import LayerNames, find_block
from clada_export.trace.recipes import constant
from clada_export.trace.repeat import repeat
from clada_export.trace.stack import Stack, WholeError
from tests.clada_export.trace.handmade import Handmade
from tests.clada_export.trace.same_graph import differences


def repeated(stack: Stack, **settings: int) -> ir.Graph:
    """The graph of the first layers, repeated."""
    traced = Handmade(stack.traced, stack.period, stand_ins=True, **settings)
    graph = traced.graph()
    recipes = repeat(graph, find_block(graph, stack, traced.used), stack)
    weights = Handmade(stack.depth, stack.period).weights
    for value, recipe in recipes.items():
        assert value.const_value is not None and value.name is not None
        value.const_value = constant(recipe, value.const_value, value.name, weights)
    return graph


@settings(deadline=None, max_examples=25)
@given(first=st.integers(1, 3), period=st.integers(1, 3), more=st.integers(1, 9))
def test_repeating_what_few_layers_give_is_what_all_give(first: int, period: int, more: int) -> None:
    first += -first % period
    stack = Stack("model.layers", first + 3 * period + more, first, period)
    assert differences(Handmade(stack.depth, period).graph(), repeated(stack)) == []


def test_what_quotes_the_trace_is_gone_and_the_order_is_right() -> None:
    graph = repeated(Stack("model.layers", 9, 1, 1))
    assert not graph.metadata_props
    seen: set[ir.Node] = set()
    for node in graph:
        assert seen.issuperset(node.predecessors())
        seen.add(node)


def test_sizes_that_only_a_layer_knows_keep_names_of_their_own() -> None:
    graph = repeated(Stack("model.layers", 9, 1, 1))
    sizes = [str(node.outputs[0].shape[0]) for node in graph if node.op_type == "Tanh" and node.outputs[0].shape is not None]
    assert len(sizes) == len(set(sizes)) == 9


@pytest.mark.parametrize("odd", [1, 2])
def test_blocks_with_other_constants_are_not_repeated(odd: int) -> None:
    with pytest.raises(WholeError, match="differ, of layers that are alike"):
        repeated(Stack("model.layers", 9, 1, 1), odd=odd)


def test_blocks_with_other_operators_are_not_repeated() -> None:
    stack = Stack("model.layers", 9, 1, 1)
    traced = Handmade(stack.traced, period=2, stand_ins=True)
    with pytest.raises(WholeError, match=r"'node_1\.active' and Tanh 'node_2\.active' differ"):
        find_block(traced.graph(), stack, traced.used)


def test_the_last_layers_read_no_other_than_the_one_before() -> None:
    stack = Stack("model.layers", 9, 1, 1)
    traced = Handmade(stack.traced, stand_ins=True)
    graph = traced.graph()
    nodes = {node.name: node for node in graph}
    nodes["node_3.in"].replace_input_with(0, nodes["node_1.out"].outputs[0])
    with pytest.raises(WholeError, match=r"'node_3\.in' reads a layer that is further back"):
        find_block(graph, stack, traced.used)


def test_a_weight_whose_way_was_lost_is_missed() -> None:
    stack = Stack("model.layers", 9, 1, 1)
    traced = Handmade(stack.traced, stand_ins=True)
    graph = traced.graph()
    value = graph.initializers["head"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.array(value.const_value.numpy()), name="head")
    with pytest.raises(WholeError, match=r"not known what became of model\.head\.weight"):
        find_block(graph, stack, traced.used)


def test_names_of_layers() -> None:
    names = LayerNames("model.layers")
    assert [names.layer(name) for name in ("model.layers.12.mlp.weight", "past_key_values.3.key", "present.4.value")] == [
        12,
        3,
        4,
    ]
    assert [names.layer(name) for name in ("model.norm.weight", "other.model.layers.1.x", "attention_mask")] == [
        None,
        None,
        None,
    ]
    scopes = "['', 'model', 'model.layers.2', 'model.layers.2.mlp', 'linear_2']"
    assert names.shifted(scopes, 9) == "['', 'model', 'model.layers.11', 'model.layers.11.mlp', 'linear_2']"
    assert names.shifted("p_model_layers_2_mlp_weight", 9) == "p_model_layers_11_mlp_weight"
    assert names.shifted("present.2.key", 9, start=3) == "present.2.key"
    assert names.shifted("present.3.key", 9, start=3) == "present.12.key"
