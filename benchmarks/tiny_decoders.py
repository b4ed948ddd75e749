"""Small random decoders of any type that `AutoModelForCausalLM` knows, without a list of types.

The configuration's own defaults are taken, and every setting whose name says that it is a size is made small.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
VOCABULARY = 256
MAX_PARAMETERS = 20_000_000
"""A model with more was not made small by these settings."""

_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (LAYERS, ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads")),
    (2, ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "linear_num_key_heads")),
    (0, ("num_kv_shared_layers",)),
    (1, ("n_group", "topk_group", "first_k_dense_replace")),
    (16, ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "hidden_size_per_layer_input",
         "linear_key_head_dim", "linear_value_head_dim")),
    (32, ("moe_intermediate_size", "expert_ffn_hidden_size")),
    (48, ("shared_expert_intermediate_size", "shared_intermediate_size")),
    (64, ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "word_embed_proj_dim", "embedding_size", "lru_width")),
    (96, ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dim_ff",
         "intermediate_size_mlp", "mlp_hidden_size", "block_ff_dim")),
    (512, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")),
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input")),
)  # fmt: skip
_HEAD_SIZES = {"head_dim": 16, "rotary_dim": 8, "qk_head_dim": 32, "mamba_d_head": 32, "mamba_n_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DERIVED = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "mlp_only_layers", "hybrid_override_pattern")
"""Lists with an entry for each layer: left out, so that the configuration makes its own."""


class NotMadeError(Exception):
    """No small model of this type could be made and run; says why."""


def model_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` maps, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_decoder(model_type: str, seed: int = 0) -> nn.Module:
    """A float32 model in eval mode with random weights that runs on token ids alone.

    The first of a few settings with which it does is taken: types differ in which of the sizes of a head follow from others.

    Raises:
        NotMadeError: none of the settings gives a model that runs.
    """
    reasons: dict[str, None] = {}
    for heads, cut in ((True, True), (False, True), (True, False), (False, False)):
        try:
            with _quiet():
                return _checked(_model(_config(model_type, heads=heads, cut=cut), seed))
        # Modeling code raises anything at all.
        except Exception as error:
            text = str(error).strip()
            reasons[f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"] = None
    raise NotMadeError("; ".join(reasons))


def _config(model_type: str, *, heads: bool, cut: bool) -> PretrainedConfig:
    """Small settings; `heads`: sizes of heads too; `cut`: lists by layer are cut, else they are left to the configuration."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    changes = _changes(default.to_dict(), heads=heads, cut=cut)
    config = kind(**changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _changes(default: Mapping[str, Any], *, heads: bool, cut: bool) -> dict[str, Any]:
    sizes = {name: size for size, names in _SIZES for name in names} | (_HEAD_SIZES if heads else {})
    changes: dict[str, Any] = dict(_TOKENS)
    for name, value in default.items():
        # Latent attention has as many heads for keys as for queries, and its sizes follow from that.
        if name == "num_key_value_heads" and value == default.get("num_attention_heads"):
            changes[name] = sizes["num_attention_heads"]
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = sizes[name]
        elif name in sizes and isinstance(value, list):
            changes[name] = [sizes[name]] * LAYERS
        elif name in _DERIVED and isinstance(value, list) and cut:
            changes[name] = value[:LAYERS]
        elif name.endswith("_config") and isinstance(value, Mapping) and name != "quantization_config":
            inner = {**value, **_changes(value, heads=heads, cut=cut)}
            changes[name] = {key: item for key, item in inner.items() if cut or key not in _DERIVED}
    return changes


def _model(config: PretrainedConfig, seed: int) -> nn.Module:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"it has {size / 1e6:.0f} million parameters even with small settings")
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                # Biases and norms that differ from their neutral values, so that leaving one out shows.
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.8 / min(parameter.shape[-2:]) ** 0.5)
    return model


def _checked(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 11)[None], use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
