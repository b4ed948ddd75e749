"""The layout of LLaMA-MoE v1 (github.com/pjlab-sys4nlp/llama-moe): a Llama whose FFNs were split into experts.

Its model comes as Python code, which is not run. What that code computes at inference, read from it:

    logits = gate_network(x)                                          linear, or linear, tanh, linear; no biases
    scores = softmax over the num_selects largest logits
    y = sum over the chosen experts of score_scale_factor * score_e * down_e(act(gate_e x) * up_e x)

`weight_noise` takes part in training only. Rotary embeddings have base 10000 whatever the config says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.files.json_files import read_json
from clada_export.foreign import CONFIG, MODEL, WEIGHTS, reading
from clada_export.source.config_file import Stored, check_config, check_counts, check_size
from clada_export.source.mixtures.routed_mlp import RoutedMLP
from clada_export.source.pretrained import load_generation_config, model_without_memory, quiet
from graph_passes.router import Router

MODEL_TYPE = "llama_moe"
LAYOUT = "LLaMA-MoE v1"

_NAMES_SHOWN = 3
_UNUSED = ("mlp.gate.weight_noise.weight", "self_attn.rotary_emb.inv_freq")
_ROPE_TYPES = ("linear", "dynamic")
_PARTS = ("weight_gate", "weight_up", "weight_down")

# What a LlamaConfig has under the same name. `pretraining_tp` only cuts products into parts.
_LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_scaling",
    "license",
)

# Fields with the only values whose meaning the op has, and why others are refused. A config leaves out what is the default.
_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("gate_type", "TopKBalancedNoisyGate", "only this gate is known"),
    ("calculator_type", "UniversalCalculator", "others drop tokens, or are not known"),
    ("gate_use_softmax", True, "scores without a softmax can be negative, and the op's are not"),
    ("multiply_gate_scores", True, "experts that are added without their scores are not supported"),
    ("add_weight_norm", False, "a norm after the experts is not supported"),
)


@dataclass(frozen=True)
class MoESettings:
    """What config.json says of the experts. `scales` holds `score_scale_factor` of every layer."""

    experts: int
    selects: int
    gate_network: str
    scales: tuple[float, ...]
    expert_size: int
    hidden_size: int

    @property
    def gate_shapes(self) -> dict[str, tuple[int, ...]]:
        """The gate's weights by their names in a layer's `mlp.gate`."""
        first = (self.experts, self.hidden_size)
        if self.gate_network == "linear":
            return {"gate_network.weight": first}
        return {"gate_network.0.weight": first, "gate_network.2.weight": (self.experts, self.experts)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All weights of a layer's `mlp` that are used."""
        shapes = {f"gate.{name}": shape for name, shape in self.gate_shapes.items()}
        rows, columns = (self.expert_size, self.hidden_size), (self.hidden_size, self.expert_size)
        for expert in range(self.experts):
            for part in _PARTS:
                shapes[f"calculator.experts.{part}.{expert}"] = columns if part == "weight_down" else rows
        return shapes


def is_llama_moe(folder: Path) -> bool:
    """Whether a folder's config.json says that it is of this layout."""
    value = read_json(folder / "config.json")
    return isinstance(value, dict) and value.get("model_type") == MODEL_TYPE


def load_llama_moe(folder: Path, files: Sequence[Path], stored: Stored, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of transformers whose FFNs are `RoutedMLP`, with the checkpoint's numbers. Its own Python code is not used.

    Args:
        folder: holds config.json.
        files: safetensors, or pickled weights (read with `weights_only=True`).
        stored: how much is in them.
        dtype: of the weights; routers are float32.

    Raises:
        UsageError: a config that contradicts itself, or weights that do not fit it; names the field or the tensors.
        UnsupportedModelError: a variant of the layout that the op can't express.
    """
    place = str(folder / "config.json")
    value = read_json(folder / "config.json")
    check_config(value, place)
    settings = read_settings(value, place)
    with reading(CONFIG, place), quiet():
        config = LlamaConfig(**{name: value[name] for name in _LLAMA_FIELDS if name in value})
    check_counts(config, stored, place)
    # Every expert has weights of its own.
    if settings.experts * len(settings.scales) > stored.tensors:
        raise UsageError(
            f"{place}: num_experts is {settings.experts} in each of {len(settings.scales)} layers, and the weights hold "
            f"{stored.tensors} tensors"
        )
    # Weights come from the files: nothing is allocated for them before.
    model: LlamaForCausalLM = model_without_memory(LlamaForCausalLM, config, place=folder, most=stored.most_parts)
    check_size(model, stored, place)
    tied = bool(config.tie_word_embeddings)
    ignored = _ignored(tied)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for index in range(len(settings.scales)):
        wanted |= {f"model.layers.{index}.mlp.{name}": shape for name, shape in settings.shapes.items()}
    wanted = {name: shape for name, shape in wanted.items() if not ignored(name)}
    with reading(WEIGHTS, folder):
        state = {name: tensor for name, tensor in _tensors(files) if not ignored(name)}
    _check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, wanted, str(folder))
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for index, layer in enumerate(model.model.layers):
        layer.mlp = _mixture(settings, index, layer.mlp.act_fn, state)
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        model.tie_weights()
    # Its frequencies are computed, not loaded, so they are still without memory.
    with reading(MODEL, place):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.config.dtype = dtype
    generation = load_generation_config(folder)
    if generation is not None:  # Else what the config says is enough.
        model.generation_config = generation
    return model


def read_settings(value: Mapping[str, Any], place: str) -> MoESettings:
    """The experts' part of a config.

    Args:
        value: config.json, parsed.
        place: its path, for messages.

    Raises:
        UsageError: a value that is out of range or of another type.
        UnsupportedModelError: a variant that the op can't express.
    """
    for name, allowed, why in _ONLY:
        found = value.get(name, allowed)
        if found != allowed:
            raise UnsupportedModelError(f"{place}: {name}: {found!r}; only {allowed!r} can be imported ({why})")
    layers, width, neurons = (
        _count(value, name, default, place)
        for name, default in (("num_hidden_layers", 32), ("hidden_size", 4096), ("intermediate_size", 11008))
    )
    experts, selects = _count(value, "num_experts", 16, place), _count(value, "num_selects", 4, place)
    if selects > experts:
        raise UsageError(f"{place}: num_selects: {selects} experts are chosen of {experts} (num_experts)")
    network = value.get("gate_network", "mlp")
    if not isinstance(network, str) or network.lower() not in ("mlp", "linear"):
        raise UnsupportedModelError(f"{place}: gate_network: {network!r} is unknown; mlp and linear can be imported")
    rope = value.get("rope_scaling")
    if rope is not None and (not isinstance(rope, dict) or rope.get("type") not in _ROPE_TYPES):
        raise UsageError(f"{place}: rope_scaling: {rope!r}; wanted is an object with type {' or '.join(_ROPE_TYPES)}, or null")
    size = _expert_size(value.get("size_experts"), layers, experts, neurons, place)
    return MoESettings(experts, selects, network.lower(), _scales(value, layers, place), size, width)


def _count(value: Mapping[str, Any], name: str, default: int, place: str) -> int:
    found = value.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UsageError(f"{place}: {name}: {found!r}; an integer of at least 1 is wanted")
    return found


def _scales(value: Mapping[str, Any], layers: int, place: str) -> tuple[float, ...]:
    found = value.get("score_scale_factor", 1.0)
    scales = found if isinstance(found, list) else [found] * layers
    numbers = [scale for scale in scales if isinstance(scale, int | float) and math.isfinite(scale) and scale > 0]
    if len(scales) != layers or len(numbers) != layers:
        raise UsageError(
            f"{place}: score_scale_factor: {found!r}; a number above 0 is wanted, or a list of {layers}, one a layer"
        )
    return tuple(float(scale) for scale in numbers)


def _expert_size(sizes: Any, layers: int, experts: int, neurons: int, place: str) -> int:
    if sizes is None:
        if neurons % experts:
            raise UsageError(f"{place}: num_experts: {experts} experts do not divide {neurons} neurons (intermediate_size)")
        return neurons // experts
    if not isinstance(sizes, list) or len(sizes) != layers or not all(isinstance(item, list) for item in sizes):
        raise UsageError(f"{place}: size_experts: a list of {layers} lists is wanted, one a layer")
    for index, item in enumerate(sizes):
        if len(item) != experts or not all(isinstance(size, int) for size in item) or sum(item) != neurons:
            raise UsageError(
                f"{place}: size_experts: layer {index} has {item!r}; wanted are {experts} sizes of together {neurons} neurons"
            )
        if len(set(item)) > 1:
            raise UnsupportedModelError(
                f"{place}: size_experts: layer {index} has experts of {min(item)} to {max(item)} neurons; only experts of one "
                "size can be imported"
            )
    return neurons // experts


def _ignored(tied: bool) -> Callable[[str], bool]:
    def ignored(name: str) -> bool:
        return name.endswith(_UNUSED) or (tied and name == "lm_head.weight")

    return ignored


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        if file.suffix == ".bin":
            value = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
                raise UsageError(f"{file}: a dictionary of tensors is wanted, and this is something else")
            yield from value.items()
            continue
        with safe_open(file, framework="pt") as stream:
            for name in stream.offset_keys():
                yield name, stream.get_tensor(name)


def _check_tensors(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], place: str) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise UsageError(f"{place}: weights are missing that the config asks for: {_listed(missing)}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise UsageError(
            f"{place}: the weights hold tensors that the config has no place for: {_listed(extra)}; check num_hidden_layers, "
            "num_experts and gate_network"
        )
    wrong = [f"{name}: {found[name]} in the weights, {wanted[name]} by the config" for name in sorted(wanted)
             if found[name] != wanted[name]]  # fmt: skip
    if wrong:
        raise UsageError(f"{place}: the weights do not fit the config: {_listed(wrong, '; ')}")


def _listed(names: Sequence[str], between: str = ", ") -> str:
    rest = len(names) - _NAMES_SHOWN
    return between.join(names[:_NAMES_SHOWN]) + (f", and {rest} more" if rest > 0 else "")


def _mixture(settings: MoESettings, index: int, act_fn: Callable[[Tensor], Tensor], state: dict[str, Tensor]) -> RoutedMLP:
    """One layer's experts; takes its weights out of `state`, so that a model is not held twice."""
    prefix = f"model.layers.{index}.mlp"
    weights = tuple(state.pop(f"{prefix}.gate.{name}").float().numpy() for name in settings.gate_shapes)
    router = Router(
        weights,
        (None,) * len(weights),
        hidden="tanh",
        output="topk_softmax",
        scale=settings.scales[index],
        k=settings.selects,
        dense_rows="scores",
    )
    gate, up, down = (
        torch.cat(
            [state.pop(f"{prefix}.calculator.experts.{part}.{expert}") for expert in range(settings.experts)],
            dim=1 if part == "weight_down" else 0,
        )
        for part in _PARTS
    )
    return RoutedMLP(gate, up, down, act_fn, router, LAYOUT)
