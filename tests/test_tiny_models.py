"""The tiny exports that the tests of the graph passes are given are what the exporter makes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tiny_models import _export, export_tiny, tiny_model


@pytest.mark.parametrize("kind", ["gemma3_text", pytest.param("phi3", marks=pytest.mark.long)])
def test_fusions_after_an_export_are_those_of_an_export(kind: str) -> None:
    """All but the numbers in the names that the exporter makes up."""
    (wanted, weights), (found, others) = _numbered(_export(tiny_model(kind), None, "cpu")), _numbered(export_tiny(kind, "cpu"))
    assert found == wanted
    assert others.keys() == weights.keys()
    for number, array in weights.items():
        np.testing.assert_array_equal(others[number], array)


def _numbered(model: ir.Model) -> tuple[list[tuple[object, ...]], dict[int, np.ndarray]]:
    """The interface and the nodes, with values numbered as they come; and the initializers, by number."""
    numbers: dict[ir.Value, int] = {}

    def number(value: ir.Value | None) -> int | None:
        return None if value is None else numbers.setdefault(value, len(numbers))

    graph = model.graph
    lines: list[tuple[object, ...]] = [
        (str(value.name), str(value.type), str(value.shape), number(value)) for value in graph.inputs
    ]
    for node in graph:
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        lines.append((node.domain, node.op_type, *map(number, node.inputs), "to", *map(number, node.outputs), *attributes))
    lines += [(str(value.name), number(value)) for value in graph.outputs]
    used = {numbers[value]: value.const_value for value in graph.initializers.values() if value in numbers}
    return lines, {number: tensor.numpy() for number, tensor in used.items() if tensor is not None}
