"""Tiny random models of the supported families, and their ONNX exports.

Exports take about ten seconds each, so they are kept (`tests/kept.py`), keyed by what shapes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.kept import kept, versions

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "opt", "gpt2")
MOE_KINDS = ("mixtral",)

GRAPH = "model.onnx"
SLIDING_WINDOW = 16

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS = {key: _BASE[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "mistral": {**_BASE, "sliding_window": SLIDING_WINDOW},
    "qwen2": _BASE,
    "qwen3": _BASE,
    "gemma": _BASE,
    "gemma3_text": {
        **_BASE,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**_BASE, "original_max_position_embeddings": 512},
    "opt": {**_IDS, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 512, "word_embed_proj_dim": 64},
    "gpt2": {**_IDS, "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
_DOWN = {"opt": "model.decoder.layers.{}.fc2", "gpt2": "transformer.h.{}.mlp.c_proj"}


def tiny_config(kind: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model: hidden size 64, FFN width 96, two layers, 256 tokens."""
    return AutoConfig.for_model(kind, **{**_SETTINGS[kind], **overrides})


def tiny_model(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model with random weights, in which every bias and norm weight differs from its neutral value."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **overrides), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.8 / min(parameter.shape[-2:]) ** 0.5)
    return model


def ffn_names(kind: str, layers: int = 2) -> list[str]:
    """The module paths of the down projections."""
    return [_DOWN.get(kind, "model.layers.{}.mlp.down_proj").format(i) for i in range(layers)]


def export_tiny(
    kind: str,
    fusions: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    opset: int | None = None,
) -> ir.Model:
    """The decode graph (any number of tokens, with past) of `tiny_model(kind, seed)`; a fresh copy at each call.

    Args:
        fusions: `ort_fusions` of `transformers.exporters.OnnxConfig`: None or "cpu".
        dtype: what the weights are rounded to, and what the graph computes in.
        opset: of the graph; None is the exporter's own choice.
    """
    made_by = (versions(), repr(_SETTINGS), inspect.getsource(tiny_model), inspect.getsource(_export))
    key = "\n".join((*made_by, kind, str(seed), str(dtype), str(opset)))
    exported = kept("tiny_models", key, lambda folder: _save(_export(tiny_model(kind, seed).to(dtype), opset), folder))
    if fusions is not None:
        plain = exported / GRAPH
        exported = kept("tiny_models", f"{key}\n{fusions}", lambda folder: _save(_fused(plain, fusions), folder))
    return _loaded(exported / GRAPH)


def _save(model: ir.Model, folder: Path) -> None:
    ir.save(model, folder / GRAPH)


def _loaded(path: Path) -> ir.Model:
    """A model with its weights in memory, as the exporter makes it."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def _export(model: PreTrainedModel, opset: int | None, fusions: str | None = None) -> ir.Model:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.randint(3, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    module, inputs = decompose_for_generation(model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)[
        "decode"
    ]
    config = OnnxConfig(dynamic=True, ort_fusions=fusions, opset_version=opset)
    exported = OnnxExporter().export(module, inputs, config=config)
    return exported.program.model if hasattr(exported.program, "model") else exported.program


def _fused(path: Path, fusions: str) -> ir.Model:
    """What the exporter makes with these `ort_fusions`, of what it made without: they are its last step, the others a trace."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    model = _loaded(path)
    fuse_for_onnxruntime(model, fusions)
    return model


def session(model: ir.Model, library: Path | None = None) -> Any:
    """A one-thread CPU session of the model, without a custom-op library if none is given."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def prompt_feeds(inputs: Iterable[ir.Value], ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Feeds of a call with an empty past, for the graph inputs `inputs` that are not `load`.

    Args:
        ids: int64 [B, S]; mask: int64 [B, S], all ones when None.
    """
    mask = np.ones_like(ids) if mask is None else mask
    feeds: dict[str, np.ndarray] = {}
    for value in inputs:
        name = str(value.name)
        if name == "input_ids":
            feeds[name] = ids
        elif name == "attention_mask":
            feeds[name] = mask
        elif name == "position_ids":
            feeds[name] = np.maximum(mask.cumsum(-1) - 1, 0)
        elif "past_key_values" in name:
            assert value.shape is not None
            if len(value.shape) == 0:
                feeds[name] = np.array(SLIDING_WINDOW, dtype=np.int64)
            else:
                assert value.dtype is not None
                feeds[name] = np.zeros((ids.shape[0], _size(value, 1), 0, _size(value, 3)), dtype=value.dtype.numpy())
    return feeds


def _size(value: ir.Value, axis: int) -> int:
    # The exporter writes sizes of inputs that it found to be fixed as symbols: "16".
    assert value.shape is not None
    return int(str(value.shape[axis]))


def next_feeds(past: Mapping[str, np.ndarray], ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Feeds of a call after others: `past` maps input names to arrays, `mask` int64 [B, past + S] covers past and `ids`."""
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
