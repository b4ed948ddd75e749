"""Write a router as standard ONNX nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import Emitter, Initializer
from graph_passes.router import Router


def emit_router(
    router: Router, x: ir.Value, load: ir.Value, name: str, initializer: Initializer
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that compute a layer's scores, in order, and the scores, float32 [.., E]; arguments as of `write_router`.

    Args:
        name: prefix of the nodes' and constants' names.
    """
    emitter = Emitter(name)
    score = write_router(router, x, load, name, initializer, emitter)
    return list(emitter.tape.nodes), score


def write_router(
    router: Router, x: ir.Value, load: ir.Value, name: str, initializer: Initializer, emitter: Emitter
) -> ir.Value:
    """Write the nodes that compute a layer's scores, float32 [.., E].

    A row that runs dense (load = +inf or NaN) has score 1 everywhere, or its scores: `Router.dense_rows`.

    Args:
        x: the FFN input [.., d]; cast to float32 if it is not.
        load: float32 [..]; not read with `dense_rows` = scores.
        name: prefix of the constants' names.
    """
    op = emitter.op
    value = emitter.to_float(x)
    if router.normalise:
        # LpNormalization keeps a row of zeros at zero, as PyTorch's normalize does.
        value = op("LpNormalization", value, axis=-1, p=2)
    last = len(router.weights) - 1
    for index, (weight, bias) in enumerate(zip(router.weights, router.biases, strict=True)):
        value = op("MatMul", value, initializer(f"{name}.{index}.weight", np.ascontiguousarray(weight.T, dtype=np.float32)))
        if bias is not None:
            value = op("Add", value, initializer(f"{name}.{index}.bias", bias.astype(np.float32)))
        if index < last and router.hidden != "identity":
            value = op({"relu": "Relu", "tanh": "Tanh"}[router.hidden], value)
    match router.output:
        case "softmax":
            value = op("Softmax", value, axis=-1)
        case "topk_softmax":
            k = initializer(f"{name}.k", np.array([router.k], dtype=np.int64))
            best, places = emitter.several("TopK", 2, value, k, axis=-1, largest=1, sorted=1)
            zero = initializer("router.zero", np.array(0.0, dtype=np.float32))
            zeros = op("Expand", zero, op("Shape", value))
            value = op("ScatterElements", zeros, places, op("Softmax", best, axis=-1), axis=-1)
        case output:
            value = op({"sigmoid": "Sigmoid", "abs": "Abs", "relu": "Relu"}[output], value)
    if router.scale != 1.0:
        value = op("Mul", value, initializer(f"{name}.scale", np.array(router.scale, dtype=np.float32)))
    if router.dense_rows == "scores":
        return value
    axis = initializer("router.last_axis", np.array([-1], dtype=np.int64))
    dense = op("Or", op("IsNaN", load), op("IsInf", load, detect_negative=0, detect_positive=1))
    one = initializer("router.one", np.array(1.0, dtype=np.float32))
    return op("Where", op("Unsqueeze", dense, axis), one, value)
