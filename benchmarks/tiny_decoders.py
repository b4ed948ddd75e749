"""Small random decoders of any type that `AutoModelForCausalLM` knows, without a list of types.

The configuration's own defaults are taken, and every setting whose name says that it is a size is made small.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
VOCABULARY = 256
MAX_PARAMETERS = 20_000_000
"""A model with more was not made small by these settings."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (LAYERS, _LAYER_COUNTS),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads")),
    (2, ("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "linear_num_key_heads")),
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


@dataclass(frozen=True)
class _Settings:
    """What is made small.

    Attributes:
        heads: sizes of heads too.
        cut: lists by layer are cut, else they are left to the configuration.
        fill: sizes that the configuration does not set are set too.
        layers: the number of layers too, else it stays what other settings may have been made for.
    """

    heads: bool
    cut: bool
    fill: bool = False
    layers: bool = True


_HEADS_AND_LISTS = ((True, True), (False, True), (True, False), (False, False))
_SETTINGS = (
    *(_Settings(heads, cut) for heads, cut in _HEADS_AND_LISTS),
    *(_Settings(heads, cut, fill=True) for heads, cut in _HEADS_AND_LISTS),
    *(_Settings(heads, False, layers=False) for heads in (True, False)),
)


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
    for settings in _SETTINGS:
        try:
            with _quiet():
                return _checked(_model(_config(model_type, settings), seed))
        # Modeling code raises anything at all.
        except Exception as error:
            text = str(error).strip()
            reasons[f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"] = None
    raise NotMadeError("; ".join(reasons))


def _config(model_type: str, settings: _Settings) -> PretrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    changes = _changes(default.to_dict(), settings)
    config = kind(**changes)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _changes(default: Mapping[str, Any], settings: _Settings) -> dict[str, Any]:
    sizes = {name: size for size, names in _SIZES for name in names} | (_HEAD_SIZES if settings.heads else {})
    if not settings.layers:
        sizes = {name: size for name, size in sizes.items() if name not in _LAYER_COUNTS}
    changes: dict[str, Any] = dict(_TOKENS)
    for name, value in default.items():
        # Latent attention has as many heads for keys as for queries, and its sizes follow from that.
        if name == "num_key_value_heads" and value == default.get("num_attention_heads"):
            changes[name] = sizes["num_attention_heads"]
        elif name in sizes and (_is_number(value) or (value is None and settings.fill)):
            changes[name] = sizes[name]
        elif name in sizes and isinstance(value, list):
            changes[name] = [sizes[name]] * (LAYERS if settings.layers else len(value))
        elif name in _DERIVED and isinstance(value, list) and settings.cut:
            changes[name] = value[:LAYERS]
        elif _is_config(name, value):
            inner = {**value, **_changes(value, settings)}
            changes[name] = {key: item for key, item in inner.items() if settings.cut or key not in _DERIVED}
    return changes


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_config(name: str, value: Any) -> bool:
    """Whether a setting is the configuration of a part, and not just called so (`per_layer_config`)."""
    return name.endswith("_config") and isinstance(value, Mapping) and "model_type" in value


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
