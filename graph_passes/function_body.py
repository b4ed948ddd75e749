"""The ONNX function `com.clada::SparseFFN`: the op's meaning in standard ONNX operators.

It computes every neuron and masks, so it saves nothing; it makes a model that contains the op run, with the same numbers,
wherever the native op is missing. Values that differ between layers (the load response and the prior) reach the body as
attribute references, so that one function serves all layers; attributes that change the structure are baked in.

Notation: d `hidden_size`, f `intermediate_size`, g `granule`, E = f / g, `..` the leading axes of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graph_passes.contract import ATTRIBUTES
from graph_passes.contract_types import holds
from graph_passes.op import (
    DOMAIN,
    OP_TYPE,
    OP_VERSION,
    SHADOW_BLOCK,
    ContractError,
    SparseFFNAttributes,
    input_names,
    output_names,
    x_types,
)
from graph_passes.quant.ffn_function_body import QuantisedProducts

MIN_OPSET, DEFAULT_OPSET = 18, 20
REFERENCED_ATTRIBUTES = tuple(attribute.name for attribute in ATTRIBUTES if attribute.by_reference)
"""Float attributes that the body reads from the node; all others are fixed when the function is made."""

PLUGIN_ATTRIBUTES: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
"""Attributes by which TensorRT's ONNX parser finds the plugin and prefers it to the function."""


VARIANT = "clada.variant"
"""Metadata key of a function that tells which structural variant it is."""

_ALWAYS_NAMED = ("activation", "gated", "score", "rule", "granule", "combine")
_SHORT = {"stat_norm": "stat", "weight_format": "weights"}


def variant_name(
    attributes: SparseFFNAttributes,
    weight_type: ir.DataType = ir.DataType.FLOAT,
    x_type: ir.DataType = ir.DataType.FLOAT,
) -> str:
    """A name for the structural variant that `attributes` need; ONNX overloads of the function are named by it."""
    parts = [attributes.activation, "gated" if attributes.gated else "plain", attributes.score, attributes.rule]
    parts += [f"g{attributes.granule}", attributes.combine, weight_type.name.lower()]
    parts += [] if x_type == ir.DataType.FLOAT else [f"x_{x_type.name.lower()}"]
    # Every other attribute that is baked in, where it means something and is not the default.
    others = [a for a in ATTRIBUTES if not a.by_reference and a.name not in _ALWAYS_NAMED and holds(a.read_when, attributes)]
    changed = [a for a in others if getattr(attributes, a.name) != a.default]
    parts += [a.name for a in changed if a.is_flag]
    parts += [f"{_SHORT.get(a.name, a.name)}_{getattr(attributes, a.name)}" for a in changed if not a.is_flag]
    return "_".join(parts)


def make_function(
    attributes: SparseFFNAttributes,
    *,
    weight_type: ir.DataType = ir.DataType.FLOAT,
    x_type: ir.DataType = ir.DataType.FLOAT,
    overload: str = "",
    opset: int = DEFAULT_OPSET,
) -> ir.Function:
    """Build the function for one structural variant.

    Args:
        attributes: structure of the op. The values of `REFERENCED_ATTRIBUTES` are not used: nodes bring their own.
        weight_type: element type of `w_in` and `w_out`; other than float32, they are cast in the body.
        x_type: element type of `x` and `y`; other than float32, x is cast at the start and y at the end.
        overload: ONNX overload name, for models that hold several variants.
        opset: version of the standard operators; a function has to use its model's.

    Returns:
        A function with the inputs and outputs of `graph_passes.op` that needs no custom operator.

    Raises:
        ValueError: an opset below 18.
        ContractError: types that the op does not allow together.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"{OP_TYPE}: the function needs opset {MIN_OPSET} or later; the model has {opset}")
    check_types(x_type, weight_type, attributes.weight_format)
    body = _Body(attributes, weight_type, x_type)
    outputs = body.build()
    graph = ir.Graph(
        [body.inputs[name] for name in input_names(attributes)],
        outputs,
        nodes=list(body.tape.nodes),
        opset_imports={"": opset},
        name=OP_TYPE,
    )
    # Without a value an attribute is one that every node has to carry.
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in (*attributes.to_onnx(), *PLUGIN_ATTRIBUTES)]
    function = ir.Function(DOMAIN, OP_TYPE, overload, graph=graph, attributes=declared)
    function.metadata_props[VARIANT] = variant_name(attributes, weight_type, x_type)
    function.doc_string = (
        "Feed-forward layer that computes the neurons its score, rule and load select (masked dense arithmetic)."
    )
    return function


def check_types(x_type: ir.DataType, weight_type: ir.DataType, weight_format: str = "plain") -> None:
    """Refuse types of x and of the weights that the op does not allow together.

    Raises:
        ContractError: names the types found and those wanted.
    """
    names = {kind: str(np.dtype(kind.numpy())) for kind in (x_type, weight_type)}
    allowed = x_types(names[weight_type], weight_format)
    if names[x_type] not in allowed:
        raise ContractError(f"{OP_TYPE}: x has type {names[x_type]}; wanted {' or '.join(allowed)}, as the weights")


def emit_activation(
    op: Callable[..., ir.Value], floats: Callable[[float], ir.Value], activation: str, value: ir.Value
) -> ir.Value:
    """The nodes of an activation of the contract on a float32 value.

    Args:
        op: makes a node of a type with inputs, and returns its output.
        floats: a scalar constant.
    """
    match activation:
        case "silu":
            return op("Mul", value, op("Sigmoid", value))
        # Spelled out, because onnx.reference does not evaluate Gelu inside a function.
        case "gelu":
            inner = op("Erf", op("Mul", value, floats(math.sqrt(0.5))))
            return op("Mul", op("Mul", value, floats(0.5)), op("Add", inner, floats(1.0)))
        case "gelu_tanh":
            cube = op("Mul", op("Mul", value, value), value)
            inner = op("Add", value, op("Mul", cube, floats(0.044715)))
            inner = op("Tanh", op("Mul", inner, floats(math.sqrt(2.0 / math.pi))))
            return op("Mul", op("Mul", value, floats(0.5)), op("Add", inner, floats(1.0)))
        case "relu":
            return op("Relu", value)
        case "relu2":
            relu = op("Relu", value)
            return op("Mul", relu, relu)
    return value


class _Body:
    """Emits the nodes of one function; methods follow the steps of the contract.

    All arithmetic is float32, and every change of type is a Cast of its own: a strongly typed runtime converts nothing itself.
    """

    def __init__(self, attributes: SparseFFNAttributes, weight_type: ir.DataType, x_type: ir.DataType) -> None:
        self.attributes = attributes
        self.types = {"w_in": weight_type, "w_out": weight_type, "x": x_type}
        self.tape = ir.tape.Tape()
        self.inputs = {name: ir.Value(name=name) for name in input_names(attributes)}
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    # Emitting

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: float | str | Sequence[int]) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes)

    def floats(self, value: float) -> ir.Value:
        """A scalar float32 constant."""
        return self._constant(np.array(value, dtype=np.float32))

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self._constant(np.array(values, dtype=np.int64))

    def _constant(self, array: np.ndarray) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tape.op("Constant", [], {"value": ir.Tensor(array)})
        return self._constants[key]

    def reference(self, name: str) -> ir.Value:
        """The node's float attribute `name` as a scalar."""
        key = ("reference", name)
        if key not in self._constants:
            value = self.tape.op("Constant", [])
            node = value.producer()
            assert node is not None
            node.attributes["value_float"] = ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)
            self._constants[key] = value
        return self._constants[key]

    def to_float(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=int(ir.DataType.FLOAT))

    def wide(self, name: str) -> ir.Value:
        """The input `name`, x or a weight, as float32."""
        value = self.inputs[name]
        return value if self.types[name] == ir.DataType.FLOAT else self.to_float(value)

    # The op

    def build(self) -> list[ir.Value]:
        attributes = self.attributes
        load = self.inputs["load"]
        self.x = self.wide("x")
        quantised = attributes.weight_format != "plain"
        self.products = QuantisedProducts(attributes, self.tape) if quantised else None
        hidden, gate = self.neurons(self.inputs["w_in"] if quantised else self.wide("w_in"))
        self.hidden_shape = self.op("Shape", hidden)
        padding = self.op("IsInf", load, detect_positive=0, detect_negative=1)
        prompt = self.op("IsInf", load, detect_positive=1, detect_negative=0)
        dense = self.op("Or", self.op("IsNaN", load), prompt)

        score = self.granule_score(hidden, gate)
        prior = self.prior() if attributes.use_stat else None
        active = self.select(score, self.load_multiplier(load), prior)
        active = self.op("Or", active, self.op("Unsqueeze", dense, self.ints(-1)))
        active = self.op("And", active, self.op("Not", self.op("Unsqueeze", padding, self.ints(-1))))
        mask = self.per_neuron(active)

        contribution = hidden
        if attributes.combine == "weighted":
            contribution = self.op("Mul", hidden, self.per_neuron(score))
        # Where, not Mul: an infinite activation of a masked neuron is removed too.
        y = self.down(self.op("Where", mask, contribution, self.floats(0.0)))
        if attributes.has_bias:
            y = self.op("Add", y, self.inputs["down_bias"])
        y = self.op("Where", self.op("Unsqueeze", padding, self.ints(-1)), self.floats(0.0), y)
        if self.types["x"] != ir.DataType.FLOAT:
            y = self.op("Cast", y, to=int(self.types["x"]))
        results = {"y": y}
        if attributes.emit_stat:
            results["stat"] = self.stat(hidden, prompt)
        if attributes.emit_active:
            counts = self.op("Cast", mask, to=int(ir.DataType.INT32))
            results["active"] = self.op("ReduceSum", counts, self.ints(-1), keepdims=0)
        outputs = []
        for name in output_names(attributes):
            results[name].name = name
            outputs.append(results[name])
        return outputs

    def neurons(self, w_in: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(h, a) of weights [f, n, d], or quantised: the hidden activation and the activated gate, each [.., f]."""
        gated = self.attributes.gated
        if self.products is None:
            first = self.project(w_in, 0)
            second = self.project(w_in, 1) if gated else None
        else:
            first, second = self.products.inner(self.x, w_in)
        activated = self.activate(self.biased(first, "gate_bias" if gated else "up_bias"))
        if second is None:
            return activated, activated
        return self.op("Mul", activated, self.biased(second, "up_bias")), activated

    def project(self, w_in: ir.Value, index: int) -> ir.Value:
        rows = self.op("Squeeze", self.op("Slice", w_in, self.ints(index), self.ints(index + 1), self.ints(1)), self.ints(1))
        return self.op("MatMul", self.x, self.op("Transpose", rows, perm=[1, 0]))

    def down(self, hidden: ir.Value) -> ir.Value:
        if self.products is None:
            return self.op("MatMul", hidden, self.wide("w_out"))
        return self.products.outer(hidden, self.inputs["w_out"])

    def biased(self, value: ir.Value, bias: str) -> ir.Value:
        return self.op("Add", value, self.inputs[bias]) if self.attributes.has_bias else value

    def activate(self, value: ir.Value) -> ir.Value:
        return emit_activation(self.op, self.floats, self.attributes.activation, value)

    def load_multiplier(self, load: ir.Value) -> ir.Value:
        """m(load) [..]; without meaning where load is not finite."""
        slope = self.reference("load_slope")
        # 0 * inf is NaN: a slope of zero means no response whatever the load is.
        factor = self.op("Exp", self.op("Neg", self.op("Mul", slope, load)))
        factor = self.op("Where", self.op("Equal", slope, self.floats(0.0)), self.floats(1.0), factor)
        return self.op("Min", self.op("Max", factor, self.reference("load_min")), self.reference("load_max"))

    # Scores

    def granule_score(self, hidden: ir.Value, gate: ir.Value) -> ir.Value:
        """The score of every granule [.., E]."""
        attributes = self.attributes
        if attributes.score == "external":
            return self.external_score()
        if attributes.score == "gate":
            score = self.op("Abs", gate)
        elif attributes.score == "prefix":
            score = self.op("Expand", self.op("Unsqueeze", self.root_stat(), self.ints(1)), self.hidden_shape)
        else:
            estimate = hidden if attributes.score == "exact" else self.neurons(self.shadow())[0]
            score = self.op("Mul", self.op("Abs", estimate), self.inputs["neuron_scale"])
        return self.per_granule(score)

    def external_score(self) -> ir.Value:
        """Bring a score [.., E] or [B, E] to [.., E], for x of any rank."""
        load = self.inputs["load"]
        score = self.inputs["score"]
        rows, width = self.op("Shape", load), self.op("Shape", score, start=-1)
        batch = self.op("Shape", load, start=0, end=1)
        by_batch = self.op("Reshape", load, self.op("Concat", batch, self.ints(-1), axis=0))
        wide = self.op("Reshape", score, self.op("Concat", batch, self.ints(-1), width, axis=0))
        wide = self.op("Expand", wide, self.op("Concat", self.op("Shape", by_batch), self.ints(1), axis=0))
        return self.op("Reshape", wide, self.op("Concat", rows, width, axis=0))

    def shadow(self) -> ir.Value:
        """The float32 weights [f, n, d] of the 4-bit copy. Float arithmetic on 0..255 is exact, and every runtime has it."""
        packed = self.op("Reshape", self.to_float(self.inputs["shadow"]), self.ints(0, 0, -1, SHADOW_BLOCK // 2))
        negative = self.op("Less", packed, self.floats(0.0))
        byte = self.op("Where", negative, self.op("Add", packed, self.floats(256.0)), packed)
        high = self.op("Floor", self.op("Mul", byte, self.floats(0.0625)))
        low = self.op("Sub", byte, self.op("Mul", high, self.floats(16.0)))
        levels = self.op("Concat", low, high, axis=-1)
        pair = self.to_float(self.inputs["shadow_scale"])
        scale = self.op("Slice", pair, self.ints(0), self.ints(1), self.ints(3))
        offset = self.op("Slice", pair, self.ints(1), self.ints(2), self.ints(3))
        return self.op("Reshape", self.op("Add", offset, self.op("Mul", scale, levels)), self.ints(0, 0, -1))

    def root_stat(self) -> ir.Value:
        return self.op("Sqrt", self.inputs["past_stat"])

    def prior(self) -> ir.Value:
        """r [B, 1, E]: a granule's mean of s_j / mean(s); 1 while no prompt has been seen."""
        root = self.root_stat()
        mean = self.op("ReduceMean", root, self.ints(-1), keepdims=1)
        ratio = self.op("Where", self.op("Greater", mean, self.floats(0.0)), self.op("Div", root, mean), self.floats(1.0))
        granule = self.attributes.granule
        ratio = self.op("Div", self.per_granule(ratio), self.floats(float(granule)))
        return self.op("Unsqueeze", ratio, self.ints(1))

    def per_granule(self, value: ir.Value) -> ir.Value:
        """Sum [.., f] over the neurons of a granule: [.., E]."""
        if self.attributes.granule == 1:
            return value
        # The number of granules is computed: Reshape would infer it, but not where there are no rows.
        rows, width = self.op("Shape", value, end=-1), self.op("Shape", value, start=-1)
        granule = self.ints(self.attributes.granule)
        grouped = self.op("Reshape", value, self.op("Concat", rows, self.op("Div", width, granule), granule, axis=0))
        return self.op("ReduceSum", grouped, self.ints(-1), keepdims=0)

    def per_neuron(self, value: ir.Value) -> ir.Value:
        """Repeat [.., E] for the neurons of each granule: [.., f]."""
        if self.attributes.granule == 1:
            return value
        wide = self.op("Expand", self.op("Unsqueeze", value, self.ints(-1)), self.ints(self.attributes.granule))
        return self.op("Reshape", wide, self.hidden_shape)

    # Rules

    def select(self, score: ir.Value, multiplier: ir.Value, prior: ir.Value | None) -> ir.Value:
        """The rule: bool [.., E], for rows whose load is finite. A NaN score counts as active."""
        threshold = self.inputs["threshold"]
        row = self.op("Unsqueeze", multiplier, self.ints(-1))
        eligible = None if prior is None else self.op("GreaterOrEqual", prior, self.reference("backbone_min"))
        if self.attributes.rule == "topk":
            return self.top_k(score, self.op("Div", threshold, row), eligible)
        level = self.op("Mul", threshold, row)
        if prior is not None:
            level = self.op("Mul", level, self.op("Pow", prior, self.op("Neg", self.reference("prior_gamma"))))
        if self.attributes.rule == "relative":
            level = self.op("Mul", level, self.best(score, eligible))
        # The negated comparison keeps NaN scores.
        active = self.op("Not", self.op("Less", score, level))
        return active if eligible is None else self.op("And", active, eligible)

    def best(self, score: ir.Value, eligible: ir.Value | None) -> ir.Value:
        """The largest score of a row that may win [.., 1]; 0 if there is none."""
        floor = self.floats(float("-inf"))
        found = self.op("Where", self.op("IsNaN", score), floor, score)
        if eligible is not None:
            found = self.op("Where", eligible, found, floor)
        best = self.op("ReduceMax", found, self.ints(-1), keepdims=1)
        return self.op("Where", self.op("IsInf", best, detect_positive=0), self.floats(0.0), best)

    def top_k(self, score: ir.Value, wanted: ir.Value, eligible: ir.Value | None) -> ir.Value:
        """The round(wanted) best granules, ties to the lowest index; `wanted` [.., 1]."""
        width = self.op("Shape", score, start=-1)
        count = self.op("Max", self.op("Round", wanted), self.floats(1.0))
        rank_by = self.op("Where", self.op("IsNaN", score), self.floats(float("inf")), score)
        if eligible is not None:
            rank_by = self.op("Where", eligible, rank_by, self.floats(float("-inf")))
        sorted_pair = self.tape.op_multi_out("TopK", [rank_by, width], {"axis": -1, "largest": 1, "sorted": 1}, num_outputs=2)
        order = sorted_pair[1]
        first, step = self._constant(np.array(0, dtype=np.int64)), self._constant(np.array(1, dtype=np.int64))
        places = self.to_float(self.op("Range", first, self.op("Squeeze", width), step))
        chosen = self.to_float(self.op("Less", places, count))
        # Every element is overwritten, so the data that is scattered into does not matter.
        active = self.op("Greater", self.op("ScatterElements", chosen, order, chosen, axis=-1), self.floats(0.5))
        return active if eligible is None else self.op("And", active, eligible)

    # State

    def stat(self, hidden: ir.Value, prompt: ir.Value) -> ir.Value:
        """past_stat + the sum over prompt rows of h^2 / norm(h)^2, or of h^2 with `stat_norm` none: [B, f]."""
        share = self.op("Mul", hidden, hidden)
        counted = self.op("Unsqueeze", prompt, self.ints(-1))
        if self.attributes.stat_norm == "row":
            total = self.op("ReduceSum", share, self.ints(-1), keepdims=1)
            counted = self.op("And", counted, self.op("Greater", total, self.floats(0.0)))
            share = self.op("Div", share, total)
        share = self.op("Where", counted, share, self.floats(0.0))
        stat = self.op("ReduceSum", share, self.ints(1), keepdims=0)
        return self.op("Add", self.inputs["past_stat"], stat) if self.attributes.use_stat else stat
