"""Tiny checkpoints with random weights that are mixtures of experts already, in the layouts that can be imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

HIDDEN, NEURONS, EXPERTS, CHOSEN, LAYERS, VOCABULARY = 64, 96, 6, 2, 2, 256
SIZE = NEURONS // EXPERTS

Change = Callable[[dict[str, Tensor]], None]

LLAMA_MOE: dict[str, Any] = {
    "model_type": "llama_moe",
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM",
    },
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "num_experts": EXPERTS,
    "num_selects": CHOSEN,
    "size_experts": [[SIZE] * EXPERTS] * LAYERS,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_add_noise": True,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": [3.0, 2.5],
    "add_weight_norm": False,
}


def llama_moe_weights(gate_network: str = "mlp", seed: int = 0) -> dict[str, Tensor]:
    """A LLaMA-MoE's tensors by the names that its code gives them."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{key: value for key, value in LLAMA_MOE.items() if key not in ("model_type", "architectures")})
    state = {
        name: _random(tuple(tensor.shape))
        for name, tensor in LlamaForCausalLM(config).state_dict().items()
        if ".mlp." not in name
    }
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        if gate_network == "mlp":
            state[f"{mlp}.gate.gate_network.0.weight"] = _random((EXPERTS, HIDDEN))
            state[f"{mlp}.gate.gate_network.2.weight"] = 3 * _random((EXPERTS, EXPERTS))
        else:
            state[f"{mlp}.gate.gate_network.weight"] = _random((EXPERTS, HIDDEN))
        state[f"{mlp}.gate.weight_noise.weight"] = _random((EXPERTS, HIDDEN))
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        for expert in range(EXPERTS):
            state[f"{mlp}.calculator.experts.weight_gate.{expert}"] = _random((SIZE, HIDDEN))
            state[f"{mlp}.calculator.experts.weight_up.{expert}"] = _random((SIZE, HIDDEN))
            state[f"{mlp}.calculator.experts.weight_down.{expert}"] = _random((HIDDEN, SIZE))
    return state


def write_llama_moe(folder: Path, *, change: Change = lambda state: None, drop: tuple[str, ...] = (), **fields: Any) -> Path:
    """Write a LLaMA-MoE.

    Args:
        change: called with its tensors before they are written.
        drop: fields that its config leaves out; `fields` replaces others.
    """
    config = {key: value for key, value in {**LLAMA_MOE, **fields}.items() if key not in drop}
    state = llama_moe_weights(str(config.get("gate_network", "mlp")))
    change(state)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_granite_moe(folder: Path, **fields: Any) -> Path:
    """Write a GraniteMoe, whose blocks have the layout of DS-MoE."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.8,
        "logits_scaling": 1.5,
        "embedding_multiplier": 2.0,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # With an expert that every token runs beside those that are chosen, it is another class.
    shared = "shared_intermediate_size" in fields
    config = (GraniteMoeSharedConfig if shared else GraniteMoeConfig)(**{**settings, **fields})
    model = (GraniteMoeSharedForCausalLM if shared else GraniteMoeForCausalLM)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_random(tuple(parameter.shape)))
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Words w0, w1, ... that a space divides."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_text(path: Path, words: int = 4096) -> Path:
    """Random words of `write_tokenizer`."""
    numbers = torch.randint(3, VOCABULARY, (words,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{number}" for number in numbers.tolist()))
    return path


def _random(shape: tuple[int, ...]) -> Tensor:
    if len(shape) < 2:
        return 1.0 + 0.1 * torch.randn(shape)
    return torch.randn(shape) * 0.8 / min(shape[-2:]) ** 0.5
