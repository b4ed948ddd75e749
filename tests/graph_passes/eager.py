"""Eager models whose feed-forward layers are the reference op, to compare rewritten graphs with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clada_export.op.reference import SparseFFNTensors, quantize_shadow, sparse_ffn
from graph_passes import FFNRewrite
from graph_passes.op import SparseFFNAttributes


def score_constants(w_in: np.ndarray, w_out: np.ndarray) -> Mapping[str, np.ndarray]:
    """Every constant that a score may need."""
    shadow, scale = quantize_shadow(torch.from_numpy(w_in))
    norms = np.linalg.norm(w_out, axis=-1).astype(np.float32)
    return {"neuron_scale": norms, "shadow": shadow.numpy(), "shadow_scale": scale.numpy()}


class _Sparse(nn.Module):
    def __init__(self, attributes: SparseFFNAttributes, threshold: np.ndarray, load: Tensor, w_in: Tensor, w_out: Tensor,
                 up_bias: Tensor | None, down_bias: Tensor | None) -> None:  # fmt: skip
        super().__init__()
        self.attributes = replace(attributes, has_bias=up_bias is not None, gated=w_in.shape[1] == 2)
        constants = {k: torch.from_numpy(v) for k, v in score_constants(w_in.numpy(), w_out.numpy()).items()}
        self.tensors = SparseFFNTensors(
            w_in, w_out, torch.from_numpy(threshold), up_bias=up_bias, down_bias=down_bias, **constants
        )
        self.load = load

    def forward(self, x: Tensor) -> Tensor:
        load = self.load.reshape(x.shape[:-1])
        return sparse_ffn(x, load, self.tensors, self.attributes).y


class _Pass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def sparse_eager(
    kind: str, model: nn.Module, rewrites: Mapping[str, FFNRewrite], activation: str, load: np.ndarray
) -> Callable[..., nn.Module]:
    """Replace the FFNs of an eager model, in place."""
    rows = torch.from_numpy(load)
    for name, rewrite in rewrites.items():
        attributes = replace(rewrite.attributes, activation=activation)
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        if kind == "opt":
            up, down = parent.fc1, parent.fc2
            parent.fc1, parent.activation_fn = _Pass(), _Pass()
            parent.fc2 = _Sparse(attributes, rewrite.threshold, rows, up.weight[:, None], down.weight.T.contiguous(),
                                 up.bias, down.bias)  # fmt: skip
            continue
        if kind == "gpt2":
            up, down = parent.c_fc, parent.c_proj
            new = _Sparse(
                attributes, rewrite.threshold, rows, up.weight.T[:, None].contiguous(), down.weight, up.bias, down.bias
            )
        else:
            if kind == "phi3":
                gate_weight, up_weight = parent.gate_up_proj.weight.chunk(2, 0)
            else:
                gate_weight, up_weight = parent.gate_proj.weight, parent.up_proj.weight
            w_in = torch.stack((gate_weight, up_weight), dim=1)
            new = _Sparse(attributes, rewrite.threshold, rows, w_in, parent.down_proj.weight.T.contiguous(), None, None)
        grandparent, _, last = parent_name.rpartition(".")
        setattr(model.get_submodule(grandparent), last, new)
    return model
