"""The tiny exports that the tests of the graph passes are given are what the exporter makes."""

from __future__ import annotations

import hashlib

import onnx_ir as ir
import pytest

from tests.tiny_models import _export, export_tiny, tiny_model


@pytest.mark.parametrize("kind", ["gemma3_text", pytest.param("phi3", marks=pytest.mark.long)])
def test_fusions_after_an_export_are_those_of_an_export(kind: str) -> None:
    """All but names, and the order of nodes that do not hang on each other, which the exporter leaves to Python's hashes."""
    assert _structure(export_tiny(kind, "cpu")) == _structure(_export(tiny_model(kind), None, "cpu"))


def _structure(model: ir.Model) -> tuple[list[str], list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Digests of all nodes and of what they compute from; the inputs; and the outputs with what computes them."""
    graph = model.graph
    known = {value: _digest("input", value.name, str(value.type), str(value.shape)) for value in graph.inputs}
    for value in graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        known[value] = _digest("initializer", str(array.dtype), array.shape, array.tobytes())
    nodes = []
    for node in graph:
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        inputs = [None if value is None else known[value] for value in node.inputs]
        nodes.append(_digest(node.domain, node.op_type, inputs, attributes))
        known |= {value: _digest(nodes[-1], index) for index, value in enumerate(node.outputs)}
    interface = [(value.name, str(value.type), str(value.shape)) for value in graph.inputs]
    return sorted(nodes), interface, [(value.name, known[value]) for value in graph.outputs]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
