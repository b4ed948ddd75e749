"""A decoder of thirty nodes that has what ONNX models have: functions, bodies, constants, sizes that are computed, a cache."""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import numpy_helper, parser

VOCABULARY, WIDTH, INNER = 32, 8, 16

_TEXT = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
small (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
       float[batch, 2, past, 4] past_0_key, float[batch, 2, past, 4] past_0_value)
   => (float[batch, sequence, 32] logits, float[batch, 2, total, 4] present_0_key, float[batch, 2, total, 4] present_0_value)
{
    [embed] h = Gather (embedding, input_ids)
    [shape] sizes = Shape <start = 0, end = 2> (h)
    [heads] parts = Constant <value_ints = [2, 4]> ()
    [target] split = Concat <axis = 0> (sizes, parts)
    [key] k = MatMul (h, key)
    [keys] ks = Reshape (k, split)
    [turn] kt = Transpose <perm = [0, 2, 1, 3]> (ks)
    [cache_k] present_0_key = Concat <axis = 2> (past_0_key, kt)
    [cache_v] present_0_value = Concat <axis = 2> (past_0_value, kt)
    [total] all = ReduceSum <keepdims = 0> (present_0_key)
    [scale] tiny = Mul (all, small_number)
    [attend] a = Add (h, tiny)
    [mask] seen = Cast <to = 1> (attention_mask)
    [some] most = ReduceMax <keepdims = 0> (seen)
    [masked] b = Mul (a, most)
    [two] number = Constant <value_float = 2.0> ()
    [four] doubled = Mul (number, number)
    [yes] condition = Constant <value = bool {1}> ()
    [choice] c = If (condition) <
        then_branch = yes () => (float[batch, sequence, 8] t) { [same] t = Identity (b) },
        else_branch = no () => (float[batch, sequence, 8] e) { [other] e = Mul (b, doubled) }>
    [gate] g = MatMul (c, gate)
    [activation] s = local.silu (g)
    [up] u = MatMul (c, up)
    [product] p = Mul (s, u)
    [down] d = MatMul (p, down)
    [residual] r = Add (b, d)
    [head] logits = MatMul (r, head)
}
<opset_import: ["" : 20, "local" : 1], domain: "local">
silu (x) => (y) { s = Sigmoid (x)  y = local.times (x, s) }
<opset_import: ["" : 20], domain: "local">
times (x, s) => (y) { y = Mul (x, s) }
"""


def small_decoder() -> onnx.ModelProto:
    """The model, with random weights."""
    model = parser.parse_model(_TEXT)
    # The parser does not take names with dots.
    for node in model.graph.node:
        node.input[:] = [_named(name) for name in node.input]
        node.output[:] = [_named(name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = _named(value.name)
    random = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "key": (WIDTH, WIDTH),
        "gate": (WIDTH, INNER),
        "up": (WIDTH, INNER),
        "down": (INNER, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "small_number"))
    return model


def _named(name: str) -> str:
    return re.sub("^past_0_", "past_key_values.0.", re.sub("^present_0_", "present.0.", name))
