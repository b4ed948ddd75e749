"""A caller says of how many last positions it wants logits; where it says nothing it gets all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.kept_logits import KEPT_LOGITS, KeepLastLogits
from graph_passes.load_outputs import AddLoadOutputs
from graph_passes.naming import name_interface
from graph_passes.quant.quantiser import QuantFormat, UniformQuantiser
from graph_passes.quant_matmul import QuantiseProducts
from tests.tiny_models import export_tiny, prompt_feeds, session

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))


def _graph(kind: str) -> ir.Model:
    model = export_tiny(kind, "cpu")
    name_interface(model)
    return model


def _results(model: ir.Model, kept: int | None) -> dict[str, np.ndarray]:
    names = [str(value.name) for value in model.graph.outputs if "present" not in str(value.name)]
    inputs = [value for value in model.graph.inputs if value.name != KEPT_LOGITS]
    feeds = prompt_feeds(inputs, IDS) | ({} if kept is None else {KEPT_LOGITS: np.array([kept], np.int64)})
    return dict(zip(names, session(model).run(names, feeds), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_last_positions(kind: str) -> None:
    wanted = _results(_graph(kind), None)["logits"]
    model = _graph(kind)
    assert KeepLastLogits()(model).modified
    assert not KeepLastLogits()(model).modified
    AddLoadOutputs()(model)
    whole = _results(model, None)
    for kept in (None, 0, 1, 3, 7, 100):
        found = _results(model, kept)
        np.testing.assert_allclose(found["logits"], wanted[:, -kept:] if kept else wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["log_sum_exp"], whole["log_sum_exp"], rtol=1e-5)


def test_a_quantised_head_is_cut_too() -> None:
    model = _graph("llama")
    QuantiseProducts(UniformQuantiser(QuantFormat(8)))(model)
    assert KeepLastLogits()(model).modified
    head = next(node for node in model.graph if node.outputs[0].name == "logits")
    assert head.op_type == "QuantMatMul"
    assert head.inputs[0] is not None
    cut = head.inputs[0].producer()
    assert cut is not None
    assert cut.op_type == "Slice"


def test_factors_of_single_numbers_are_looked_through_and_other_nodes_not() -> None:
    for op_type, cut in (("Tanh", True), ("Softmax", False)):
        model = _graph("llama")
        graph = model.graph
        logits = next(value for value in graph.outputs if value.name == "logits")
        logits.name = "raw"
        capped = ir.node(op_type, [logits]).outputs[0]
        capped.name, capped.type, capped.shape = "logits", logits.type, logits.shape
        graph.outputs[list(graph.outputs).index(logits)] = capped
        node = capped.producer()
        assert node is not None
        graph.append(node)
        wanted = _results(model, None)["logits"]
        assert KeepLastLogits()(model).modified is cut
        if cut:
            np.testing.assert_allclose(_results(model, 2)["logits"], wanted[:, -2:], rtol=1e-5, atol=1e-6)


def test_a_graph_without_logits_is_refused() -> None:
    model = _graph("llama")
    next(value for value in model.graph.outputs if value.name == "logits").name = "scores"
    with pytest.raises(ir.passes.PreconditionError, match="logits"):
        KeepLastLogits()(model)
