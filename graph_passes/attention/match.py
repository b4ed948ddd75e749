"""Recognise attention over a cache in standard operators, by its structure:

softmax(scale * Q K^T + mask) V,    K and V = Concat(past, new) of the graph's interface, repeated over the heads
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.matchers.common import fixed_size, last_dim
from graph_passes.matchers.weights import constant_array, constant_integers, constant_scalar

ROTARY = "RotaryEmbedding"
MICROSOFT = "com.microsoft"
SWAP = (0, 2, 1, 3)
_KEEPS = ("Reshape", "Expand", "Unsqueeze", "Identity")
"""Between a cache and its product: keys and values repeated over the heads."""
_KEY_ORDERS = ((0, 1, 3, 2), (0, 2, 1))
MOST_STEPS = 24


@dataclass(frozen=True)
class Attention:
    """One attention. `query` [batch, heads, tokens, size] comes unscaled; `new_key` and `new_value` are
    [batch, kv_heads, tokens, size]; `result` [batch, tokens, heads size] is what its output projection reads."""

    softmax: ir.Node
    query: ir.Value
    past_key: ir.Value
    new_key: ir.Value
    present_key: ir.Value
    past_value: ir.Value
    new_value: ir.Value
    present_value: ir.Value
    scale: float
    bias: ir.Value
    kv_heads: int
    size: int
    result: ir.Value
    conditions: tuple[ir.Value, ...] = ()


@dataclass(frozen=True)
class _Cached:
    past: ir.Value
    new: ir.Value
    present: ir.Value
    factor: float = 1.0


def match_attention(softmax: ir.Node) -> Attention | str | None:
    """Read the attention around a Softmax, or say why it is another one; None where it has no cache at all."""
    scores = _read_scores(softmax.inputs[0])
    values = _only_user(softmax.outputs[0], "MatMul")
    if isinstance(scores, str) or values is None or values.inputs[0] is not softmax.outputs[0]:
        return scores if isinstance(scores, str) and _near_cache(softmax) else None
    product, bias, scale = scores
    query, factor = _unscaled(product.inputs[0])
    key, value = _cached(product.inputs[1]), _cached(values.inputs[1])
    if key is None or value is None:
        return None
    if value.factor != 1.0:
        return "its values are multiplied by a number"
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return "its softmax is not over the last axis"
    if bias is None:
        return "it has no mask"
    if query is None or query.dtype not in (ir.DataType.FLOAT, None) or key.past.dtype != ir.DataType.FLOAT:
        return "it does not compute in float32"
    if key.past.shape is None or len(key.past.shape) != 4 or value.past.shape is None or len(value.past.shape) != 4:
        return "its cache has no four axes"
    heads, size = fixed_size(key.past.shape[1]), fixed_size(key.past.shape[3])
    if heads is None or size is None or [fixed_size(value.past.shape[axis]) for axis in (1, 3)] != [heads, size]:
        return "its keys and values have other sizes"
    merged = _merged(values.outputs[0], size)
    if isinstance(merged, str):
        return merged
    result, conditions = merged
    return Attention(
        softmax,
        query,
        key.past,
        key.new,
        key.present,
        value.past,
        value.new,
        value.present,
        scale * factor * key.factor,
        bias,
        heads,
        size,
        result,
        conditions,
    )


def _near_cache(softmax: ir.Node) -> bool:
    values = _only_user(softmax.outputs[0], "MatMul")
    return values is not None and _cached(values.inputs[1]) is not None


def _read_scores(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None, float] | str:
    """(Q K^T, what is added, the factor) of scores."""
    bias: ir.Value | None = None
    scale = 1.0
    for _ in range(MOST_STEPS):
        node = value.producer() if value is not None else None
        if node is None or node.domain:
            return "its scores are not a product of queries and keys"
        if node.op_type == "MatMul":
            return node, bias, scale
        if node.op_type == "Add" and bias is None:
            sides = [index for index in (0, 1) if _leads_to_product(node.inputs[index])]
            if len(sides) != 1:
                return "its scores are a sum of something else than a product and a mask"
            value, bias = node.inputs[sides[0]], node.inputs[1 - sides[0]]
            continue
        found = _factor(node)
        if found is None:
            return f"its scores go through {node.op_type} {node.name!r}"
        if bias is not None:
            value, scale = found[0], scale * found[1]
        else:
            return "its mask is multiplied by a number"
    return "its scores go through too many nodes"


def _leads_to_product(value: ir.Value | None) -> bool:
    for _ in range(MOST_STEPS):
        node = value.producer() if value is not None else None
        if node is None or node.domain:
            return False
        if node.op_type == "MatMul":
            return True
        found = _factor(node)
        if found is None:
            return False
        value = found[0]
    return False


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) of a node that multiplies x by a constant number c."""
    if node.domain or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    for index in (0, 1) if node.op_type == "Mul" else (1,):
        number, x = constant_scalar(node.inputs[index]), node.inputs[1 - index]
        if number is not None and x is not None and constant_scalar(x) is None:
            return x, number if node.op_type == "Mul" else 1.0 / number
    return None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    factor = 1.0
    for _ in range(MOST_STEPS):
        node = value.producer() if value is not None else None
        found = _factor(node) if node is not None else None
        if found is None:
            break
        value, factor = found[0], factor * found[1]
    return value, factor


def _cached(value: ir.Value | None) -> _Cached | None:
    """The cache that a product reads: past and new ones put together, and repeated over the heads."""
    factor = 1.0
    for _ in range(MOST_STEPS):
        node = value.producer() if value is not None else None
        if node is None or node.domain or value is None:
            return None
        if (found := _factor(node)) is not None:
            value, factor = found[0], factor * found[1]
        elif node.op_type == "Concat":
            return _appended(node, factor)
        elif node.op_type == "Transpose":
            if tuple(node.attributes.get_ints("perm", ())) not in _KEY_ORDERS:
                return None
            value = node.inputs[0]
        elif node.op_type in _KEEPS:
            # Repeated head by head: the new axis stands behind that of the heads.
            axes = constant_integers(node.inputs[1]) if node.op_type == "Unsqueeze" and len(node.inputs) > 1 else None
            if node.op_type == "Unsqueeze" and (axes is None or axes.reshape(-1).tolist() != [2]):
                return None
            value = node.inputs[0]
        else:
            return None
    return None


def _appended(concat: ir.Node, factor: float) -> _Cached | None:
    past, *new = concat.inputs
    if len(new) != 1 or past is None or new[0] is None or concat.attributes.get_int("axis", 0) not in (2, -2):
        return None
    present = concat.outputs[0]
    return _Cached(past, new[0], present, factor) if past.is_graph_input() and present.is_graph_output() else None


def _merged(value: ir.Value, size: int) -> tuple[ir.Value, tuple[ir.Value, ...]] | str:
    """The heads put side by side, [batch, tokens, heads size], and the conditions under which numbers were set to 0."""
    conditions: list[ir.Value] = []
    best: tuple[ir.Value, tuple[ir.Value, ...]] | None = None
    swapped = False
    for _ in range(MOST_STEPS):
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        node = uses[0].node
        if node.op_type == "Where" and not node.domain and uses[0].idx == 2 and constant_scalar(node.inputs[1]) == 0:
            assert node.inputs[0] is not None
            conditions.append(node.inputs[0])
        elif node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == SWAP and not swapped:
            swapped = True
        elif node.op_type not in ("Reshape", "Identity"):
            break
        value = node.outputs[0]
        if swapped and _is_rows(value, size):
            best = value, tuple(conditions)
    if best is None or len(best[1]) != len(conditions):
        return "its heads are not put side by side"
    return best


def _is_rows(value: ir.Value, size: int) -> bool:
    width = last_dim(value)
    return width is not None and width >= size and width % size == 0 and value.shape is not None and len(value.shape) in (2, 3)


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type or uses[0].node.domain:
        return None
    return uses[0].node


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are rotated: by the tables' rows at `positions` [batch, tokens]."""

    positions: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int


def rotated(value: ir.Value, size: int) -> tuple[ir.Value, Rotation] | None:
    """(x, how) of a RotaryEmbedding of whole heads on x, [batch, tokens, heads size] or [batch, heads, tokens, size]."""
    node = value.producer()
    if node is None or (node.op_type, node.domain) != (ROTARY, MICROSOFT) or len(node.inputs) != 4:
        return None
    x, positions, cos, sin = node.inputs
    attributes = node.attributes
    whole = last_dim(cos) is not None and 2 * (last_dim(cos) or 0) == size and size % 16 == 0
    plain = not attributes.get_int("rotary_embedding_dim", 0) and not attributes.get_int("is_packed_batching", 0)
    if x is None or positions is None or cos is None or sin is None or not whole or not plain:
        return None
    if attributes.get_float("scale", 1.0) != 1.0 or x.shape is None or len(x.shape) not in (3, 4):
        return None
    if positions.shape is None or len(positions.shape) != 2:
        return None
    return x, Rotation(positions, cos, sin, attributes.get_int("interleaved", 0))


def swapped_norm(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """(norm, x) of a norm over the numbers of a head, of x [batch, tokens, heads, size] with tokens and heads swapped."""
    norm = value.producer()
    if norm is None or norm.op_type not in ("SimplifiedLayerNormalization", "LayerNormalization") or norm.domain:
        return None
    swap = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if swap is None or swap.op_type != "Transpose" or tuple(swap.attributes.get_ints("perm", ())) != SWAP:
        return None
    x = swap.inputs[0]
    if norm.attributes.get_int("axis", -1) not in (-1, 3) or x is None or x.shape is None or len(norm.outputs) != 1:
        return None
    return (norm, x) if all(item is not None and item.const_value is not None for item in norm.inputs[1:]) else None


def unmerged(value: ir.Value) -> ir.Value:
    """x [batch, tokens, heads size], if the value is x split into heads and merged again."""
    outer = value.producer()
    inner = (
        outer.inputs[0].producer() if outer is not None and outer.op_type == "Reshape" and outer.inputs[0] is not None else None
    )
    if inner is None or inner.op_type != "Reshape" or inner.inputs[0] is None:
        return value
    x = inner.inputs[0]
    same = x.shape is not None and value.shape is not None and len(x.shape) == len(value.shape) == 3
    return x if same and last_dim(x) is not None and last_dim(x) == last_dim(value) else value


def side_by_side(value: ir.Value, size: int) -> ir.Value | None:
    """x [batch, tokens, heads size], if the value is its heads [batch, heads, tokens, size]."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != SWAP:
        return None
    split = node.inputs[0].producer() if node.inputs[0] is not None else None
    x = split.inputs[0] if split is not None and split.op_type == "Reshape" and not split.domain else None
    if x is None or split is None or x.shape is None or len(x.shape) != 3:
        return None
    shape = constant_array(split.inputs[1])
    wide = split.outputs[0].shape
    known = fixed_size(wide[3]) if wide is not None and len(wide) == 4 else None
    if shape is not None and len(shape) == 4 and int(shape[3]) > 0:
        known = int(shape[3])
    return x if known == size and (last_dim(x) or 0) % size == 0 else None


def packed(parts: tuple[ir.Value, ir.Value, ir.Value]) -> ir.Value | None:
    """What queries, keys and values are the three parts of, in this order."""
    node = parts[0].producer()
    if node is None or node.op_type != "Split" or node.domain or len(node.outputs) != 3:
        return None
    axis = node.attributes.get_int("axis", 0)
    return node.inputs[0] if axis in (-1, 2) and all(a is b for a, b in zip(parts, node.outputs, strict=True)) else None
