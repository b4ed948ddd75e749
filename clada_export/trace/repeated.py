"""Trace a few layers of a decoder, without its weights, and repeat them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass
from torch import Tensor

from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.trace.blocks import LayerNames, find_block
from clada_export.trace.example import make_example
from clada_export.trace.exporter import FAILURES, export_graph
from clada_export.trace.quiet import first_line
from clada_export.trace.recipes import Recipe, StandIn, constant, weights_in
from clada_export.trace.repeat import repeat
from clada_export.trace.stack import Stack, WholeError
from clada_export.trace.template import shortened, weights_of


def trace_repeated(decoder: TorchDecoder, stack: Stack, fusions: str | None) -> ir.Model:
    """The graph of the whole decoder, from a trace of as many layers as `stack` says.

    Raises:
        WholeError: those layers can't be traced alone, or not repeated; says why.
    """
    model, used = _trace_shortened(decoder, stack, fusions)
    block = find_block(model.graph, stack, used)
    recipes = repeat(model.graph, block, stack)
    weights = weights_of(decoder.model)
    _check_weights(recipes, used, weights, stack)
    _check_cache(model.graph, stack.depth)
    for value, recipe in recipes.items():
        assert value.const_value is not None and value.name is not None
        value.const_value = constant(recipe, value.const_value, value.name, weights)
    # No two stand-ins are equal, and weights may be: of those the exporter makes one.
    DeduplicateInitializersPass()(model)
    return model


def _trace_shortened(decoder: TorchDecoder, stack: Stack, fusions: str | None) -> tuple[ir.Model, frozenset[str]]:
    """The graph of the first layers, with stand-ins for weights, and the names of the weights that it read at first."""
    used: set[str] = set()

    def look(graph: ir.Graph) -> None:
        for name, tensor in stand_ins.items():
            value = graph.initializers.get(name)
            if value is not None:
                value.const_value = StandIn(tensor, name)
                used.update({name} if value.uses() else ())

    with shortened(decoder.model, stack):
        stand_ins = weights_of(decoder.model)
        try:
            model = export_graph(make_example(decoder, stack.traced), decoder.name, fusions, look)
        except (UnsupportedModelError, IndexError, AttributeError, *FAILURES) as error:
            # Code of a model may count on all of its layers; or it can't be traced at all, which the whole then says.
            raise WholeError(f"{stack.traced} of its layers can't be traced alone: {first_line(error)}") from error
    return model, frozenset(used)


def _check_weights(
    recipes: Mapping[ir.Value, Recipe], used: frozenset[str], weights: Mapping[str, Tensor], stack: Stack
) -> None:
    """Hold the weights that the graph has against those of the eager model: each is there if its like was used in the trace."""
    found = {name for recipe in recipes.values() for name in weights_in(recipe)}
    names = LayerNames(stack.path)
    expected = {name for name in weights if _traced_like(name, names, stack) in used}
    if found != expected:
        raise WholeError(f"the repeated layers would not have the weights of the model: {min(found ^ expected)}")


def _traced_like(name: str, names: LayerNames, stack: Stack) -> str:
    """The name of the weight that stood for this one in the trace."""
    layer = names.layer(name)
    if layer is None:
        return name
    back = max(0, layer - stack.first - stack.period) // stack.period
    return names.shifted(name, -min(back, stack.repeats) * stack.period)


def _check_cache(graph: ir.Graph, depth: int) -> None:
    """Keys and values of every layer come in and go out, in the order of the layers."""
    for kind, values in (("past_key_values", graph.inputs), ("present", graph.outputs)):
        names = [str(value.name) for value in values if str(value.name).startswith(f"{kind}.")]
        if names != [f"{kind}.{layer}.{role}" for layer in range(depth) for role in ("key", "value")]:
            raise WholeError(f"the repeated layers would not have the cache of {depth} layers")
