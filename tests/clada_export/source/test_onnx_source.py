"""An ONNX graph as the model: cut at its FFNs, calibrated through ONNX Runtime, compiled, and held to the graph as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16

from clada_export import export, load_engine, verify_folder
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.cli import main, main_export
from clada_export.cli.inspection import inspect_onnx
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.source.load import load_source
from clada_export.source.onnx.load import load_decoder
from clada_export.source.onnx.stages import cut
from graph_passes import find_ffns
from graph_passes.matchers.common import module_path
from tests.tiny_models import export_tiny, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

KINDS = ("llama", "gemma3_text", "phi3", "gpt2")
Graph = Callable[..., Path]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The model file of a tiny model's graph, by kind and fusions, in a folder of its own."""
    made: dict[tuple[str, str | None], Path] = {}

    def make(kind: str, fusions: str | None = None) -> Path:
        if (kind, fusions) not in made:
            folder = tmp_path_factory.mktemp("graphs") / kind
            folder.mkdir()
            ir.save(export_tiny(kind, fusions), folder / "model.onnx", external_data="model.onnx.data")
            tiny_model(kind).config.save_pretrained(folder)
            made[kind, fusions] = folder / "model.onnx"
        return made[kind, fusions]

    return make


def _ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fusions", [None, "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_in_parts_computes_what_the_model_does(kind: str, fusions: str | None, graph: Graph) -> None:
    decoder, model, ids = load_decoder(graph(kind, fusions)), tiny_model(kind), _ids()
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        first = decoder.run(ids[:, :5], keep_cache=True)
        rest = decoder.run(ids[:, 5:], cache=first.cache, keep_cache=True)
        for found in (decoder.run(ids).logits, decoder.run_whole(ids).logits, torch.cat((first.logits, rest.logits), 1)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert decoder.run(ids).cache is None


def test_every_node_is_in_one_part_or_in_an_ffn(graph: Graph) -> None:
    model = ir.load(graph("llama", "cpu"))
    matches, proto = find_ffns(model).matches, ir.to_proto(model)
    stages = cut(model, proto, matches)
    inside = {str(output.name) for match in matches for node in match.nodes for output in node.outputs}
    cut_off = sorted(name for stage in stages for node in stage.nodes for name in node.output)
    assert cut_off == sorted(name for node in proto.graph.node for name in node.output if name not in inside)
    assert sorted(index for stage in stages for index in stage.ffns) == [0, 1]
    available = {value.name for value in proto.graph.input}
    for stage in stages:
        assert set(stage.inputs) <= available
        available |= {*stage.outputs, *(str(matches[index].y.name) for index in stage.ffns)}
    assert {value.name for value in proto.graph.output} <= available


def test_changed_weights_are_seen(graph: Graph) -> None:
    decoder = load_decoder(graph("llama"))
    before = decoder.dense_logits([5, 6, 7])
    with torch.no_grad():
        decoder.ffns[0].down.weight.mul_(0.5)  # type: ignore[operator,union-attr]
    assert np.abs(decoder.dense_logits([5, 6, 7]) - before).max() > 1e-3
    np.testing.assert_array_equal(decoder.dense_logits([5, 6, 7]), decoder.run(torch.tensor([[5, 6, 7]])).logits[0].numpy())


def test_sensitivity_without_gradients_is_the_same(graph: Graph) -> None:
    model, decoder = tiny_model("llama"), load_decoder(graph("llama"))
    windows = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(1))
    wanted = layer_sensitivity(TorchDecoder(model), windows)
    found = layer_sensitivity(decoder, windows)
    np.testing.assert_allclose(found, wanted, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_compiled(kind: str, graph: Graph, tmp_path: Path) -> None:
    result = export(graph(kind), tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None)
    assert result.verification is not None and result.verification.passed
    assert any(check.name.startswith("dense parity") for check in result.verification.checks)
    assert len(result.plan.layers) == 2
    assert result.manifest.source["kind"] == "onnx" and result.manifest.source["name"] == kind
    assert set(result.manifest.source["files"]) == {
        "model.onnx",
        "model.onnx.data",
        "config.json",
        "generation_config.json",
    } & {path.name for path in graph(kind).parent.iterdir()}
    found = load_engine(tmp_path / "out").generate([[5, 6, 7]], 4, load="dense", eos_token_id=[])
    model, tokens = tiny_model(kind), [5, 6, 7]
    with torch.inference_mode():
        for _ in range(4):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert found.tokens == [tokens[3:]]


def test_an_engine_of_a_graph_is_verified_again(graph: Graph, tmp_path: Path) -> None:
    export(graph("llama"), tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None, verify=False)
    assert verify_folder(tmp_path / "out", str(graph("llama").parent)).passed
    with pytest.raises(UsageError, match="not the model that"):
        verify_folder(tmp_path / "out", str(graph("llama", "cpu")))


def test_narrow_weights_of_a_graph(graph: Graph, tmp_path: Path) -> None:
    result = export(
        graph("llama"), tmp_path / "out", sparsity=0.3, dtype="bfloat16", calibration_context=32, calibration_cache=None
    )
    assert result.verification is not None and result.verification.passed


@pytest.mark.parametrize("policy", ["griffin", "cats", "d2dmoe"])
def test_other_policies(policy: str, graph: Graph, tmp_path: Path) -> None:
    result = export(
        graph("llama"), tmp_path / "out", policy=policy, sparsity=0.3, calibration_context=32, calibration_cache=None
    )
    assert result.verification is not None and result.verification.passed


def test_the_tokenizer_of_the_folder_is_taken(graph: Graph, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in graph("llama").parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_tiny_tokenizer(folder)
    source = load_source(str(folder))
    assert source.tokenizer("w7 w9")["input_ids"] == [7, 9]
    assert not any("tokenizer" in warning for warning in source.warnings)


def test_the_tokenizer_lies_above_the_hubs_folder_of_onnx_models(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "model" / "onnx").mkdir(parents=True)
    for path in graph("llama").parent.iterdir():
        (tmp_path / "model" / ("" if path.suffix == ".json" else "onnx") / path.name).write_bytes(path.read_bytes())
    save_tiny_tokenizer(tmp_path / "model")
    for place in (tmp_path / "model", tmp_path / "model" / "onnx" / "model.onnx"):
        source = load_source(str(place))
        assert source.name == "model" and source.tokenizer("w7 w9")["input_ids"] == [7, 9]
        assert {"config.json", "onnx/model.onnx", "onnx/model.onnx.data"} <= set(source.files)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--prune", "wanda=0.5"], "pruned"),
        (["--policy", "lte", "--finetune"], "needs gradients"),
    ],
)
def test_what_needs_the_pytorch_model_is_refused(
    options: list[str], reason: str, graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(graph("llama")), "--target", "ort", "-o", str(tmp_path / "out"), "--sparsity", "0.3", *options]
    assert main_export(command) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _edited(graph: Graph, folder: Path, change: Callable[[ir.Model], None]) -> Path:
    model = ir.load(graph("gpt2"))
    change(model)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def _call_every_node(name: str) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for node in model.graph:
            node.name = name
            node.metadata_props.clear()
        for index, value in enumerate(list(model.graph.initializers.values())):
            value.name = f"onnx::MatMul_{index}"

    return change


def test_nodes_without_names(graph: Graph, tmp_path: Path) -> None:
    path = _edited(graph, tmp_path, _call_every_node(""))
    result = export(path, tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None)
    names = [layer.name for layer in result.plan.layers]
    assert len(set(names)) == 2 and all(name.startswith("onnx::MatMul_") for name in names)
    assert result.verification is not None and result.verification.passed


def _older(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 13


def _flag(model: ir.Model) -> None:
    model.graph.inputs.append(ir.Value(name="use_cache_branch", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1])))


def _other_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "hidden"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_call_every_node("same"), "does not run this graph: .*two nodes with same node name"),
        (_older, "opset 13; 18 or later"),
        (_flag, "use_cache_branch"),
        (_other_output, "no output 'logits'"),
    ],
)
def test_graphs_that_are_no_decoders(
    change: Callable[[ir.Model], None], reason: str, graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _edited(graph, tmp_path, change)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_source(str(path))
    assert main_export([str(path), "--target", "ort", "-o", str(tmp_path / "out"), "--sparsity", "0.3"]) == 3
    assert not (tmp_path / "out").exists()


def test_an_engine_is_not_compiled_again(graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(graph("gpt2"), tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None, verify=False)
    with pytest.raises(UnsupportedModelError, match="was written by clada-export already"):
        load_source(str(tmp_path / "out" / "model.onnx"))
    assert main(["inspect", str(tmp_path / "out" / "model.onnx"), "--json"]) == 0
    layers: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["rewritten"] for layer in layers] == [False, False]


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_in_16_bits_are_named(layers: int, graph: Graph, tmp_path: Path) -> None:
    """A graph of which a tool made the first layer, or both, float16; it appends the Casts that it adds."""
    inside = tuple(f"model.layers.{index}.mlp" for index in range(layers))
    wide = [node.name for node in ir.load(graph("llama")).graph if not (module_path(node) or "").startswith(inside)]
    path = tmp_path / "model.onnx"
    mixed = convert_float_to_float16(onnx.load(graph("llama")), keep_io_types=True, node_block_list=wide)
    path.write_bytes(mixed.SerializeToString())
    found = inspect_onnx(path).layers
    assert [layer.rewritten for layer in sorted(found, key=lambda layer: layer.name)] == [index >= layers for index in (0, 1)]
    assert all("16 bits (float16)" in layer.reason for layer in found if not layer.rewritten)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.mlp.down_proj': it computes in 16 bits \(float16\)"):
        export(path, tmp_path / "out", sparsity=0.3)
