"""Compute a value of a graph that depends on its interface alone: masks and positions are known by what they are, not how."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from graph_passes.naming import BATCH, PAST, SEQUENCE, TOTAL

MOST_NODES = 256
"""Between the interface and a value: a mask takes some thirty."""


class NotEvaluatedError(Exception):
    """The value depends on more than masks, positions and sizes; says on what."""


class InterfaceValue:
    """A value that is computed of `attention_mask`, `position_ids` and sizes, and of nothing that a model learnt.

    Args:
        graph: that computes it.
        value: of it.

    Raises:
        NotEvaluatedError: it depends on something else, or on too much.
    """

    def __init__(self, graph: ir.Graph, value: ir.Value) -> None:
        self._inputs: set[ir.Value] = set()
        self._sizes: dict[ir.Value, tuple[int | str, ...]] = {}
        nodes = self._needed(value)
        made: dict[ir.Value, ir.Value] = {}
        constants: list[ir.Value] = []

        def copy(old: ir.Value | None) -> ir.Value | None:
            if old is None:
                return None
            if old not in made:
                made[old] = ir.Value(name=f"v{len(made)}", type=old.type, const_value=old.const_value)
                if old in self._sizes:
                    made[old].type = ir.TensorType(ir.DataType.INT64)
                elif old.const_value is not None and old.producer() is None:
                    constants.append(made[old])
            return made[old]

        copies = []
        for node in (node for node in graph if node in nodes):
            inputs = [copy(item) for item in node.inputs]
            outputs = [made.setdefault(item, ir.Value(name=f"v{len(made)}")) for item in node.outputs]
            copies.append(ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs))
        result = copy(value)
        assert result is not None
        fed = {old: made[old] for old in (*self._inputs, *self._sizes) if old in made}
        self._fed = {old: str(new.name) for old, new in fed.items()}
        inner = ir.Graph(
            list(fed.values()),
            [result],
            nodes=copies,
            initializers=constants,
            opset_imports=dict(graph.opset_imports),
            name="v",
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        proto = ir.to_proto(ir.Model(inner, ir_version=10))
        try:
            self._session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes share no other base
            raise NotEvaluatedError(f"ONNX Runtime does not take it: {error}") from error

    def __call__(self, mask: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.generic]:
        """The value in a step.

        Args:
            mask: int64 [batch, past + tokens], 1 where a column is a token of its row.
            tokens: new columns.
        """
        batch, total = mask.shape
        symbols = {BATCH: batch, SEQUENCE: tokens, PAST: total - tokens, TOTAL: total}
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, total - tokens :]
        known = {"attention_mask": mask, "position_ids": positions}
        feeds = {
            name: known[str(value.name)]
            if value in self._inputs
            else np.array([_size(size, symbols) for size in self._sizes[value]], np.int64)
            for value, name in self._fed.items()
        }
        try:
            return np.asarray(self._session.run(None, feeds)[0])
        except Exception as error:  # see above
            raise NotEvaluatedError(f"ONNX Runtime can't compute it: {error}") from error

    def _needed(self, value: ir.Value) -> set[ir.Node]:
        nodes: set[ir.Node] = set()
        queue = [value]
        while queue:
            item = queue.pop()
            node = item.producer()
            if node is None:
                if item.is_graph_input():
                    self._take_input(item)
                elif item.const_value is None:
                    raise NotEvaluatedError(f"{item.name!r} is no constant")
                continue
            if node in nodes:
                continue
            source = node.inputs[0] if node.inputs else None
            if node.op_type == "Shape" and not node.domain and source is not None:
                self._sizes[item] = _sizes(node, source)
                continue
            if node.domain or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise NotEvaluatedError(f"{node.op_type} {node.name!r} is part of it")
            nodes.add(node)
            if len(nodes) > MOST_NODES:
                raise NotEvaluatedError(f"more than {MOST_NODES} nodes compute it")
            queue.extend(each for each in node.inputs if each is not None)
        return nodes

    def _take_input(self, value: ir.Value) -> None:
        if value.name not in ("attention_mask", "position_ids"):
            raise NotEvaluatedError(f"it reads {value.name!r}")
        self._inputs.add(value)


def _sizes(node: ir.Node, source: ir.Value) -> tuple[int | str, ...]:
    """What a Shape gives, in numbers and symbols."""
    if source.shape is None:
        raise NotEvaluatedError(f"the size of {source.name!r} is part of it, and not known")
    dims = list(source.shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(source.shape))]
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims)


def _size(size: int | str | ir.SymbolicDim, symbols: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    name = str(size.value) if isinstance(size, ir.SymbolicDim) else size
    if name.isdecimal():
        return int(name)
    if name not in symbols:
        raise NotEvaluatedError(f"the size {name!r} is part of it, and not known")
    return symbols[name]
