"""Passes in a list, and what each is held to."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from handmade import HIDDEN, Handmade, dense_rewrite

from graph_passes import find_ffns
from graph_passes.dead_columns import DropDeadColumns
from graph_passes.emit import initializer
from graph_passes.load_outputs import AddLoadOutputs
from graph_passes.machine_paths import ForgetMachinePaths
from graph_passes.pass_list import PassList
from graph_passes.positions import ShiftPositions
from graph_passes.reshapes import RemoveHeadReshapes
from graph_passes.rewrite import RewriteFFNs


def _swiglu() -> ir.Model:
    g = Handmade()
    return g.model(g.swiglu())


class _Breaks(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)

    def ensures(self, model: ir.Model) -> None:
        raise ir.passes.PostconditionError("it did nothing")


def test_passes_run_in_order_and_their_nodes_are_counted() -> None:
    model = _swiglu()
    before = model.graph.num_nodes()
    search = find_ffns(model)
    rewrite = RewriteFFNs({"mlp.down_proj": dense_rewrite()}, search)
    passes = PassList(rewrite, DropDeadColumns(), RemoveHeadReshapes(), ForgetMachinePaths())
    assert passes(model).modified
    assert list(passes.node_counts) == ["RewriteFFNs", "DropDeadColumns", "RemoveHeadReshapes", "ForgetMachinePaths"]
    assert passes.node_counts["ForgetMachinePaths"] == model.graph.num_nodes() != before


def test_a_condition_that_does_not_hold_names_the_pass_and_its_place() -> None:
    model = _swiglu()
    with pytest.raises(ir.passes.PreconditionError, match=r"^AddLoadOutputs, pass 2 of 2: the graph has no output 'logits'"):
        PassList(ForgetMachinePaths(), AddLoadOutputs())(model)
    with pytest.raises(ir.passes.PostconditionError, match=r"^_Breaks, pass 1 of 1: it did nothing"):
        PassList(_Breaks())(model)


def test_a_search_of_another_graph_is_refused() -> None:
    model, other = _swiglu(), _swiglu()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ir.passes.PreconditionError, match=r"'mlp\.down_proj' was found in another graph"):
        RewriteFFNs({"mlp.down_proj": dense_rewrite()}, find_ffns(other))(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_stack_traces_go() -> None:
    model = _swiglu()
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/someone/model.py"
    with pytest.raises(ir.passes.PostconditionError, match="stack trace"):
        ForgetMachinePaths().ensures(model)
    assert ForgetMachinePaths()(model).modified
    assert b"someone" not in ir.to_proto(model).SerializeToString()
    assert not ForgetMachinePaths()(model).modified


def test_transposes_around_one_that_is_an_output_become_one() -> None:
    g = Handmade()
    orders = ([0, 2, 1], [1, 0, 2], [2, 1, 0])
    first = g.op("Transpose", g.x, perm=orders[0])
    output = g.op("Transpose", first, perm=orders[1])
    model = g.model(output, g.op("Neg", g.op("Transpose", output, perm=orders[2])))
    with pytest.raises(ir.passes.PostconditionError):
        RemoveHeadReshapes().ensures(model)
    assert RemoveHeadReshapes()(model).modified
    (last,) = (node for node in model.graph if node.op_type == "Transpose" and node.inputs[0] is g.x and node.outputs[0].uses()
               and not any(user.op_type == "Transpose" for user, _ in node.outputs[0].uses()))  # fmt: skip
    x = np.zeros((2, 3, 5))
    wanted = x.transpose(orders[0]).transpose(orders[1]).transpose(orders[2]).shape
    assert x.transpose(last.attributes["perm"].as_ints()).shape == wanted
    assert not RemoveHeadReshapes()(model).modified


def test_positions_are_not_shifted_twice() -> None:
    g = Handmade()
    positions = g.add_input("position_ids", "b", "s")
    positions.type = ir.TensorType(ir.DataType.INT64)
    model = g.model(g.op("Neg", positions))
    assert ShiftPositions(2)(model).modified
    with pytest.raises(ir.passes.PreconditionError, match="shifted already"):
        ShiftPositions(2)(model)


def test_a_constant_is_used_again_if_it_is_the_same() -> None:
    model = _swiglu()
    one = initializer(model.graph, "one", np.ones(HIDDEN, np.float32))
    assert initializer(model.graph, "one", np.ones(HIDDEN, np.float32)) is one
    with pytest.raises(ValueError, match="'one' already, of another content"):
        initializer(model.graph, "one", np.zeros(HIDDEN, np.float32))
