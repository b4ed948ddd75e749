"""Attention over a cache becomes `com.microsoft::GroupQueryAttention`, which may write into the cache in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.attention.mask import MaskError, clears_padding, window_of
from graph_passes.attention.match import (
    MICROSOFT,
    SWAP,
    Attention,
    Rotation,
    match_attention,
    packed,
    rotated,
    side_by_side,
    swapped_norm,
    unmerged,
)
from graph_passes.emit import Emitter, attribute_values, initializer
from graph_passes.matchers.common import last_dim, module_path
from graph_passes.naming import BATCH, PAST, SEQUENCE, TOTAL

GROUP_QUERY = "GroupQueryAttention"
TOKEN_AXIS = 2
"""Of keys and values [batch, heads, tokens, head size]."""
PREFIX = "attention"
HIDDEN = -1e30
"""Added to the score of padding. Finite: a row of padding sees nothing else, and must not become NaN."""
HEAD_STEP = 8
"""Head sizes are multiples of this (ONNX Runtime)."""


@dataclass(frozen=True)
class FusedAttention:
    """One attention: the input of its keys, its sliding window (None: it sees all), and what the node does itself."""

    past_key: str
    window: int | None
    rotates: bool
    is_packed: bool


@dataclass(frozen=True)
class KeptAttention:
    """An attention that stayed as it was, by its Softmax, and why."""

    name: str
    reason: str


@dataclass
class AttentionReport:
    """What became of each attention over a cache, in graph order."""

    fused: list[FusedAttention] = field(default_factory=list)
    kept: list[KeptAttention] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers."""
        return asdict(self)


class FuseAttention(ir.passes.InPlacePass):
    """Replace attention over a cache by one node: rotation of queries and keys, the cache's update, mask, softmax, products.

    Queries, keys and values may come from one product, which the node then reads whole. Padding is an addend of scores, made
    once from `attention_mask`; what stands at its place in results means nothing, before as after. Causal masks and sliding
    windows are the node's own: a mask is recognised by what it lets through. What reads sizes of a cache reads those of
    `attention_mask` then, so that a cache may have room for more tokens than it holds. An attention that is not recognised
    stays, with its reason in the report.

    Args:
        longest: the most tokens that the model takes, if it says so: how far a sliding window is looked for.

    Attributes:
        report: of the last run.
    """

    def __init__(self, longest: int | None = None) -> None:
        super().__init__()
        self.longest = longest
        self.report = AttentionReport()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Look at every Softmax of the main graph."""
        report = self.report = AttentionReport()
        graph = model.graph
        softmaxes = [node for node in graph if node.op_type == "Softmax" and not node.domain]
        matches = [(node, found) for node in softmaxes if (found := match_attention(node)) is not None]
        readers = Counter(found.present_key for _, found in matches if isinstance(found, Attention))
        writer = _Writer(graph, self.longest)
        for node, found in matches:
            reason = found if isinstance(found, str) else writer.refusal(found, readers[found.present_key])
            if isinstance(found, str) or reason is not None:
                report.kept.append(KeptAttention(module_path(node) or str(node.name), str(reason)))
            else:
                report.fused.append(writer.write(found))
        if report.fused:
            model.graph.opset_imports.setdefault(MICROSOFT, 1)
            RemoveUnusedNodesPass()(model)
            writer.read_sizes_elsewhere()
            RemoveUnusedNodesPass()(model)
            graph.sort()
        return ir.passes.PassResult(model, bool(report.fused))

    def ensures(self, model: ir.Model) -> None:
        """Keys and values that were fused are read by their node alone."""
        for fused in self.report.fused:
            past = next(value for value in model.graph.inputs if value.name == fused.past_key)
            if in_place_node(past) is None:
                raise ir.passes.PostconditionError(f"{fused.past_key!r} is read by more than its attention")


def in_place_node(past: ir.Value) -> ir.Node | None:
    """The GroupQueryAttention that is the only reader of a past key or value, and hands it on: it can be updated in place."""
    uses = list(past.uses())
    if len(uses) != 1 or past.is_graph_output():
        return None
    node, index = uses[0].node, uses[0].idx
    if (node.op_type, node.domain) != (GROUP_QUERY, MICROSOFT) or index not in (3, 4) or len(node.outputs) < 3:
        return None
    present = node.outputs[index - 2]
    return node if present.is_graph_output() and not present.uses() else None


class _Writer:
    def __init__(self, graph: ir.Graph, longest: int | None) -> None:
        self.graph, self.longest = graph, longest
        inputs = {str(value.name): value for value in graph.inputs}
        self.ids, self.mask = inputs.get("input_ids"), inputs.get("attention_mask")
        self.windows: dict[ir.Value, int | MaskError | None] = {}
        self.cleared: dict[ir.Value, bool] = {}
        self.tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        self.shared: dict[str, ir.Value] = {}
        self.pasts: list[ir.Value] = []

    def refusal(self, found: Attention, readers: int) -> str | None:
        """Why an attention can't be replaced, or None."""
        if self.ids is None or self.mask is None or self.mask.dtype != ir.DataType.INT64:
            return "the graph has no attention_mask of integers"
        if readers > 1:
            return "several layers read its keys"
        if found.size % HEAD_STEP:
            return f"its heads have {found.size} numbers; wanted a multiple of {HEAD_STEP}"
        if found.scale <= 0:
            return f"its scores are multiplied by {found.scale:g}"
        if found.bias not in self.windows:
            try:
                self.windows[found.bias] = window_of(self.graph, found.bias, self.longest)
            except MaskError as error:
                self.windows[found.bias] = error
        window = self.windows[found.bias]
        if isinstance(window, MaskError):
            return str(window)
        for condition in found.conditions:
            if condition not in self.cleared:
                self.cleared[condition] = clears_padding(self.graph, condition)
            if not self.cleared[condition]:
                return "numbers of other rows than padding are set to 0"
        width = last_dim(found.result)
        if width is None or width % found.size or (width // found.size) % found.kv_heads:
            return f"{width} numbers a row are no heads of {found.size} for each of {found.kv_heads} heads of keys"
        return None

    def write(self, found: Attention) -> FusedAttention:
        assert self.mask is not None and self.ids is not None
        window = self.windows[found.bias]
        assert not isinstance(window, MaskError)
        size, width = found.size, last_dim(found.result) or 0
        if not self.shared:
            self._share()
        name = f"{PREFIX}.{found.past_key.name}"
        emit = Emitter(name)
        heads = (found.query, found.new_key)
        # Rotated before their heads are put side by side, or after.
        rotation = self._rotation(*heads, size)
        if rotation is not None:
            heads = rotation[:2]
        widths = (width, found.kv_heads * size)
        query, key = (self._side_by_side(emit, value, size, wide) for value, wide in zip(heads, widths, strict=True))
        value = self._side_by_side(emit, found.new_value, size, widths[1])
        if rotation is None and (rotation := self._rotation(query, key, size)) is not None:
            query, key = rotation[:2]
        attributes: dict[str, Any] = {
            "num_heads": width // size,
            "kv_num_heads": found.kv_heads,
            "scale": float(np.float32(found.scale)),
            "local_window_size": -1 if window is None else window,
        }
        tables: list[ir.Value | None] = [None, None, None]
        if rotation is not None:
            how = rotation[2]
            tables = [*self._tables(emit, how), how.positions]
            attributes |= {"do_rotary": 1, "rotary_interleaved": how.interleaved}
        query, key = unmerged(query), unmerged(key)
        whole = packed((query, key, value))
        inputs = [whole, None, None] if whole is not None else [query, key, value]
        shared = self.shared
        nodes = emit.tape
        outputs = nodes.op_multi_out(
            GROUP_QUERY,
            [
                *inputs,
                found.past_key,
                found.past_value,
                shared["seqlens"],
                shared["total"],
                *tables,
                shared["bias"],
                *[None] * 5,  # head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
                shared["tokens"],
            ],
            attributes,
            num_outputs=3,
            domain=MICROSOFT,
            name=name,
        )
        output, present_key, present_value = outputs
        rows = found.result
        output.name, output.type = f"{name}.out", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([*self.ids.shape, width])  # type: ignore[misc]
        if rows.shape is not None and len(rows.shape) == 2:
            flat = initializer(self.graph, f"{PREFIX}.rows.{width}", np.array([-1, width], np.int64))
            output = emit.op("Reshape", output, flat)
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), rows.shape
        self.graph.insert_before(found.softmax, emit.tape.nodes)
        rows.replace_all_uses_with(output, replace_graph_outputs=True)
        for old, new in ((found.present_key, present_key), (found.present_value, present_value)):
            new.type, new.shape, kept = old.type, old.shape, old.name
            old.name = f"{kept}.appended"
            new.name = kept
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.pasts += [found.past_key, found.past_value]
        return FusedAttention(str(found.past_key.name), window, rotation is not None, whole is not None)

    def read_sizes_elsewhere(self) -> None:
        """Let nodes that read the size of a past key or value read it of the mask."""
        for past in self.pasts:
            for use in list(past.uses()):
                node = use.node
                if node.op_type != "Shape" or node.domain or past.shape is None:
                    continue
                start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(past.shape))
                dims = list(past.shape)[start:end]
                emit = Emitter(str(node.name))
                sizes = [self._dim(dim) for dim in dims]
                made = sizes[0] if len(sizes) == 1 else emit.op("Concat", *sizes, axis=0)
                made.type = ir.TensorType(ir.DataType.INT64)
                self.graph.insert_before(node, emit.tape.nodes)
                node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)

    def _dim(self, dim: int | ir.SymbolicDim) -> ir.Value:
        known = {BATCH: "batch", PAST: "past", SEQUENCE: "new", TOTAL: "all"}
        name = None if isinstance(dim, int) else str(dim.value)
        if name == PAST and "past" not in self.shared:
            # Nothing else reads it, so it is made when it is wanted; what nobody reads is gone by now.
            emit = Emitter(f"{PREFIX}.past")
            self.shared["past"] = emit.op("Sub", self.shared["all"], self.shared["new"])
            self.graph.insert_before(self.graph.node(0), emit.tape.nodes)
        if name in known:
            return self.shared[known[name]]
        number = dim if isinstance(dim, int) else int(str(dim.value))
        return self._constant(f"size.{number}", [number])

    def _rotation(self, query: ir.Value, key: ir.Value, size: int) -> tuple[ir.Value, ir.Value, Rotation] | None:
        """(queries, keys, how) before they were rotated, if both are in the same way."""
        first, second = rotated(query, size), rotated(key, size)
        return (first[0], second[0], first[1]) if first and second and first[1] == second[1] else None

    def _tables(self, emit: Emitter, how: Rotation) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines with a row for each token, which the node asks for; only `positions` are read."""
        if (how.cos, how.sin) not in self.tables:
            rows = emit.op("Shape", how.cos, start=0, end=1)
            missing = emit.op("Max", emit.op("Sub", self.shared["all"], rows), self._constant("zero", [0]))
            rest = emit.op("Shape", how.cos, start=1)
            zero = initializer(self.graph, f"{PREFIX}.zeros", np.zeros((), np.float32))
            zeros = emit.op("Expand", zero, emit.op("Concat", missing, rest, axis=0))
            cos, sin = (emit.op("Concat", table, zeros, axis=0) for table in (how.cos, how.sin))
            for table in (cos, sin):
                table.type, table.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, last_dim(how.cos)])
            self.tables[how.cos, how.sin] = cos, sin
        return self.tables[how.cos, how.sin]

    def _side_by_side(self, emit: Emitter, value: ir.Value, size: int, width: int) -> ir.Value:
        """Heads [batch, heads, tokens, size] as rows [batch, tokens, width]."""
        assert self.ids is not None
        if (found := side_by_side(value, size)) is not None:
            return found
        merge = self._constant(f"merge.{width}", [0, 0, width])
        if (norm := swapped_norm(value)) is not None:
            node, x = norm
            swapped = emit.op(node.op_type, x, *node.inputs[1:], **attribute_values(node))
        else:
            swapped = emit.op("Transpose", value, perm=SWAP)
        swapped.type = ir.TensorType(ir.DataType.FLOAT)
        merged = emit.op("Reshape", swapped, merge)
        merged.type, merged.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([*self.ids.shape, width])  # type: ignore[misc]
        return merged

    def _share(self) -> None:
        """What all layers read: sizes of the step, and what padding adds to scores."""
        assert self.mask is not None and self.ids is not None
        emit = Emitter(PREFIX)
        one = initializer(self.graph, f"{PREFIX}.one", np.array([1], np.int32))
        batch, total = (emit.op("Shape", self.mask, start=axis, end=axis + 1) for axis in (0, 1))
        new = emit.op("Shape", self.ids, start=1, end=2)
        length = emit.op("Cast", total, to=int(ir.DataType.INT32))
        padding = emit.op("Sub", emit.op("Cast", self.mask, to=int(ir.DataType.FLOAT)), self._number("shown", 1.0))
        addend = emit.op("Mul", padding, self._number("hidden", -HIDDEN))
        wide = emit.op("Unsqueeze", addend, self._constant("axes", [1, 2]))
        self.shared = {
            "batch": batch,
            "all": total,
            "new": new,
            "total": emit.op("Squeeze", length),
            "seqlens": emit.op("Expand", emit.op("Sub", length, one), batch),
            "tokens": emit.op("Expand", emit.op("Cast", new, to=int(ir.DataType.INT32)), batch),
            "bias": emit.op("Expand", wide, emit.op("Concat", batch, self._constant("size.1", [1]), new, total, axis=0)),
        }
        if self.graph.num_nodes():
            self.graph.insert_before(self.graph.node(0), emit.tape.nodes)

    def _constant(self, name: str, values: list[int]) -> ir.Value:
        return initializer(self.graph, f"{PREFIX}.{name}", np.array(values, np.int64))

    def _number(self, name: str, value: float) -> ir.Value:
        return initializer(self.graph, f"{PREFIX}.{name}", np.array(value, np.float32))
