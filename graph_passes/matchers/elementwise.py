"""Recognise an activation by what it computes.

Exporters and fusions write one activation in many ways (`gelu_new` alone in more than ten), so the elementwise nodes in front
of a down projection are not compared with patterns. They are evaluated on a grid, and the numbers are compared with the
activations of the op contract. Commuted operands, other orders and other constants cost no further matcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.matchers.common import keeps_last_axis
from graph_passes.matchers.weights import (
    VectorSource,
    casts_floats,
    constant_scalar,
    integer_product,
    rounds_values,
    vector_source,
)
from graph_passes.op import ACTIVATIONS

MAX_NODES = 64
"""Of one expression: the longest spelling of an activation has 11, thrice as many where each is rounded to int8."""
_TOLERANCE = 1e-4
"""Relative to 1 + |value|, for the closest activation: below the distance of gelu and gelu_tanh, the closest pair, and far
above the rounding of constants."""

_CONSTANTS = (math.sqrt(0.5), math.sqrt(2.0), math.sqrt(2.0 / math.pi), 2.0 * math.sqrt(2.0 / math.pi), 0.044715, 1.702)
"""Of the activations' usual forms, those that 16 bits do not hold."""

_GRID = np.concatenate([np.linspace(-9.0, 9.0, 181), [-30.0, -0.01, 0.0, 0.01, 30.0]])


def _erf(value: np.ndarray) -> np.ndarray:
    return np.array([math.erf(each) for each in value.ravel()], dtype=np.float64).reshape(value.shape)


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * value))


def _gelu(value: np.ndarray) -> np.ndarray:
    return 0.5 * value * (1.0 + _erf(value * math.sqrt(0.5)))


def _gelu_tanh(value: np.ndarray) -> np.ndarray:
    return 0.5 * value * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))


CONTRACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda v: v * _sigmoid(v),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda v: np.maximum(v, 0.0),
    "relu2": lambda v: np.maximum(v, 0.0) ** 2,
    "identity": lambda v: v,
}
assert tuple(CONTRACT) == ACTIVATIONS

_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
    "Neg": np.negative,
    "Abs": np.abs,
    "Exp": np.exp,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Sigmoid": _sigmoid,
    "Relu": CONTRACT["relu"],
    "Softplus": lambda v: np.logaddexp(0.0, v),
    "FastGelu": _gelu_tanh,
    "BiasGelu": _gelu,
    "Identity": lambda v: v,
    "Cast": lambda v: v,
    "Reshape": lambda v: v,
    # But for the rounding, which a matcher has to refuse.
    "QuantizeLinear": lambda v: v,
    "DequantizeLinear": lambda v: v,
}


_ONE_OPERAND = ("Reshape", "Cast", "Clip", "BiasGelu", "FastGelu", "QuantizeLinear", "DequantizeLinear")
"""Operators whose other inputs say how, not what."""


_NO_OPERATORS = {"Reshape", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear"}
"""Of an activation, for messages: they leave values what they are, or round them."""


def _function(node: ir.Node) -> Callable[..., np.ndarray] | None:
    """What the node computes elementwise, None if it does not."""
    attributes = node.attributes
    match node.op_type:
        case "Gelu":
            return _gelu_tanh if attributes.get_string("approximate", "none") == "tanh" else _gelu
        case "QuickGelu" | "Swish":
            alpha = attributes.get_float("alpha", 1.702 if node.op_type == "QuickGelu" else 1.0)
            return lambda v: v * _sigmoid(alpha * v)
        case "LeakyRelu":
            slope = attributes.get_float("alpha", 0.01)
            return lambda v: np.where(v < 0, slope * v, v)
        case "Elu" | "Selu" | "Mish" | "HardSwish" | "HardSigmoid" | "Softsign" | "Celu" | "ThresholdedRelu" | "Clip":
            return lambda v, *_: np.full_like(v, np.nan)
        case "Cast":
            return _FUNCTIONS["Cast"] if casts_floats(node) else None
        case "Reshape":
            return _FUNCTIONS["Reshape"] if keeps_last_axis(node) else None
    return _FUNCTIONS.get(node.op_type)


@dataclass(frozen=True)
class Elementwise:
    """An elementwise expression: its nodes, consumers first, and the values it starts from.

    `biases` are those that an activation node adds to a leaf before it activates it (BiasGelu, FastGelu).
    """

    result: ir.Value
    nodes: tuple[ir.Node, ...]
    leaves: tuple[ir.Value, ...]
    biases: dict[ir.Value, VectorSource]

    @property
    def operators(self) -> str:
        """The operator names, for messages."""
        names = sorted({node.op_type for node in self.nodes} - _NO_OPERATORS)
        return ", ".join(names) or "no operator"

    def evaluate(self, leaves: dict[ir.Value, np.ndarray]) -> np.ndarray:
        """The result for given leaf arrays, in float64."""
        known = dict(leaves)
        with np.errstate(all="ignore"):
            for node in reversed(self.nodes):
                function = _function(node)
                assert function is not None
                arguments = [known[value] if value in known else np.float64(_scalar(value)) for value in _operands(node)]
                known[node.outputs[0]] = np.asarray(function(*arguments))
        return known[self.result]


def _scalar(value: ir.Value) -> float:
    """A constant operand; in 16 bits, the constant of an activation that was rounded to it.

    PyTorch computes with the exact one in any type, and rounding to bfloat16 moves a result by more than `_TOLERANCE`.
    """
    found = constant_scalar(value) or 0.0
    if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        for exact in _CONSTANTS:
            if float(np.float32(exact).astype(value.dtype.numpy())) == abs(found):
                return math.copysign(exact, found)
    return found


def _operands(node: ir.Node) -> list[ir.Value]:
    count = 1 if node.op_type in _ONE_OPERAND else len(node.inputs)
    return [value for value in node.inputs[:count] if value is not None]


def expression(value: ir.Value) -> Elementwise:
    """The largest elementwise expression that ends in `value`. Adding a constant vector (a bias) ends it."""
    order: list[ir.Node] = []
    leaves: list[ir.Value] = []
    biases: dict[ir.Value, VectorSource] = {}
    seen: set[ir.Value] = set()
    begun = 0

    def visit(current: ir.Value) -> None:
        nonlocal begun
        if current in seen:
            return
        seen.add(current)
        node = current.producer()
        if node is None or begun >= MAX_NODES or not _inside(node):
            leaves.append(current)
            return
        begun += 1
        bias = _fused_bias(node)
        for operand in _operands(node):
            if bias is not None:
                seen.add(operand)
                leaves.append(operand)
                biases[operand] = bias
            elif constant_scalar(operand) is None:
                visit(operand)
        order.append(node)

    visit(value)
    return Elementwise(value, tuple(reversed(order)), tuple(leaves), biases)


def _fused_bias(node: ir.Node) -> VectorSource | None:
    """The bias that the activation node adds first, if its operand has no other user (who would see it without the bias)."""
    if node.op_type not in ("BiasGelu", "FastGelu") or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    return vector_source(node.inputs[1]) if len(node.inputs[0].uses()) == 1 else None


def _inside(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx", "com.microsoft") or _function(node) is None:
        return False
    if integer_product(node) is not None or (node.op_type == "DequantizeLinear" and not rounds_values(node)):
        return False
    operands = _operands(node)
    if node.op_type in ("FastGelu", "BiasGelu") and len(node.inputs) > 1 and node.inputs[1] is not None:
        return _fused_bias(node) is not None
    variables = [operand for operand in operands if constant_scalar(operand) is None]
    return bool(variables) and not any(vector_source(operand) is not None for operand in variables)


def recognise_plain(found: Elementwise) -> str | None:
    """The activation of one leaf, by name; None if the contract does not have it."""
    (leaf,) = found.leaves
    return _closest(found.evaluate({leaf: _GRID}), {name: function(_GRID) for name, function in CONTRACT.items()})


def recognise_gated(found: Elementwise) -> tuple[str, ir.Value, ir.Value] | None:
    """(activation, gate leaf, up leaf) of an expression act(gate) * up; None if it is none of the contract's."""
    first, second = found.leaves
    for gate, up in ((first, second), (second, first)):
        gates, ups = np.meshgrid(_GRID, np.array([-2.0, -0.5, 0.25, 1.0, 3.0]))
        result = found.evaluate({gate: gates, up: ups})
        name = _closest(result, {name: function(gates) * ups for name, function in CONTRACT.items()})
        if name is not None:
            return name, gate, up
    return None


def _closest(result: np.ndarray, candidates: dict[str, np.ndarray]) -> str | None:
    errors = {
        name: float(np.max(np.abs(result - wanted) / (1.0 + np.abs(wanted)))) if result.shape == wanted.shape else math.inf
        for name, wanted in candidates.items()
    }
    name = min(errors, key=lambda key: errors[key] if not math.isnan(errors[key]) else math.inf)
    return name if errors[name] < _TOLERANCE else None
