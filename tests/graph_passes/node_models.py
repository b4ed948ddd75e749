"""One-node models of `com.clada::SparseFFN`, run through the function body."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from graph_passes.function_body import PLUGIN_ATTRIBUTES, make_function
from graph_passes.op import DOMAIN, OP_TYPE, SparseFFNAttributes, input_names, output_names


def node_model(attributes: SparseFFNAttributes, feeds: dict[str, np.ndarray], overload: str = "", opset: int = 20) -> ir.Model:
    """A model of one node; x and load are inputs with free leading axes, everything else is a graph input of fixed shape."""
    x_type, weight_type = (ir.DataType.from_numpy(feeds[name].dtype) for name in ("x", "w_in"))
    values = []
    for name in input_names(attributes):
        array = feeds[name]
        shape: list[int | str] = list(array.shape)
        if name in ("x", "load"):
            shape[: array.ndim - (name == "x")] = [f"rows_{i}" for i in range(array.ndim - (name == "x"))]
        values.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(shape)))
    node = ir.node(
        OP_TYPE,
        values,
        {**attributes.to_onnx(), **PLUGIN_ATTRIBUTES},
        domain=DOMAIN,
        overload=overload,
        num_outputs=len(output_names(attributes)),
    )
    x, load = values[0], values[1]
    assert x.dtype is not None and x.shape is not None and load.shape is not None
    results = {
        "y": (x.dtype, x.shape),
        "stat": (ir.DataType.FLOAT, ir.Shape([load.shape[0] if len(load.shape) else 1, feeds["w_out"].shape[0]])),
        "active": (ir.DataType.INT32, load.shape),
    }
    for output, name in zip(node.outputs, output_names(attributes), strict=True):
        output.name = name
        output.type, output.shape = ir.TensorType(results[name][0]), results[name][1].copy()
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="one_node")
    function = make_function(attributes, weight_type=weight_type, x_type=x_type, overload=overload, opset=opset)
    return ir.Model(graph, ir_version=10, functions=[function])


def run_onnxruntime(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """All outputs by name, from ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, wanted), strict=True))


def run_reference_evaluator(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """All outputs by name, from `onnx.reference`."""
    proto = ir.to_proto(model)
    results = ReferenceEvaluator(proto).run(None, {value.name: feeds[value.name] for value in proto.graph.input})
    return dict(zip((o.name for o in proto.graph.output), results, strict=True))


def check(model: ir.Model) -> onnx.ModelProto:
    """The model after the full checker and shape inference."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
