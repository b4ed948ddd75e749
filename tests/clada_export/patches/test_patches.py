"""Each patch of another library: that it is looked at when the library changes, and that the library still needs it.

The tests marked xfail say what the library would do if its patch could go. On the day that it does they pass, which fails the
run (strict): then the patch goes, and its test too.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from onnx_ir.passes.common import InlinePass
from onnxscript.rewriter import pattern
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, core_model_loading
from transformers.cache_utils import DynamicCache
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model
from transformers.utils.quantization_config import GgufConfig

import clada_export.patches
from clada_export.patches.gguf_reader import one_gguf_reader
from clada_export.patches.gguf_weights import gguf_weights
from clada_export.patches.onnx_ir_inlining import InlineFunctions
from clada_export.patches.onnxscript_folding import FoldConstants, FoldConstantsPass
from clada_export.patches.onnxscript_matcher import early_reject
from clada_export.patches.onnxscript_optimizer import before_optimising
from clada_export.patches.patch import Patch
from clada_export.patches.registry import PATCHES
from clada_export.patches.torch_pytree import children
from clada_export.patches.transformers_loading import weights_placed
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[3]
OURS = {"clada_export", "graph_passes", *sys.stdlib_module_names}
"""What is no other library: this project, and Python's own modules."""


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_is_looked_at_when_its_library_changes(patch: Patch) -> None:
    """If this fails, constraints.txt has another version: read what changed in it, and bring `made_for` up to date."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"{patch.package}=={patch.made_for}" in lines
    assert patch.reason.strip() and patch.until.strip()


def test_every_module_of_patches_is_listed() -> None:
    modules = {module.name for module in pkgutil.iter_modules(clada_export.patches.__path__)}
    assert {patch.name for patch in PATCHES} == modules - {"patch", "registry"}


def private_parts(tree: ast.Module) -> list[str]:
    """The private names of other libraries that a module imports, or reaches by way of one that it imports."""
    found, libraries = [], set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            libraries |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        foreign = (name for name in names if name.split(".")[0] not in OURS)
        found += [name for name in foreign if re.search(r"\._(?!_)", f".{name}")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
            text = ast.unparse(node)
            found += [text] if re.fullmatch(r"[\w.]+", text) and text.split(".")[0] in libraries - OURS else []
    return found


@pytest.mark.parametrize(
    "text",
    [
        "from onnxscript.rewriter import _basics",
        "from onnxscript.optimizer._constant_folding import FoldConstantsPass",
        "import torch\nx = torch.utils._pytree.SUPPORTED_NODES",
        "import onnx_ir as ir\nir._core.Graph()",
    ],
)
def test_a_private_part_is_seen(text: str) -> None:
    assert private_parts(ast.parse(text))


def test_nothing_else_touches_private_parts() -> None:
    for folder in ("clada_export", "graph_passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent.name != "patches":
                assert private_parts(ast.parse(path.read_text(encoding="utf-8"))) == [], path.relative_to(ROOT)


# onnxscript's matcher


class CountedGraph:
    """A graph that counts how often all of its nodes are listed."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self.graph = graph
        self.listed = 0

    def __iter__(self) -> Iterator[ir.Node]:
        self.listed += 1
        return iter(self._graph)


def two_outputs(op: Any, x: Any) -> Any:
    return op.Sin(x), op.Cos(x)


def _match_elsewhere() -> CountedGraph:
    """Hold a node that can't begin the pattern against it."""
    x = ir.Value(name="x")
    node = ir.node("Relu", [x])
    graph = CountedGraph(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}))
    rule = pattern.RewriteRule(two_outputs, two_outputs)
    assert not rule._matcher.match(None, graph, node)
    return graph


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="onnxscript lists the graph before it compares the operator")
def test_the_matcher_compares_the_operator_first() -> None:
    assert _match_elsewhere().listed == 0


def test_early_reject_compares_the_operator_first() -> None:
    with early_reject():
        assert _match_elsewhere().listed == 0
    assert _match_elsewhere().listed > 0


# onnxscript's optimiser


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="neither exporter calls its caller before it optimises")
def test_an_exporter_takes_a_function_to_call_before_it_optimises() -> None:
    """A parameter with such a name is what to look for; what it does then has to be read."""
    offered = {field.name for field in dataclasses.fields(OnnxConfig)} | set(inspect.signature(torch.onnx.export).parameters)
    assert any(re.search("hook|callback|before|passes|transform", name) for name in offered)


def test_a_graph_is_shown_once_before_it_is_optimised() -> None:
    shown: list[int] = []
    before = onnxscript.optimizer.optimize_ir
    with before_optimising(lambda graph: shown.append(len(list(graph)))):
        onnxscript.optimizer.optimize(_chain(3))
        onnxscript.optimizer.optimize(_chain(2))
    assert shown == [4]
    assert onnxscript.optimizer.optimize_ir is before


# onnxscript's constant folding


def _chain(length: int) -> ir.Model:
    """A constant, and one more added to it `length` times; then a size of it that depends on an input."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    step = ir.Value(name="step", const_value=ir.tensor(np.ones(4, np.float32), name="step"))
    value, nodes = step, []
    for index in range(length):
        nodes.append(ir.node("Add", [value, step], name=f"add{index}"))
        value = nodes[-1].outputs[0]
        value.name = f"sum{index}"
    nodes.append(ir.node("Concat", [x, value], {"axis": 0}))
    nodes[-1].outputs[0].name = "y"
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[step], opset_imports={"": 18}, name="chain")
    return ir.Model(graph, ir_version=10)


def _kept_names(folding: type[FoldConstantsPass], length: int) -> int:
    model = _chain(length)
    folding(shape_inference=False, input_size_limit=100, output_size_limit=100)(model)
    key = onnxscript.optimizer.FOLDED_FROM_KEY
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    assert "sum0" not in {value.name for value in values if value.producer() and value.producer().op_type == "Add"}
    return max(len(value.metadata_props.get(key, "")) for value in values)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a constant keeps the names of all it was made of")
def test_the_metadata_of_constants_does_not_grow_along_a_chain() -> None:
    assert _kept_names(FoldConstantsPass, 40) == _kept_names(FoldConstantsPass, 4)


def test_no_names_are_kept() -> None:
    assert _kept_names(FoldConstants, 40) == 0


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the pass is private")
def test_the_folding_pass_is_public() -> None:
    assert hasattr(onnxscript.optimizer, "FoldConstantsPass")


# onnx-ir's inlining


class CountedSet(set[str]):
    """A set that counts how often it is asked whether it holds something."""

    asked = 0

    def __contains__(self, item: object) -> bool:
        self.asked += 1
        return super().__contains__(item)


def _asked(inlining: type[InlinePass], calls: int) -> int:
    """How often names were looked up to inline `calls` calls of one function."""
    inner = ir.Value(name="a")
    body = ir.node("Relu", [inner])
    body.outputs[0].name = "b"
    opsets = {"": 18, "test": 1}
    function = ir.Function(
        "test", "F", graph=ir.Graph([inner], body.outputs, nodes=[body], opset_imports=opsets), attributes=[]
    )
    x = ir.Value(name="x")
    value, nodes = x, []
    for _ in range(calls):
        nodes.append(ir.node("F", [value], domain="test"))
        value = nodes[-1].outputs[0]
    value.name = "y"
    graph = ir.Graph([x], [value], nodes=nodes, opset_imports=opsets, name="calls")
    made = inlining()
    counted = [CountedSet(), CountedSet()]
    original = made._reset

    def reset(model: ir.Model) -> None:
        original(model)
        made._used_value_names, made._used_node_names = counted

    made._reset = reset  # type: ignore[method-assign]
    made(ir.Model(graph, ir_version=10, functions=[function]))
    assert len(list(graph)) == calls and all(node.op_type == "Relu" for node in graph)
    return sum(each.asked for each in counted)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="onnx-ir counts up from 1 for every name")
def test_inlining_takes_steps_in_proportion_to_the_calls() -> None:
    assert _asked(InlinePass, 80) < 8 * _asked(InlinePass, 20)


def test_our_inlining_takes_steps_in_proportion_to_the_calls() -> None:
    assert _asked(InlineFunctions, 80) < 8 * _asked(InlineFunctions, 20)


# transformers' GGUF reader


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that readers were opened for, one entry each."""
    opened: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *arguments: Any) -> None:
            opened.append(str(path))
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    return opened


def _read(path: Path) -> None:
    AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="transformers opens a reader for each of its calls")
def test_transformers_opens_one_reader_a_file(tmp_path: Path, readers: list[str]) -> None:
    _read(save_tiny_gguf(tmp_path / "tiny.gguf"))
    assert len(readers) == 1


def test_one_reader_serves_all_calls(tmp_path: Path, readers: list[str]) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    before = gguf.GGUFReader
    with one_gguf_reader():
        _read(path)
    assert len(readers) == 1
    assert gguf.GGUFReader is before


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="gguf cuts entries out of a np.memmap")
def test_gguf_lists_a_vocabulary_in_a_plain_array(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(save_tiny_gguf(tmp_path / "tiny.gguf"))
    assert not any(isinstance(part, np.memmap) for part in reader.fields["tokenizer.ggml.tokens"].parts)


def test_our_reader_has_the_parts_of_gguf_s(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")
    wanted = gguf.GGUFReader(path)
    with one_gguf_reader():
        found = gguf.GGUFReader(path)
    assert isinstance(found, type(wanted)) and not isinstance(found.fields["tokenizer.ggml.tokens"].parts[-1], np.memmap)
    assert list(found.fields) == list(wanted.fields)
    for name, field in wanted.fields.items():
        other = found.fields[name]
        assert (other.offset, other.data, other.types) == (field.offset, field.data, field.types)
        assert len(other.parts) == len(field.parts)
        for part, given in zip(other.parts, field.parts, strict=True):
            assert part.dtype == given.dtype and np.array_equal(part, given)
    assert [tensor.data_offset for tensor in found.tensors] == [tensor.data_offset for tensor in wanted.tensors]


# transformers' loading of weights


def _loading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Reads and placements of weights, in the order in which they happen."""
    events: list[str] = []
    for name in ("_materialize_copy", "set_param_for_module"):
        monkeypatch.setattr(core_model_loading, name, _noted(events, name, getattr(core_model_loading, name)))
    tiny_model("llama").save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    return events


def _noted(events: list[str], name: str, original: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        events.append(name)
        return original(*args, **options)

    return call


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="transformers starts to read all weights at once")
def test_transformers_reads_a_weight_when_its_turn_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = _loading(monkeypatch, tmp_path)
    assert events == ["_materialize_copy", "set_param_for_module"] * (len(events) // 2)


def _unpacking(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    events: list[str] = []
    monkeypatch.setattr(gguf, "dequantize", _noted(events, "unpacked", gguf.dequantize))
    monkeypatch.setattr(gguf, "get_tensor_name_map", _noted(events, "mapped", gguf.get_tensor_name_map))
    monkeypatch.setattr(
        core_model_loading, "set_param_for_module", _noted(events, "placed", core_model_loading.set_param_for_module)
    )
    quantization = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, quantization_config=quantization)
    return events


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="transformers unpacks a GGUF file before it places a weight")
def test_transformers_unpacks_a_tensor_when_its_turn_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = _unpacking(monkeypatch, save_tiny_gguf(tmp_path / "tiny.gguf"))
    assert events == ["mapped"] + ["unpacked", "placed"] * (len(events) // 2)


def test_ours_unpacks_a_tensor_when_its_turn_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf")

    def unpack(tensor: Any) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    with gguf_weights(unpack, lambda tensor: None), weights_placed(lambda model, value: value):
        events = _unpacking(monkeypatch, path)
    assert events == ["mapped"] + ["unpacked", "placed"] * (len(events) // 2) and len(events) > 20


# torch's pytrees


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="torch.utils._pytree is private")
def test_torch_has_a_public_module_of_pytrees() -> None:
    assert importlib.util.find_spec("torch.utils.pytree") is not None


def test_a_cache_is_taken_apart_into_its_tensors() -> None:
    model = tiny_model("llama", 0)
    register_cache_pytrees_for_model(getattr(model, "model", model))
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    cache.update(keys, keys + 1, 0)
    flat = torch.utils._pytree.tree_leaves(list(children(cache)))
    assert [tuple(leaf.shape) for leaf in flat if isinstance(leaf, torch.Tensor)] == [(1, 2, 3, 4)] * 2
