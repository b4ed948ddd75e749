"""One decoder, of PyTorch or of an ONNX graph: the same facts, the same numbers, the same FFNs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from clada_export.decoder import torch_decoder
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFNs, find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder, require_torch
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.source.onnx.load import load_decoder
from tests.tiny_models import export_tiny, tiny_model
from tests.token_models import TokenModel

ROW = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("graph")
    ir.save(export_tiny("llama"), folder / "model.onnx", external_data="model.onnx.data")
    tiny_model("llama").config.save_pretrained(folder)
    return load_decoder(folder / "model.onnx")


def test_a_graph_is_the_model_that_it_came_from(graph: Decoder) -> None:
    model = TorchDecoder(tiny_model("llama"))
    for fact in ("vocab_size", "sequence_limit", "first_position", "padding"):
        assert getattr(graph, fact) == getattr(model, fact), fact
    assert [ffn.name for ffn in graph.ffns] == [ffn.name for ffn in model.ffns]
    assert graph.skipped == model.skipped == ()
    np.testing.assert_allclose(graph.dense_logits(ROW), model.dense_logits(ROW), rtol=0, atol=2e-5)
    torch.testing.assert_close(graph.logits(torch.tensor(ROW)), model.logits(torch.tensor(ROW)), rtol=0, atol=2e-5)


def test_a_graph_says_what_it_is_not(graph: Decoder) -> None:
    assert not graph.differentiable and not graph.takes_positions
    with pytest.raises(UsageError, match="tracing needs the PyTorch model, and OnnxDecoder is none"):
        require_torch(graph, "tracing")
    decoder = TorchDecoder(tiny_model("llama"))
    assert require_torch(decoder, "tracing") is decoder


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_taps_see_and_replace(kind: str, graph: Decoder) -> None:
    decoder = graph if kind == "onnx" else TorchDecoder(tiny_model("llama"))
    ids, seen = torch.tensor(ROW), []

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        seen.append((index, x.shape[-1], h.shape[-1]))

    with torch.no_grad():
        wanted = decoder.logits(ids)
        with decoder.tap(inner=inner):
            torch.testing.assert_close(decoder.logits(ids), wanted, rtol=0, atol=0)
        assert seen == [(0, 64, 96), (1, 64, 96)]
        seen.clear()
        with decoder.tap(inner=inner, only=decoder.ffns[1:]):
            decoder.logits(ids)
        assert seen == [(0, 64, 96)]
        with decoder.tap(replace=lambda index, x: torch.zeros_like(x)):
            assert float((decoder.logits(ids) - wanted).abs().max()) > 1e-3
        torch.testing.assert_close(decoder.logits(ids), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_cache_goes_on(kind: str, graph: Decoder) -> None:
    decoder = graph if kind == "onnx" else TorchDecoder(tiny_model("llama"))
    ids = torch.tensor([ROW])
    with torch.no_grad():
        for run in (decoder.run, decoder.run_whole):
            whole, first = run(ids), run(ids[:, :2], keep_cache=True)
            assert whole.cache is None
            rest = run(ids[:, 2:], cache=first.cache, keep_cache=True)
            parts = torch.cat((first.logits, rest.logits), 1)
            torch.testing.assert_close(parts, whole.logits, rtol=0, atol=2e-5)


def test_what_is_known_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("first_position", "padding_of", "find_eager_ffns"):
        real = getattr(torch_decoder, name)

        def count(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            asked.append(name)
            return real(*args, **options)

        monkeypatch.setattr(torch_decoder, name, count)
    decoder = TorchDecoder(tiny_model("llama"))
    assert asked == []
    for _ in range(2):
        _ = (
            decoder.ffns,
            decoder.skipped,
            decoder.require_ffns(),
            decoder.sequence_limit,
            decoder.first_position,
            decoder.padding,
        )
    assert sorted(asked) == ["find_eager_ffns", "first_position", "padding_of"]


def test_a_copy_in_16_bits_has_the_same_ffns() -> None:
    decoder = TorchDecoder(tiny_model("gpt2"))
    copy = decoder.in_dtype("bfloat16")
    assert copy.model.dtype == torch.bfloat16 and decoder.model.dtype == torch.float32
    forms = [[(ffn.name, ffn.activation, ffn.gated, ffn.packing) for ffn in one.ffns] for one in (decoder, copy)]
    assert forms[0] == forms[1]
    for ffn, other in zip(decoder.ffns, copy.ffns, strict=True):
        assert other.down is copy.model.get_submodule(ffn.name) is not ffn.down


def test_weights_take_gradients_again_after_they_were_frozen() -> None:
    decoder = TorchDecoder(tiny_model("llama"))
    some = dict(decoder.model.named_parameters())
    some["lm_head.weight"].requires_grad_(False)
    before = [parameter.requires_grad for parameter in some.values()]
    with pytest.raises(KeyError), decoder.frozen():
        assert not any(parameter.requires_grad for parameter in some.values())
        raise KeyError
    assert [parameter.requires_grad for parameter in some.values()] == before


def test_ffns_that_are_known_are_not_searched_for() -> None:
    model = tiny_model("llama")
    found = find_eager_ffns(model)
    decoder = TorchDecoder(model, EagerFFNs(found.found[:1], ()))
    assert decoder.ffns == found.found[:1]


def test_a_decoder_without_ffns_is_refused() -> None:
    model: Any = TokenModel(nn.Identity(), width=8)
    with pytest.raises(UnsupportedModelError, match="TokenModel: no feed-forward layer that could be compiled"):
        TorchDecoder(model).require_ffns()


def test_attention_says_its_scale() -> None:
    assert TorchDecoder(tiny_model("llama")).attention_scales == {0.25}
