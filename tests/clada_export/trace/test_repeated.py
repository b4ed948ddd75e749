"""Layers that are traced once and repeated: the graph is the one that tracing them all gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import PreTrainedModel

from clada_export.decoder.digest import weights_digest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.trace.example import make_example
from clada_export.trace.exporter import export_graph
from clada_export.trace.stack import find_stack
from clada_export.trace.template import shortened
from clada_export.trace.trace import trace
from tests.clada_export.trace.same_graph import differences
from tests.kept import kept, sources, versions
from tests.tiny_models import tiny_model

PATTERN = ["sliding_attention", "full_attention"]
# The sources that a trace of a whole model depends on.
STAGE = (Path("clada_export", "trace", "example.py"), Path("clada_export", "trace", "exporter.py"), Path("graph_passes"))

FAST = [("llama", 6, "cpu"), pytest.param("gemma3_text", 8, None, marks=pytest.mark.long)]
SLOW = [
    (kind, 8 if kind == "gemma3_text" else 6, fusions)
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "opt", "gpt2", "mixtral")
    for fusions in (None, "cpu")
]


def deep_model(kind: str, layers: int, **settings: Any) -> PreTrainedModel:
    """A tiny model with more layers than two; of Gemma 3 every second one looks at all tokens."""
    depth = {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers}
    if kind == "gemma3_text":
        settings = {"layer_types": (PATTERN * layers)[:layers], **settings}
    return tiny_model(kind, 0, **depth, **settings)


def whole_graph(model: PreTrainedModel, fusions: str | None) -> ir.Graph:
    """What the exporter makes of all layers."""
    decoder = TorchDecoder(model)
    key = "\n".join((versions(), sources(*STAGE), model.config.to_json_string(), weights_digest(model), str(fusions)))

    def make(folder: Path) -> None:
        ir.save(export_graph(make_example(decoder), decoder.name, fusions), folder / "model.onnx")

    return ir.load(kept("whole-traces", key, make) / "model.onnx").graph


def check_same(model: PreTrainedModel, fusions: str | None, traced: int) -> None:
    """Hold the trace stage against the exporter."""
    found = trace(TorchDecoder(model), fusions=fusions)
    assert found.way is not None
    assert (found.way.traced, found.way.reason) == (traced, None)
    assert differences(whole_graph(model, fusions), found.graph.graph) == []


@pytest.mark.parametrize(("kind", "layers", "fusions"), FAST)
def test_repeated_layers_are_those_of_the_whole(kind: str, layers: int, fusions: str | None) -> None:
    check_same(deep_model(kind, layers), fusions, 6 if kind == "gemma3_text" else 4)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "layers", "fusions"), SLOW)
def test_repeated_layers_are_those_of_the_whole_for_every_kind(kind: str, layers: int, fusions: str | None) -> None:
    check_same(deep_model(kind, layers), fusions, 6 if kind == "gemma3_text" else 4)


@pytest.mark.long
def test_equal_weights_become_one_as_in_the_whole() -> None:
    """Norms of a fresh model are ones and biases zeros: the exporter makes one constant of them all."""
    model = deep_model("qwen2", 6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
    check_same(model, None, 4)


def test_layers_that_differ_by_a_number_are_traced_as_a_whole() -> None:
    """GPT-2 can divide the scores of each layer by its number."""
    model = deep_model("gpt2", 5, scale_attn_by_inverse_layer_idx=True)
    found = trace(TorchDecoder(model), fusions=None)
    assert found.way is not None and found.way.traced is None
    assert "its 5 layers are not alike" in (found.way.reason or "")
    assert sum(str(value.name).startswith("past_key_values.") for value in found.graph.graph.inputs) == 10


def test_a_short_model_is_traced_as_a_whole() -> None:
    found = trace(TorchDecoder(tiny_model("llama", 0)), fusions=None)
    assert found.way is not None and found.way.traced is None
    assert "2 layers" in (found.way.reason or "")


def test_the_model_is_as_it_was_and_lends_its_weights() -> None:
    model = deep_model("llama", 6)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    ids = torch.arange(3, 11)[None]
    logits = model(ids).logits
    graph = trace(TorchDecoder(model), fusions=None).graph.graph
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert len(model.model.layers) == 6
    assert torch.equal(model(ids).logits, logits)
    norm = model.model.layers[4].input_layernorm.weight
    with torch.no_grad():
        norm.fill_(3.0)
    assert ir.to_proto(graph.initializers["model.layers.4.input_layernorm.weight"].const_value) is not None
    tensor = graph.initializers["model.layers.4.input_layernorm.weight"].const_value
    assert tensor is not None and (tensor.numpy() == 3.0).all()


def test_a_shortened_model_has_no_weights_and_keeps_ties() -> None:
    model = deep_model("llama", 6, tie_word_embeddings=True)
    stack = find_stack(model)
    embedding = model.get_input_embeddings().weight
    with pytest.raises(KeyError, match="in between"), shortened(model, stack):
        assert len(model.model.layers) == stack.traced == 4
        assert model.lm_head.weight is model.get_input_embeddings().weight is not embedding
        small = [parameter for parameter in model.parameters() if parameter.numel() <= 1024]
        assert len({parameter.numpy().tobytes() for parameter in small}) == len(small)
        assert not model.get_input_embeddings().weight.any()
        raise KeyError("in between")
    assert model.lm_head.weight is model.get_input_embeddings().weight is embedding
