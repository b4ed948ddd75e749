"""The cost model that policies are compared by: weight bytes of FFNs for one decoded token, relative to the dense ones.

Decoding one sequence is bound by memory, so time follows bytes (methods of this kind are compared so in `docs/policies.md`).
The formulas are in `clada_export.plan.reads`.
"""

from __future__ import annotations

from clada_export.plan.layer import layer_attributes
from clada_export.plan.method import Method
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.reads import dense_bytes, read_bytes


def relative_bytes(plan: SparsityPlan, item: float = 4) -> float:
    """Bytes that the plan's FFNs read for one token at load 0, relative to the dense model's FFNs (1 = dense)."""
    read = total = 0.0
    for layer in plan.layers:
        router = plan.tensors(layer).router
        parameters = 0 if router is None else router.parameters
        weight_format = plan.attributes(layer).weight_format
        read += read_bytes(layer, plan.score, 1.0 - layer.expected_sparsity, item, parameters, weight_format)
        total += dense_bytes(layer, item)
    return read / total if total else 1.0


def method_bytes(method: Method, active: float, item: float = 4) -> float:
    """As `relative_bytes`, of a method at which the share `active` of every layer's neurons runs."""
    read = total = 0.0
    for layer in method.layers:
        arrays = method.arrays.get(layer.name)
        parameters = 0 if arrays is None or arrays.router is None else arrays.router.parameters
        weight_format = layer_attributes(layer, method.score, method.rule).weight_format
        read += read_bytes(layer, method.score, active, item, parameters, weight_format)
        total += dense_bytes(layer, item)
    return read / total if total else 1.0
