"""The eager side of verification: the untouched model, and the same model with reference FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clada_export.calibration.scorer import layer_tensors
from clada_export.calibration.tap import FFNTap
from clada_export.ffn import EagerFFN
from clada_export.plan import LayerPlan, SparsityPlan
from clada_export.reference import SparseFFNTensors, dequantize_shadow, sparse_ffn
from graph_passes.op import SparseFFNAttributes


@dataclass(frozen=True)
class SparseRun:
    """Logits [T, V] float32 of one row, and how many neurons each layer ran, int32 [layers, T]."""

    logits: npt.NDArray[np.float32]
    active: npt.NDArray[np.int32]


def dense_logits(model: nn.Module, row: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits [T, V] of the untouched model for one row alone."""
    with torch.inference_mode():
        result: Tensor = model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0].float()
    return result.numpy()


def greedy(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy continuations of the untouched model with its own cache.

    Args:
        prompts: of one length, run as one batch.

    Returns:
        For each prompt its new tokens, and each step's gap between the two best logits.
    """
    tokens, gaps = [], []
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([list(prompt) for prompt in prompts]), use_cache=True)
        for step in range(new_tokens):
            best = output.logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, 0])
            gaps.append(best.values[:, 0] - best.values[:, 1])
            if step + 1 < new_tokens:
                output = model(input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
    return torch.stack(tokens, dim=1).tolist(), torch.stack(gaps, dim=1).tolist()


class ReferenceModel:
    """The eager model with `clada_export.reference.sparse_ffn` in place of every planned FFN.

    Args:
        rewritten: names of the FFNs that the engine runs as the op; others stay as they are.
    """

    def __init__(
        self, model: nn.Module, ffns: Sequence[EagerFFN], plan: SparsityPlan, rewritten: Sequence[str] | None = None
    ) -> None:
        self._model = model
        chosen = [
            (ffn, layer) for ffn in ffns if (layer := plan.layer(ffn.name)) and (rewritten is None or ffn.name in rewritten)
        ]
        self._ffns = [ffn for ffn, _ in chosen]
        self._layers = [_reference_layer(ffn, layer, plan) for ffn, layer in chosen]

    def run(self, row: Sequence[int], load: npt.NDArray[np.float32]) -> SparseRun:
        """Run one row alone; `load` float32 [T] is the load of every token."""
        loads = torch.from_numpy(np.asarray(load, dtype=np.float32))[None]
        active = torch.zeros(len(self._layers), len(row), dtype=torch.int32)

        def replace(index: int, x: Tensor) -> Tensor:
            attributes, tensors, shadow = self._layers[index]
            shaped = x.reshape(1, len(row), -1)
            # The tensors are float32 whatever the model's type is: only what is between the layers is rounded.
            result = sparse_ffn(shaped.float(), loads, tensors, attributes, shadow_weight=shadow)
            active[index] = result.active[0]
            return result.y.to(x.dtype).reshape(x.shape)

        with torch.inference_mode(), FFNTap(self._ffns, replace=replace):
            logits: Tensor = self._model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0].float()
        return SparseRun(logits.numpy(), active.numpy())


def _reference_layer(
    ffn: EagerFFN, layer: LayerPlan, plan: SparsityPlan
) -> tuple[SparseFFNAttributes, SparseFFNTensors, Tensor | None]:
    attributes = replace(plan.attributes(layer), has_bias=ffn.has_bias)
    tensors = layer_tensors(ffn, plan.score, torch.tensor(layer.threshold, dtype=torch.float32))
    shadow = None
    if tensors.shadow is not None and tensors.shadow_scale is not None:
        shadow = dequantize_shadow(tensors.shadow, tensors.shadow_scale)
    return attributes, tensors, shadow
