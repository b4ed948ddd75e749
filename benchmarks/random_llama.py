"""A Llama of any size with random weights, written layer by layer: what an export costs does not depend on the values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama; heads are 64 or 128 wide."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000
    heads: int = 16
    kv_heads: int = 16

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def key(self) -> str:
        """A name for a folder."""
        return "-".join(f"{name}{value}" for name, value in asdict(self).items())


def write_llama(shape: LlamaShape, folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a checkpoint, one shard a layer; no more than one shard is in memory. One that is there already stays.

    Returns:
        The folder.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    head = shape.hidden // shape.heads

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return torch.ones(shape.hidden, dtype=dtype)

    places: dict[str, str] = {}
    total = shape.layers + 1

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number:05}-of-{total:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, name))

    save(
        1,
        {
            "model.embed_tokens.weight": matrix(shape.vocabulary, shape.hidden),
            "model.norm.weight": norm(),
            "lm_head.weight": matrix(shape.vocabulary, shape.hidden),
        },
    )
    for index in range(shape.layers):
        path = f"model.layers.{index}"
        sizes = {
            "self_attn.q_proj": (shape.heads * head, shape.hidden),
            "self_attn.k_proj": (shape.kv_heads * head, shape.hidden),
            "self_attn.v_proj": (shape.kv_heads * head, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.heads * head),
            "mlp.gate_proj": (shape.intermediate, shape.hidden),
            "mlp.up_proj": (shape.intermediate, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.intermediate),
        }
        tensors = {f"{path}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        tensors |= {f"{path}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
        save(index + 2, tensors)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index_file = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder
