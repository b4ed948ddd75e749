"""Models with nodes added that the schemas allow: what a mutation seldom hits on, as much has to fit in many places at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

_OPERATORS = [
    *(
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Compress",
        "Concat",
        "ConstantOfShape",
        "CumSum",
        "Div",
    ),
    *(
        "Dropout",
        "Einsum",
        "Equal",
        "Expand",
        "EyeLike",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Identity",
    ),
    *(
        "IsNaN",
        "LayerNormalization",
        "LessOrEqual",
        "MatMul",
        "Max",
        "Mean",
        "Mod",
        "Mul",
        "Neg",
        "NonZero",
        "Not",
        "OneHot",
        "Pad",
    ),
    *(
        "Pow",
        "QuantizeLinear",
        "DequantizeLinear",
        "Range",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "ScatterND",
    ),
    *(
        "SequenceAt",
        "SequenceConstruct",
        "Shape",
        "Sigmoid",
        "Size",
        "Slice",
        "Softmax",
        "Split",
        "SplitToSequence",
        "Sqrt",
        "Squeeze",
    ),
    *(
        "StringNormalizer",
        "Sub",
        "Sum",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
        "ConcatFromSequence",
    ),
]
_OPERATOR = st.sampled_from(_OPERATORS)
_BELOW = st.integers(0, 2**32 - 1)
_COUNT = st.integers(1, 12)
_SIZE = st.sampled_from([0, 1, 2, 4, 8, 32, -1, 3, 1000, 10**5, 10**9, 10**12, 2**63 - 1])
_CONSTANT = st.one_of(
    st.lists(_SIZE, max_size=4).map(lambda sizes: np.array(sizes, dtype=np.int64)),
    _SIZE.map(np.int64),
    st.sampled_from(
        [
            np.float32(1e30),
            np.float32("nan"),
            np.float32("inf"),
            np.array([0.5, 2.5], np.float32),
            np.float32(2),
            np.ones((3, 4), np.float32),
            np.arange(8192),
            np.array(["a" * 50, "b"]),
        ]
    ),
    st.sampled_from(
        [np.array([True]), np.array(True), np.zeros((0, 4), np.float32), np.array([0, 1], np.float32), np.uint8(3)]
    ),
)


@st.composite
def grown_model(draw: st.DrawFn, make: Callable[[], Any]) -> Any:
    """What `make` gives, with up to a dozen nodes more that read its values and each other's; some take another's place."""
    model = make()
    names = [value.name for value in model.graph.input] + [tensor.name for tensor in model.graph.initializer]
    names += [name for node in model.graph.node for name in node.output]
    for index in range(draw(_COUNT)):
        if draw(_BELOW) % 3 == 0:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(draw(_CONSTANT)), f"constant{index}"))
            names.append(f"constant{index}")
        node = _node(draw, names, index)
        names += node.output
        place = draw(_BELOW) % (len(model.graph.node) + 1)
        if draw(_BELOW) % 3 == 0 and place < len(model.graph.node) and len(model.graph.node[place].input):
            inputs = model.graph.node[place].input
            inputs[draw(_BELOW) % len(inputs)] = node.output[0]
        model.graph.node.append(node)
    return model


def _node(draw: st.DrawFn, names: list[str], index: int) -> onnx.NodeProto:
    schema = _schema(draw(_OPERATOR))
    count = min(schema.max_input, schema.min_input + draw(_BELOW) % 3)
    # Mostly of the latest: chains, and values that are read twice.
    inputs = [names[-1 - draw(_BELOW) % min(len(names), 5 if draw(_BELOW) % 2 else 60)] for _ in range(count)]
    outputs = [f"new{index}.{each}" for each in range(min(schema.max_output, max(schema.min_output, 1)))]
    attributes = {}
    for name, attribute in schema.attributes.items():
        if attribute.required or draw(_BELOW) % 3 == 0:
            value = _attribute(draw, attribute.type)
            if value is not None:
                attributes[name] = value
    return helper.make_node(schema.name, inputs, outputs, name=f"new{index}", **attributes)


def _attribute(draw: st.DrawFn, kind: Any) -> Any:
    types = onnx.defs.OpSchema.AttrType
    if kind == types.INT:
        return draw(_SIZE) if draw(_BELOW) % 3 == 0 else draw(_BELOW) % 8
    if kind == types.INTS:
        return [draw(_SIZE) if draw(_BELOW) % 3 == 0 else draw(_BELOW) % 4 for _ in range(1 + draw(_BELOW) % 3)]
    if kind == types.FLOAT:
        return [0.0, 1.0, 1e30][draw(_BELOW) % 3]
    if kind == types.STRING:
        return ["", "ij,jk->ik", "tanh", "linear", "..."][draw(_BELOW) % 5]
    if kind == types.TENSOR:
        return numpy_helper.from_array(np.asarray(draw(_CONSTANT)), "t")
    return None


@functools.cache
def _schema(name: str) -> Any:
    return onnx.defs.get_schema(name, 20, "")
