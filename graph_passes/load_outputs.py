"""Let the graph return what the load signal needs of its logits, so that a runtime need not read all of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.emit import initializer, result
from graph_passes.naming import BATCH

LOGITS = "logits"
LOG_SUM_EXP, ENTROPY = "log_sum_exp", "entropy"
LOAD_OUTPUTS = (LOG_SUM_EXP, ENTROPY)

LEAST_OPSET = 18
"""From here on the axes of a reduction are an input."""


class AddLoadOutputs(ir.passes.InPlacePass):
    """Add the outputs `log_sum_exp` and `entropy`, float32 [batch_size], of the logits at the last position.

    With z the logits [V] (temperature 1) and x a token taken from them, in nats:

        log_sum_exp = m + log T          surprisal of x = log_sum_exp - z[x]
        entropy     = log T - (sum_v e_v (z_v - m)) / T

    where m = max z, e = exp(z - m) and T = sum e, in float32 whatever the logits are: H = LSE(z) - sum softmax(z) z, shifted by
    m. Every T is at least 1, so the entropy is never negative. A row with a logit that is NaN or infinite has NaN for an
    entropy. A second run changes nothing.
    """

    def requires(self, model: ir.Model) -> None:
        """The graph returns `logits` with three axes, and its opset has reductions with axes as an input."""
        logits = _logits(model.graph)
        if logits is None or logits.shape is None or len(logits.shape) != 3:
            raise ir.passes.PreconditionError(f"the graph has no output {LOGITS!r} with three axes")
        opset = model.graph.opset_imports.get("", 0)
        if opset < LEAST_OPSET:
            raise ir.passes.PreconditionError(f"the graph has opset {opset}; at least {LEAST_OPSET} is needed")

    def ensures(self, model: ir.Model) -> None:
        """Both outputs are there, float32 with one axis."""
        found = {value.name: value for value in model.graph.outputs}
        for name in LOAD_OUTPUTS:
            value = found.get(name)
            if value is None or value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 1:
                raise ir.passes.PostconditionError(f"the graph has no output {name!r}, float32 with one axis")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the nodes after all others."""
        graph = model.graph
        if any(value.name in LOAD_OUTPUTS for value in graph.outputs):
            return ir.passes.PassResult(model, False)
        logits = _logits(graph)
        assert logits is not None and logits.shape is not None
        _Builder(graph, logits).build()
        return ir.passes.PassResult(model, True)


class _Builder:
    def __init__(self, graph: ir.Graph, logits: ir.Value) -> None:
        assert logits.shape is not None
        self._graph, self._logits = graph, logits
        self._tape = ir.tape.Tape(graph)
        batch, _, width = logits.shape
        self._wide, self._one = ir.Shape([batch, 1, width]), ir.Shape([batch, 1, 1])
        self._rows = ir.Shape([batch if isinstance(batch, int) or batch.value else ir.SymbolicDim(BATCH)])

    def build(self) -> None:
        # A slice that ends beyond any length: TensorRT has no gather with a negative index.
        start, end, position = (
            self._constant(name, [value]) for name, value in (("last", -1), ("end", 2**31 - 1), ("axis", 1))
        )
        vocabulary, both = self._constant("vocabulary", [2]), self._constant("squeeze", [1, 2])
        z = self._node("Slice", [self._logits, start, end, position], "slice", self._wide, self._logits.dtype)
        if self._logits.dtype != ir.DataType.FLOAT:
            z = self._node("Cast", [z], "wide", self._wide, to=int(ir.DataType.FLOAT))
        largest = self._node("ReduceMax", [z, vocabulary], "max", self._one, keepdims=1)
        shifted = self._node("Sub", [z, largest], "shifted", self._wide)
        weights = self._node("Exp", [shifted], "exp", self._wide)
        total = self._node("ReduceSum", [weights, vocabulary], "sum", self._one, keepdims=1)
        log_total = self._node("Log", [total], "log", self._one)
        product = self._node("Mul", [weights, shifted], "product", self._wide)
        moment = self._node("ReduceSum", [product, vocabulary], "moment", self._one, keepdims=1)
        mean = self._node("Div", [moment, total], "mean", self._one)
        sums = {
            LOG_SUM_EXP: self._node("Add", [largest, log_total], "log_sum_exp", self._one),
            ENTROPY: self._node("Sub", [log_total, mean], "entropy", self._one),
        }
        for name, value in sums.items():
            output = self._node("Squeeze", [value, both], f"{name}.squeeze", self._rows)
            output.name = name
            self._graph.outputs.append(output)

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        shape: ir.Shape,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Value:
        made = result(f"load_outputs.{name}.out", dtype, shape)
        return self._tape.op(op, inputs, attributes, name=f"load_outputs.{name}", output=made)

    def _constant(self, name: str, values: list[int]) -> ir.Value:
        return initializer(self._graph, f"load_outputs.{name}.index", np.array(values, np.int64))


def _logits(graph: ir.Graph) -> ir.Value | None:
    return next((value for value in graph.outputs if value.name == LOGITS), None)
