"""The kernels on a real device: inside CUDA graphs, on streams, at sizes that the emulation can't reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cuda_kernels import Call, CudaKernels
from benchmarks.ffn_cuda import Weights, make_call, relative_error
from clada_export.op.reference import sparse_ffn

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
# Relative error of a whole result. Sums are in float32; a prompt's hidden values, and y, are rounded to the type.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run(kernels: CudaKernels, call: Call, workspace: Tensor | None = None) -> None:
    kernels.run(call, kernels.workspace([call], DEVICE) if workspace is None else workspace, stream())
    torch.cuda.synchronize()


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16, 17, 300])
@pytest.mark.parametrize("score", ["external", "shadow", "gate", "exact"])
def test_layers_of_real_size(kernels: CudaKernels, score: str, rows: int, dtype: torch.dtype) -> None:
    weights = Weights.random(4096, 11008, dtype, DEVICE, 0)
    x = draw(1, rows, 4096, dtype=dtype, seed=1)
    for fraction in (1.0, 0.4) if rows <= 16 or score == "external" else (1.0,):
        call, attributes, tensors, inputs = make_call(kernels, weights, x, score, fraction, 2)
        run(kernels, call)
        wanted = sparse_ffn(x, inputs["load"], tensors, attributes, score=inputs.get("score"))
        # A score at the threshold's very edge may fall on either side.
        assert (call.active - wanted.active).abs().max() <= 1
        if torch.equal(call.active, wanted.active):
            assert relative_error(call.y, wanted.y) < BOUNDS[dtype]


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_captured_graph_follows_the_load(kernels: CudaKernels, rows: int) -> None:
    """The load is read on the device: the same graph runs dense and sparse."""
    weights = Weights.random(1024, 4096, torch.float16, DEVICE, 0)
    x = draw(1, rows, 1024, dtype=torch.float16, seed=1)
    call, attributes, tensors, inputs = make_call(kernels, weights, x, "external", 0.5, 3)
    workspace = kernels.workspace([call], DEVICE)
    run(kernels, call, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.run(call, workspace, stream())
    for load in (0.0, float("inf"), float("-inf"), 0.0):
        inputs["load"].fill_(load)
        x.copy_(draw(1, rows, 1024, dtype=torch.float16, seed=int(load == 0.0)))
        call.y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = sparse_ffn(x, inputs["load"], tensors, attributes, score=inputs["score"])
        assert torch.equal(call.active, wanted.active)
        if load == float("-inf"):
            assert not call.y.any()
        else:
            assert relative_error(call.y, wanted.y) < BOUNDS[torch.float16]


def test_streams_do_not_disturb_each_other(kernels: CudaKernels) -> None:
    weights = Weights.random(1024, 4096, torch.bfloat16, DEVICE, 0)
    made: list[Any] = []
    for seed in range(6):
        x = draw(1, 1 + 30 * (seed % 2), 1024, dtype=torch.bfloat16, seed=seed)
        call, *_ = make_call(kernels, weights, x, "shadow", 0.5, seed)
        made.append((call, kernels.workspace([call], DEVICE), torch.cuda.Stream()))
    alone = []
    for call, workspace, _ in made:
        run(kernels, call, workspace)
        alone.append(call.y.clone())
        call.y.fill_(float("nan"))
    torch.cuda.synchronize()
    for _ in range(20):
        for call, workspace, side in made:
            kernels.run(call, workspace, int(side.cuda_stream))
    torch.cuda.synchronize()
    for (call, *_), wanted in zip(made, alone, strict=True):
        assert torch.equal(call.y, wanted)


def test_more_than_two_to_the_31_weights(kernels: CudaKernels) -> None:
    """Offsets into the weights need 64 bits: f * d is 2.4e9 here."""
    d, f = 8192, 294_912
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40 << 30:
        pytest.skip("the GPU has less than 40 GiB")
    w_in = torch.zeros(f, 2, d, dtype=torch.float16, device=DEVICE)
    w_out = torch.zeros(f, d, dtype=torch.float16, device=DEVICE)
    w_in[-8:] = draw(8, 2, d, dtype=torch.float16, seed=0) / d**0.5
    w_out[-8:] = draw(8, d, dtype=torch.float16, seed=1)
    small = Weights.random(32, 32, torch.float16, DEVICE, 0)
    weights = Weights(w_in, w_out, w_out.new_ones(f, dtype=torch.float32), small.shadow, small.shadow_scale, small.gate_up)
    for rows in (1, 2, 20):
        x = draw(1, rows, d, dtype=torch.float16, seed=2)
        call, *_ = make_call(kernels, weights, x, "external", 1.0, 0)
        run(kernels, call)
        pre = torch.einsum("fnd,bsd->bsfn", w_in[-8:].float(), x.float())
        wanted = (torch.nn.functional.silu(pre[..., 0]) * pre[..., 1]) @ w_out[-8:].float()
        assert relative_error(call.y, wanted) < BOUNDS[torch.float16]
