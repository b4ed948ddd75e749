"""Cases of SparseFFN with quantised weights, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from op_shells import Case, run_function, run_native
from quant_shells import available_isas

from clada_export.op.quant_reference import quantise_rows
from clada_export.op.reference import SparseFFNTensors, neuron_outputs
from graph_passes.op import FORMAT_BITS, SparseFFNAttributes
from graph_passes.quant.ffn_layout import pack_in, pack_out
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.quantise import quantise

SPECIAL = torch.tensor([0.0, float("inf"), 0.7, float("-inf"), float("nan"), -0.9, float("inf"), 2.0])
EXACT = ("relu", "relu2", "identity")
"""Activations that have the same bits everywhere."""


def matrices(
    bits: int, gated: bool, d: int, f: int, seed: int
) -> tuple[QuantisedMatrix | None, QuantisedMatrix, QuantisedMatrix]:
    """Gate, up and down of random weights; some neurons and blocks are zeros."""
    rng = np.random.default_rng(seed)

    def one(n: int, k: int) -> QuantisedMatrix:
        weight = (rng.standard_normal((n, k)) * k**-0.5).astype(np.float32)
        weight[rng.random(n) < 0.05] = 0.0
        return quantise(weight, bits)

    gate, up = one(f, d) if gated else None, one(f, d)
    return gate, up, one(d, f)


def make_case(
    attributes: SparseFFNAttributes,
    *,
    shape: tuple[int, ...] = (2, 5),
    d: int = 96,
    f: int = 128,
    load: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    seed: int = 0,
    clear: bool = True,
) -> Case:
    """A random case; with `clear` one of which no choice and no rounding of h hangs on an activation's last bit."""
    a = attributes
    for attempt in range(200):
        gate, up, down = matrices(FORMAT_BITS[a.weight_format], a.gated, d, f, 1000 * seed + attempt)
        generator = torch.Generator().manual_seed(1000 * seed + attempt)

        def normal(*size: int, scale: float = 0.1, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*size, generator=generator) * scale

        start = {"threshold": 0.25, "relative": 0.3, "topk": max(1.0, 0.4 * f)}[a.rule]
        biases = (normal(f) if a.gated else None, normal(f), normal(d)) if a.has_bias else ()
        tensors = SparseFFNTensors(
            torch.from_numpy(pack_in(gate, up)),
            torch.from_numpy(pack_out(down)),
            torch.tensor([start]) if threshold is None else threshold,
            torch.from_numpy(np.linalg.norm(down.dequantise(), axis=0)),
            None,
            None,
            *biases,
        )
        rows = int(np.prod(shape)) if shape else 1
        loads = SPECIAL[torch.arange(rows) % len(SPECIAL)].reshape(shape) if load is None else load
        case = Case(a, tensors, normal(*shape, d, scale=1.0), loads)
        if not clear or is_clear(case):
            return case
    raise AssertionError("no case with clear choices was found")


def is_clear(case: Case) -> bool:
    """Small changes of h leave the mask and the 8-bit numbers as they are."""
    hidden, _ = neuron_outputs(case.x, case.tensors.w_in, case.tensors, case.attributes)
    rows = np.where(case.mask().numpy(), hidden.numpy(), 0).reshape(-1, hidden.shape[-1])
    first = quantise_rows(rows)[0]
    noise = np.random.default_rng(0).choice([-1, 1], rows.shape) * 3e-6
    if any((quantise_rows((rows * (1 + sign * noise)).astype(np.float32))[0] != first).any() for sign in (-1, 1)):
        return False
    moved = (
        replace(case, tensors=replace(case.tensors, threshold=case.tensors.threshold * (1 + step))) for step in (1e-5, -1e-5)
    )
    return all(torch.equal(case.mask(), each.mask()) for each in moved)


NATIVE: dict[str, Callable[[Case], dict[str, np.ndarray]]] = {
    f"ort_{isa}": lambda case, isa=isa: run_native(case, isa=isa, threads=2) for isa in available_isas()
}
SHELLS: dict[str, Callable[[Case], dict[str, np.ndarray]]] = {"function_body": run_function, **NATIVE}
