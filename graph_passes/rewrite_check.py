"""What is asked of one layer, and whether the op allows it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graph_passes.function_body import MIN_OPSET, check_types
from graph_passes.matchers.common import FFNMatch
from graph_passes.op import OP_TYPE, ContractError, SparseFFNAttributes, weight_shapes
from graph_passes.quant.ffn_repack import weight_format
from graph_passes.quant.quantiser import Quantiser
from graph_passes.router import Router
from graph_passes.search import rewritten_ffns

LOAD = "load"

MakeConstants = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class FFNRewrite:
    """How one layer becomes sparse.

    Attributes:
        attributes: `activation`, `gated`, `has_bias`, `emit_active` and `weight_format` are set by the pass.
        threshold: float32 [1] or [E].
        make_constants: called, if the score needs constants, with w_in [f, n, d] and w_out [f, d] as float32: the weights
            as they are stored, after a cast to `weight_dtype`, or before they are quantised; not to be changed. Returns
            `neuron_scale` float32 [f] and, for score `shadow`, `shadow` int8 [f, n, d/2] and `shadow_scale` float16
            [f, n, d/32, 2].
        router: what scores the granules, with score `external`.
        neurons: int64 [f'], the neurons that the op holds in their order; None keeps all in the model's order.
        merge: how many experts are merged for each segment (`graph_passes.merge`), or None. The router scores them then.
    """

    attributes: SparseFFNAttributes
    threshold: np.ndarray
    make_constants: MakeConstants = lambda w_in, w_out: {}
    router: Router | None = None
    neurons: np.ndarray | None = None
    merge: int | None = None

    def width(self, intermediate_size: int) -> int:
        """How many neurons the op holds."""
        return intermediate_size if self.neurons is None else len(self.neurons)


def require_rewritable(model: ir.Model) -> None:
    """What `RewriteFFNs` needs of a graph, whatever it is to rewrite: a 2-D `input_ids`, from whose axes `load` takes its own,
    and an opset that the function body can use; no input of another meaning is called `load`.

    Raises:
        PreconditionError: says what is missing.
    """
    shape = next((value.shape for value in model.graph.inputs if value.name == "input_ids"), None)
    if shape is None or len(shape) != 2:
        raise ir.passes.PreconditionError("the graph has no input 'input_ids' with two axes")
    opset = model.graph.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ir.passes.PreconditionError(f"the graph has opset {opset}; {MIN_OPSET} or later is needed")
    if any(value.name == LOAD for value in model.graph.inputs) and not rewritten_ffns(model):
        raise ir.passes.PreconditionError(f"the graph has an input {LOAD!r} already, and no {OP_TYPE} node that reads it")


def check_rewrite(
    match: FFNMatch,
    rewrite: FFNRewrite,
    weight_dtype: ir.DataType | None,
    emit_active: bool,
    quantiser: Quantiser | None = None,
) -> None:
    """Refuse before the graph is touched.

    Raises:
        ContractError: types, sizes, threshold, score or forms of weights that the op does not allow here.
    """
    try:
        attributes = settle(match, rewrite.attributes, emit_active, quantiser)
    except ContractError as error:
        raise ContractError(f"{match.name}: {error}") from error
    if attributes.weight_format != "plain":
        weight_dtype = ir.DataType.UINT8
        if rewrite.neurons is not None or rewrite.merge is not None:
            what = "chosen neurons" if rewrite.neurons is not None else "merged experts"
            raise ContractError(f"{match.name}: {what} need plain weights; weight_format is {attributes.weight_format!r}")
    width = rewrite.width(match.intermediate_size)
    if rewrite.merge is not None:
        _check_merge(match.name, rewrite.merge, rewrite.router, attributes, width)
    elif (attributes.score == "external") != (rewrite.router is not None):
        found = "there is none" if rewrite.router is None else f"the score is {attributes.score!r}"
        raise ContractError(f"{match.name}: score 'external' and a router belong together; {found}")
    if rewrite.neurons is not None and not _is_selection(rewrite.neurons, match.intermediate_size):
        raise ContractError(
            f"{match.name}: 'neurons' must hold different indices of 0 to {match.intermediate_size - 1}, and at least one"
        )
    try:
        check_types(match.dtype, weight_dtype or match.dtype, attributes.weight_format)
        shapes = weight_shapes(attributes, match.hidden_size, width)
    except ContractError as error:
        raise ContractError(f"{match.name}: {error}") from error
    if rewrite.router is not None:
        wanted = (match.hidden_size, rewrite.merge or width // attributes.granule)
        if (rewrite.router.hidden_size, rewrite.router.granules) != wanted:
            raise ContractError(
                f"{match.name}: the router takes {rewrite.router.hidden_size} values and scores {rewrite.router.granules} "
                f"granules; the layer has {wanted[0]} and {wanted[1]}"
            )
    allowed = {(1,)} if attributes.rule == "topk" else {(1,), shapes["threshold"]}
    if rewrite.threshold.shape not in allowed or not bool(np.all(rewrite.threshold >= 0)):
        raise ContractError(
            f"{match.name}: threshold has shape {list(rewrite.threshold.shape)} and minimum {np.min(rewrite.threshold)}; "
            f"wanted {' or '.join(str(list(shape)) for shape in sorted(allowed))} and no negative or NaN value"
        )


def settle(
    match: FFNMatch, attributes: SparseFFNAttributes, emit_active: bool, quantiser: Quantiser | None = None
) -> SparseFFNAttributes:
    """The attributes with what the graph decides (activation, gating, biases), whether counts are emitted, and how weights are
    stored.

    Raises:
        ContractError: forms of weights that the op does not have, or not with these attributes.
    """
    return replace(
        attributes,
        activation=match.activation,
        gated=match.gated,
        has_bias=match.has_bias,
        emit_active=emit_active,
        weight_format=weight_format(match, quantiser),
    )


def _check_merge(name: str, experts: int, router: Router | None, attributes: SparseFFNAttributes, width: int) -> None:
    fits = router is not None and router.output == "softmax" and experts >= 2 and width % experts == 0
    if not fits or attributes.use_stat or attributes.emit_stat or attributes.score == "external" or attributes.rule == "topk":
        raise ContractError(
            f"{name}: merging {experts} experts of {width} neurons needs at least 2 that divide them, a router with output "
            "softmax, and an op without a statistic, an external score or rule topk"
        )


def _is_selection(neurons: np.ndarray, count: int) -> bool:
    inside = neurons.ndim == 1 and neurons.size > 0 and neurons.min() >= 0 and neurons.max() < count
    return bool(inside and len(np.unique(neurons)) == len(neurons))
