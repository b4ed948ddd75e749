"""Rewrite feed-forward layers to `com.clada::SparseFFN` nodes that follow a load signal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graph_passes.dead_columns import DropDeadColumns
from graph_passes.emit import Emitter, attribute_values, initializer, result
from graph_passes.function_body import PLUGIN_ATTRIBUTES, VARIANT, make_function, variant_name
from graph_passes.layer_tensors import Arrays, LatestArrays
from graph_passes.matchers.common import FFNMatch, rank
from graph_passes.merge import MergeRows, MergeState, emit_merge, emit_merged, emit_rows, state_shapes
from graph_passes.op import (
    DOMAIN,
    OP_TYPE,
    OP_VERSION,
    ContractError,
    SparseFFNAttributes,
    input_names,
    output_names,
    weight_shapes,
)
from graph_passes.pass_list import PassList
from graph_passes.quant.ffn_repack import quantised_shapes, repack_quantised, source_bytes
from graph_passes.quant.quantiser import Quantiser
from graph_passes.repack import free_unused, held, packed_shapes, repack, sources, weight_key
from graph_passes.report import RewriteReport, RewrittenFFN
from graph_passes.rewrite_check import LOAD, FFNRewrite, check_rewrite, require_rewritable, settle
from graph_passes.router_nodes import write_router
from graph_passes.search import FFN_NAME, FFNMiss, FFNSearch, find_ffns

ACTIVE_NEURONS = "active_neurons"
MERGED_PARTS = ("in", "out")
"""The parts of a merged FFN's state: `past_merged.{i}.in` and `.out`; one tensor would be copied at each step to be split."""


def rewrite_ffns(
    model: ir.Model,
    rewrites: Mapping[str, FFNRewrite],
    *,
    emit_active: bool = True,
    weight_dtype: ir.DataType | None = None,
    quantiser: Quantiser | None = None,
) -> RewriteReport:
    """Find the FFNs named in `rewrites` and rewrite them, in place; see `RewriteFFNs` and `DropDeadColumns`.

    Raises:
        ContractError: a rewrite that the op does not allow for its layer. Sizes, thresholds and scores are checked before the
            graph is touched; what `make_constants` returns, when it is read.
        PreconditionError: the graph has no `input_ids`, or an opset below 18.
    """
    search = find_ffns(model, expected=list(rewrites))
    rewrite = RewriteFFNs(rewrites, search, emit_active=emit_active, weight_dtype=weight_dtype, quantiser=quantiser)
    PassList(rewrite, DropDeadColumns())(model)
    rewrite.report.nodes_after = model.graph.num_nodes()
    return rewrite.report


class RewriteFFNs(ir.passes.InPlacePass):
    """Replace matched FFNs by op nodes, add the graph input `load` and the output `active_neurons`, attach the function(s).

    Repacked weights and what is made of them are not in memory: each is made when it is read, a layer at a time.
    FFNs that `rewrites` does not name stay as they are. A search after it does not find the others again.

    Args:
        rewrites: by the module path of the down projection.
        search: of the FFNs of the same graph (`find_ffns`); its misses go into the report.
        emit_active: add the output `active_neurons`, int32 [batch, layers, sequence].
        weight_dtype: element type of the repacked weights; the graph's own when None. x and y keep the graph's, so a graph in
            16 bits takes no other.
        quantiser: says which matrices become codes, and makes them when they are written. A layer needs one form for all three,
            the score `exact`, and no chosen neurons or merged experts.
    """

    def __init__(
        self,
        rewrites: Mapping[str, FFNRewrite],
        search: FFNSearch,
        *,
        emit_active: bool = True,
        weight_dtype: ir.DataType | None = None,
        quantiser: Quantiser | None = None,
    ) -> None:
        super().__init__()
        self.rewrites = dict(rewrites)
        self.search = search
        self.emit_active = emit_active
        self.weight_dtype = weight_dtype
        self.quantiser = quantiser
        self.report = RewriteReport()

    def requires(self, model: ir.Model) -> None:
        """What `require_rewritable` says, and that the matches are those of this graph as it is now."""
        require_rewritable(model)
        gone = next((match for match in self.search.matches if _is_gone(match, model.graph)), None)
        if gone is not None:
            raise ir.passes.PreconditionError(f"FFN {gone.name!r} was found in another graph, or is not in this one any more")

    def ensures(self, model: ir.Model) -> None:
        """Every op node has its function, its inputs in number, and typed, shaped outputs."""
        for node in model.graph:
            if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
                continue
            if (DOMAIN, OP_TYPE, node.overload) not in model.functions:
                raise ir.passes.PostconditionError(f"node {node.name!r} has no function")
            if len(node.inputs) != len(input_names(SparseFFNAttributes.from_onnx(attribute_values(node)))):
                raise ir.passes.PostconditionError(f"node {node.name!r} has {len(node.inputs)} inputs")
            if any(output.shape is None or output.type is None for output in node.outputs):
                raise ir.passes.PostconditionError(f"an output of node {node.name!r} has no shape")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, search = model.graph, self.search
        report = self.report = RewriteReport(misses=search.misses, nodes_before=graph.num_nodes())
        chosen = [match for match in search.matches if match.name in self.rewrites]
        for match in chosen:
            check_rewrite(match, self.rewrites[match.name], self.weight_dtype, self.emit_active, self.quantiser)
        if chosen:
            writer = _Writer(model, self.weight_dtype, self.quantiser)
            for match in chosen:
                report.ffns.append(writer.rewrite(match, self.rewrites[match.name], self.emit_active))
            writer.finish()
        report.nodes_after = graph.num_nodes()
        return ir.passes.PassResult(model, bool(chosen))


class _Writer:
    """Rewrites the layers of one model, and keeps what they share."""

    def __init__(self, model: ir.Model, weight_dtype: ir.DataType | None, quantiser: Quantiser | None) -> None:
        self.model = model
        self.graph = model.graph
        self.weight_dtype = weight_dtype
        self.quantiser = quantiser
        self.load = self._load_input()
        self.counts: list[ir.Value] = []
        self.shared: dict[Hashable, tuple[str, dict[str, ir.Value]]] = {}
        self.arrays = LatestArrays()
        self.rows: ir.Value | None = None
        self.stats = self.merges = 0
        self.merge_rows: MergeRows | None = None
        self.names = {node.name for node in self.graph}
        self.replaced: dict[ir.Value, ir.Value] = {}

    def rewrite(self, match: FFNMatch, wanted: FFNRewrite, emit_active: bool) -> RewrittenFFN:
        graph, nodes_before = self.graph, self.graph.num_nodes()
        attributes = settle(match, wanted.attributes, emit_active, self.quantiser)
        node_name = self._node_name(match.name)
        width = wanted.width(match.intermediate_size)
        before = source_bytes(match)
        owner, weights = self._weights(match, node_name, wanted.neurons, attributes)
        constants = self._constants(attributes, wanted, match, weights, node_name)
        anchor = match.y.producer()
        assert anchor is not None
        tape = ir.tape.Tape()
        x = self._three_axes(match, tape)
        by_name = {"x": x, LOAD: self.load, **weights, **constants}
        if attributes.use_stat:
            by_name["past_stat"] = self._stat_value(f"past_stat.{self.stats}", width)
            graph.inputs.append(by_name["past_stat"])
        merging: _Merging | None = None
        if wanted.merge is not None:
            merging = self._merging(attributes, width, match.hidden_size, wanted.merge, tape)
            by_name[LOAD] = merging.rows.op_load
        elif wanted.router is not None:
            routing = f"{node_name}.router"
            emitter = Emitter(routing, tape)
            by_name["score"] = write_router(wanted.router, x, self.load, routing, self._initializer, emitter)
        names = output_names(attributes)
        made = tape.op_multi_out(
            OP_TYPE,
            [by_name[name] for name in input_names(attributes)],
            {**attributes.to_onnx(), **PLUGIN_ATTRIBUTES},
            outputs=[ir.val(f"{node_name}.{name}") for name in names],
            domain=DOMAIN,
            overload=self._function(attributes, weights["w_in"].dtype or match.dtype, match.dtype),
            name=node_name,
            doc_string=f"{match.kind} feed-forward layer {match.name}: {match.hidden_size} x {match.intermediate_size}",
            metadata_props=self._metadata(match),
        )
        outputs = dict(zip(names, made, strict=True))
        if merging is not None:
            _describe(outputs["y"], match.dtype, ir.Shape([*self._axes(), match.hidden_size]))
            if emit_active:
                _describe(outputs["active"], ir.DataType.INT32, self.load.shape)
            self._merge(merging, x, outputs, weights, attributes, wanted, match, node_name, tape)
        self._replace_y(match, x, outputs["y"], tape)
        if emit_active:
            _describe(outputs["active"], ir.DataType.INT32, self.load.shape)
            self.counts.append(outputs["active"])
        if attributes.emit_stat:
            stat = outputs["stat"]
            stat.name = f"present_stat.{self.stats}"
            _describe(stat, ir.DataType.FLOAT, ir.Shape([self._axes()[0], width]))
            graph.outputs.append(stat)
        self.stats += attributes.use_stat or attributes.emit_stat
        graph.insert_before(anchor, tape.nodes)
        self._remove(match)
        return RewrittenFFN(
            name=match.name,
            node=node_name,
            kind=match.kind,
            hidden_size=match.hidden_size,
            intermediate_size=match.intermediate_size,
            nodes_before=len(match.nodes),
            nodes_after=len(match.nodes) + graph.num_nodes() - nodes_before,
            weight_bytes=0 if owner else _bytes(weights.values()),
            constant_bytes=_bytes(constants.values()),
            bytes_before=before,
            shares_weights_with=owner,
        )

    def _merging(
        self, attributes: SparseFFNAttributes, width: int, hidden_size: int, experts: int, tape: ir.tape.Tape
    ) -> _Merging:
        """The state of a layer whose experts are merged, as graph inputs, and the rows that run what."""
        index, self.merges = self.merges, self.merges + 1
        shapes = state_shapes(attributes, width, hidden_size, experts)
        batch = self._axes()[0]
        past = [
            ir.val(f"past_merged.{index}.{part}", ir.DataType.FLOAT, ir.Shape([batch, *shape]))
            for part, shape in zip(MERGED_PARTS, shapes, strict=True)
        ]
        self.graph.inputs.extend(past)
        state = MergeState(*past)
        if self.merge_rows is None:
            self.merge_rows = emit_rows(self.load, state, self._initializer, tape)
        return _Merging(index, self.merge_rows, state, shapes)

    def _merge(
        self,
        merging: _Merging,
        x: ir.Value,
        outputs: dict[str, ir.Value],
        weights: dict[str, ir.Value],
        attributes: SparseFFNAttributes,
        wanted: FFNRewrite,
        match: FFNMatch,
        name: str,
        tape: ir.tape.Tape,
    ) -> None:
        """Write the nodes after the op; `outputs` then holds what takes the place of the op's."""
        assert wanted.router is not None
        outputs["y"], count = emit_merged(
            x,
            outputs["y"],
            outputs.get("active"),
            merging.rows,
            merging.past,
            weights.get("down_bias"),
            attributes,
            match.dtype,
            merging.shapes[1][0],
            f"{name}.merged",
            self._initializer,
            tape,
        )
        if count is not None:
            outputs["active"] = count
        state = emit_merge(
            x,
            merging.rows,
            merging.past,
            wanted.router,
            weights,
            attributes,
            merging.shapes,
            f"{name}.merge",
            self._initializer,
            tape,
        )
        for part, value, shape in zip(MERGED_PARTS, (state.w_in, state.w_out), merging.shapes, strict=True):
            # Not the batch: it is 0 where no row was a segment.
            sequences = ir.SymbolicDim("merged_sequences")
            value.name = f"present_merged.{merging.index}.{part}"
            _describe(value, ir.DataType.FLOAT, ir.Shape([sequences, *shape]))
            self.graph.outputs.append(value)

    def finish(self) -> None:
        """Add what the layers need together: the counts' output and the opset import."""
        if self.counts:
            axes, layers, tape = self._axes(), len(self.counts), ir.tape.Tape(self.graph)
            flat = result("active_neurons.flat", ir.DataType.INT32, ir.Shape([axes[0], None]))
            together = tape.op("Concat", self.counts, {"axis": -1}, name="active_neurons.concat", output=flat)
            target = self._initializer("active_neurons.shape", np.array([0, layers, -1], dtype=np.int64))
            counts = result(ACTIVE_NEURONS, ir.DataType.INT32, ir.Shape([axes[0], layers, axes[1]]))
            shaped = tape.op("Reshape", [together, target], name="active_neurons.reshape", output=counts)
            self.graph.outputs.append(shaped)
        self.graph.opset_imports[DOMAIN] = OP_VERSION
        # Overloads and metadata of functions and nodes.
        self.model.ir_version = max(self.model.ir_version, 10)

    # Inputs

    def _axes(self) -> list[int | ir.SymbolicDim]:
        """batch and sequence, as `input_ids` has them."""
        shape = next(value.shape for value in self.graph.inputs if value.name == "input_ids")
        assert shape is not None
        return list(shape)

    def _load_input(self) -> ir.Value:
        found = next((value for value in self.graph.inputs if value.name == LOAD), None)
        if found is None:
            found = ir.val(LOAD, ir.DataType.FLOAT, ir.Shape(self._axes()))
            found.doc_string = "Load of each token in standard deviations; +inf: every neuron, -inf: padding."
            self.graph.inputs.append(found)
        return found

    def _stat_value(self, name: str, width: int) -> ir.Value:
        return ir.val(name, ir.DataType.FLOAT, ir.Shape([self._axes()[0], width]))

    def _three_axes(self, match: FFNMatch, tape: ir.tape.Tape) -> ir.Value:
        """x as [batch, sequence, d]; a Reshape is added if the graph has it in another form."""
        # One layer's result may be the next one's x.
        source = self.replaced.get(match.x, match.x)
        if rank(source) == 3:
            return source
        if self.rows is None:
            rows = result("load.rows", ir.DataType.INT64, ir.Shape([2]))
            self.rows = tape.op("Shape", [self.load], name="load.rows", output=rows)
        width = self._initializer(f"hidden_size.{match.hidden_size}", np.array([match.hidden_size], dtype=np.int64))
        shape = result(f"{match.x.name}.shape_3d", ir.DataType.INT64, ir.Shape([3]))
        target = tape.op("Concat", [self.rows, width], {"axis": 0}, output=shape)
        x = result(f"{match.x.name}.3d", match.dtype, ir.Shape([*self._axes(), match.hidden_size]))
        return tape.op("Reshape", [source, target], output=x)

    # Constants

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        return initializer(self.graph, name, array)

    def _lazy(self, tensor: ir.LazyTensor) -> ir.Value:
        """As `_initializer`, of what is not made yet."""
        name = str(tensor.name)
        if name in self.graph.initializers:
            return self._initializer(name, tensor.numpy())
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _weights(
        self, match: FFNMatch, prefix: str, neurons: np.ndarray | None, attributes: SparseFFNAttributes
    ) -> tuple[str | None, dict[str, ir.Value]]:
        """(the node whose weights are shared or None, the weights by input name)."""
        key = (weight_key(match), None if neurons is None else neurons.tobytes())
        if key in self.shared:
            return self.shared[key]
        make: Callable[[], Arrays] = partial(repack, held(match), self.weight_dtype, neurons)
        target = self.weight_dtype or match.dtype
        shapes = packed_shapes(match, match.intermediate_size if neurons is None else len(neurons))
        if attributes.weight_format != "plain":
            assert self.quantiser is not None
            make, target = partial(repack_quantised, held(match), self.quantiser), ir.DataType.UINT8
            shapes = quantised_shapes(match, attributes)
        weights = {}
        for name, shape in shapes.items():
            dtype = ir.DataType.FLOAT if name.endswith("_bias") else target
            tensor = self.arrays.tensor(prefix, "weights", name, shape, dtype, make)
            weights[name] = self._lazy(tensor)
        self.shared[key] = (prefix, weights)
        return None, weights

    def _constants(
        self,
        attributes: SparseFFNAttributes,
        wanted: FFNRewrite,
        match: FFNMatch,
        weights: Mapping[str, ir.Value],
        prefix: str,
    ) -> dict[str, ir.Value]:
        constants = {"threshold": self._initializer(f"{prefix}.threshold", wanted.threshold.astype(np.float32))}
        types = {"neuron_scale": np.float32, "shadow": np.int8, "shadow_scale": np.float16}
        needed = [name for name in input_names(attributes) if name in types]
        if not needed:
            return constants
        shapes = weight_shapes(attributes, match.hidden_size, wanted.width(match.intermediate_size))
        numbers = held(match) if attributes.weight_format != "plain" else None  # codes are not what scores are made of

        def make() -> Arrays:
            read = weights if numbers is None else repack(numbers, ir.DataType.FLOAT)
            made = wanted.make_constants(_float32(read["w_in"]), _float32(read["w_out"]))
            for name in needed:
                if name not in made or made[name].shape != shapes[name] or made[name].dtype != types[name]:
                    found = f"{made[name].dtype} {list(made[name].shape)}" if name in made else "nothing"
                    raise ContractError(f"{prefix}: {name!r} is {found}; wanted {np.dtype(types[name])} {list(shapes[name])}")
            return made

        for name in needed:
            dtype = ir.DataType.from_numpy(np.dtype(types[name]))
            tensor = self.arrays.tensor(prefix, "constants", name, tuple(shapes[name]), dtype, make)
            constants[name] = self._lazy(tensor)
        return constants

    # Nodes

    def _node_name(self, name: str) -> str:
        """The path of the FFN's module; where the down projection is a part of the decoder layer, its own path."""
        prefix, _, _ = name.rpartition(".")
        base = name if not prefix or prefix.rpartition(".")[2].isdigit() else prefix
        unique, count = base, 1
        while unique in self.names:
            count += 1
            unique = f"{base}.{count}"
        self.names.add(unique)
        return unique

    def _metadata(self, match: FFNMatch) -> dict[str, str]:
        last = match.nodes[-1]
        kept = {key: last.metadata_props[key] for key in ("namespace",) if key in last.metadata_props}
        replaced = ", ".join(f"{node.op_type} {node.name}" for node in match.nodes)
        return {**kept, FFN_NAME: match.name, "clada.op_version": str(OP_VERSION), "clada.replaced_nodes": replaced}

    def _function(self, attributes: SparseFFNAttributes, weight_type: ir.DataType, x_type: ir.DataType) -> str:
        """Attach the function the node needs, once; its overload name, which is empty for the model's first variant."""
        variant = variant_name(attributes, weight_type, x_type)
        functions = self.model.functions
        for function in functions.values():
            if (function.domain, function.name) == (DOMAIN, OP_TYPE) and function.metadata_props.get(VARIANT) == variant:
                return function.overload
        overload = variant if (DOMAIN, OP_TYPE, "") in functions else ""
        opset = self.graph.opset_imports[""]
        function = make_function(attributes, weight_type=weight_type, x_type=x_type, overload=overload, opset=opset)
        functions[function.identifier()] = function
        return overload

    def _replace_y(self, match: FFNMatch, x: ir.Value, y: ir.Value, tape: ir.tape.Tape) -> None:
        """Put y in the place of the layer's old result, with a Reshape if that has no three axes."""
        _describe(y, match.dtype, ir.Shape([*self._axes(), match.hidden_size]))
        new = y
        if (rank(match.y) or rank(match.x)) != 3:
            flat = self._initializer(f"flat_rows.{match.hidden_size}", np.array([-1, match.hidden_size], dtype=np.int64))
            new = tape.op("Reshape", [y, flat], output=result(f"{y.name}.2d", match.dtype, match.y.shape))
        elif x.shape is not None:
            y.shape = x.shape.copy()
        self.replaced[match.y] = new
        old_name = match.y.name
        match.y.replace_all_uses_with(new, replace_graph_outputs=True)
        if new.is_graph_output():
            new.name, match.y.name = old_name, f"{old_name}.replaced"

    def _remove(self, match: FFNMatch) -> None:
        """Remove the layer's nodes, the nodes that only fed them, and initializers that are not used any more."""
        freed = {source.value for source in sources(match)}
        pending = list(match.nodes)
        while pending:
            node = pending.pop()
            if node.graph is not self.graph or any(output.uses() or output.is_graph_output() for output in node.outputs):
                continue
            operands = {value for value in node.inputs if value is not None}
            self.graph.remove(node, safe=True)
            freed |= {value for value in operands if value.producer() is None}
            pending += [producer for value in operands if (producer := value.producer()) is not None]
        # Nodes are removed consumers first; what is left over was still in use when it was looked at.
        leftover = [node for node in match.nodes if node.graph is self.graph]
        if leftover:
            raise RuntimeError(f"nodes of {match.name!r} are still in use: {[node.name for node in leftover]}")
        free_unused(self.graph, iter(freed))


@dataclass(frozen=True)
class _Merging:
    """Of a layer whose experts are merged: its number among such, the rows, the state before the run, and its shapes."""

    index: int
    rows: MergeRows
    past: MergeState
    shapes: tuple[list[int], list[int]]


def _is_gone(match: FFNMatch, graph: ir.Graph) -> bool:
    producer = match.y.producer()
    return producer is None or producer.graph is not graph


def _describe(value: ir.Value, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.type = ir.TensorType(dtype)
    value.shape = None if shape is None else shape.copy()


def _float32(value: ir.Value | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32, copy=False)


def _bytes(values: Iterable[ir.Value]) -> int:
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


__all__ = ["ACTIVE_NEURONS", "LOAD", "FFNMiss", "FFNRewrite", "RewriteFFNs", "rewrite_ffns", "settle"]
