"""ONNX models of strangers, and the files beside them."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from clada_export.cli.inspection import inspect_onnx
from clada_export.errors import CladaError, UnsupportedModelError, UsageError
from clada_export.source.onnx.graph import compilable_ffns, load_graph
from clada_export.source.onnx.growth import SPARE_ELEMENTS
from clada_export.source.onnx.load import load_decoder
from graph_passes import find_ffns, rewrite_ffns
from graph_passes.load_outputs import AddLoadOutputs
from graph_passes.op import SparseFFNAttributes
from graph_passes.reshapes import RemoveHeadReshapes
from graph_passes.rewrite import FFNRewrite
from tests.fuzz.grown import grown_model
from tests.fuzz.harness import JSON_VALUES, damaged, fuzz, hold, mutated
from tests.fuzz.messages import changed_message
from tests.fuzz.small_decoder import small_decoder
from tests.graph_passes.handmade import scale_by_norm
from tests.tiny_models import tiny_config

Change = Callable[[onnx.ModelProto], object]


@functools.cache
def _small() -> bytes:
    return small_decoder().SerializeToString()


def _fresh() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(_small())


def _config() -> dict[str, Any]:
    return {**tiny_config("llama").to_dict(), "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4}


def _put(folder: Path, model: bytes, files: dict[str, Any]) -> Path:
    for name in ("config.json", "genai_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "model.onnx").write_bytes(model)
    return folder / "model.onnx"


# --- What was found


def _named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _add(model: onnx.ModelProto, operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    model.graph.node.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
    return model.graph.node[-1]


def _constant(model: onnx.ModelProto, name: str, value: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def _weight(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _doubling(model: onnx.ModelProto, count: int = 30, called: bool = True) -> None:
    """Functions that each call the one before twice."""
    for index in range(count):
        before = f"f{index - 1}" if index else "Neg"
        domain = "local" if index else ""
        nodes = [helper.make_node(before, [name], [result], domain=domain) for name, result in (("x", "t"), ("t", "y"))]
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", f"f{index}", ["x"], ["y"], nodes, imports))
    if called:
        _add(model, f"f{count - 1}", ["h"], "doubled", domain="local")


def _recursive(model: onnx.ModelProto) -> None:
    _doubling(model, 3)
    model.functions[-3].node[0].domain, model.functions[-3].node[0].op_type = "local", "f2"


def _cycle(model: onnx.ModelProto) -> None:
    _named(model, "attend").input[0] = "d"


def _cycle_through_a_body(model: onnx.ModelProto) -> None:
    _named(model, "choice").attribute[0].g.node[0].input[0] = "p"


def _cycle_in_a_body(model: onnx.ModelProto) -> None:
    body = _named(model, "choice").attribute[0].g
    body.node[0].input[0] = "again"
    body.node.append(helper.make_node("Neg", ["t"], ["again"]))


def _huge(operator: str, constants: dict[str, Any], inputs: list[str], **attributes: Any) -> Change:
    """A node whose constants make its result huge, and one that reads it."""

    def change(model: onnx.ModelProto) -> None:
        for name, value in constants.items():
            _constant(model, name, value)
        _add(model, operator, inputs, "huge", **attributes)
        _add(model, "ReduceMax", ["huge"], "largest", keepdims=0)

    return change


def _doubled_list(model: onnx.ModelProto) -> None:
    _add(model, "Shape", ["h"], "s0", start=0, end=1)
    for index in range(40):
        _add(model, "Concat", [f"s{index}"] * 2, f"s{index + 1}", axis=0)


def _doubled_name(model: onnx.ModelProto) -> None:
    _add(model, "Shape", ["h"], "s0", start=0, end=1)
    for index in range(40):
        _add(model, "Add", [f"s{index}"] * 2, f"s{index + 1}")


def _pieces(model: onnx.ModelProto) -> None:
    _constant(model, "one", np.int64(1))
    _constant(model, "target", np.array([10**9]))
    _add(model, "Expand", ["one", "target"], "long")
    _add(model, "SplitToSequence", ["long", "one"], "pieces")


def _many_inputs(model: onnx.ModelProto) -> None:
    _add(model, "Sum", ["h"] * 20_000, "sum")


def _unknown(model: onnx.ModelProto) -> None:
    node = _named(model, "up")
    node.op_type = "FusedMatMul"
    del node.input[1]


def _dims(name: str, *dims: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        _weight(model, name).dims[:] = dims

    return change


def _external(**entries: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = _weight(model, "down")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def _set(change: Callable[[onnx.ModelProto], object]) -> Change:
    return lambda model: (change(model), None)[1]


def _axis(which: str, index: int, axis: int, **size: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        dim = getattr(model.graph, which)[index].type.tensor_type.shape.dim[axis]
        dim.Clear()
        for key, value in size.items():
            setattr(dim, key, value)

    return change


CASES: list[tuple[str, Change, type[CladaError], tuple[str, ...]]] = [
    ("thirty functions that call the one before twice", _doubling, UnsupportedModelError, ("2.15e+09 nodes", "'f0'")),
    ("the same, called by nobody", lambda m: _doubling(m, 30, called=False), UnsupportedModelError, ("'f0'",)),
    ("two thousand of them", lambda m: _doubling(m, 2000), UnsupportedModelError, ("nodes", "function")),
    ("functions that call each other", _recursive, UsageError, ("calls itself", "'f0'", "'f2'")),
    ("a cycle", _cycle, UsageError, ("cycle", "MatMul 'gate'")),
    ("a cycle through a body", _cycle_through_a_body, UsageError, ("cycle", "If 'choice'")),
    ("a cycle in a body", _cycle_in_a_body, UsageError, ("a body of If 'choice'", "cycle")),
    ("very many inputs", _many_inputs, UnsupportedModelError, ("very many inputs",)),
    ("a list that doubles", _doubled_list, UnsupportedModelError, ("Concat 's17'", "sizes")),
    ("a sum that doubles", _doubled_name, UnsupportedModelError, ("Add 's", "names")),
    ("pieces of a long value", _pieces, UnsupportedModelError, ("1000000000 pieces",)),
    (
        "Expand",
        _huge("Expand", {"one": np.float32(1), "target": np.array([10**12])}, ["one", "target"]),
        UnsupportedModelError,
        ("Expand 'huge'", "[1000000000000]"),
    ),
    (
        "Tile",
        _huge("Tile", {"one": np.ones(8, np.float32), "times": np.array([10**11])}, ["one", "times"]),
        UnsupportedModelError,
        ("Tile 'huge'", "[800000000000]"),
    ),
    (
        "ConstantOfShape",
        _huge("ConstantOfShape", {"target": np.array([10**6, 10**6])}, ["target"]),
        UnsupportedModelError,
        ("ConstantOfShape 'huge'",),
    ),
    (
        "Range",
        _huge("Range", {"from": np.int64(0), "to": np.int64(10**10), "step": np.int64(1)}, ["from", "to", "step"]),
        UnsupportedModelError,
        ("Range 'huge'",),
    ),
    (
        "Pad",
        _huge("Pad", {"one": np.ones(8, np.float32), "by": np.array([0, 10**11])}, ["one", "by"]),
        UnsupportedModelError,
        ("Pad 'huge'",),
    ),
    (
        "OneHot",
        _huge(
            "OneHot",
            {"at": np.array([1]), "depth": np.int64(10**11), "either": np.array([0, 1], np.float32)},
            ["at", "depth", "either"],
        ),
        UnsupportedModelError,
        ("OneHot 'huge'",),
    ),
    ("no opset", _set(lambda m: m.opset_import.__delitem__(0)), UsageError, ("imports no opset",)),
    ("opset 0", _set(lambda m: setattr(m.opset_import[0], "version", 0)), UsageError, ("version 0",)),
    ("opset 10^6", _set(lambda m: setattr(m.opset_import[0], "version", 10**6)), UsageError, ("opset 1000000",)),
    ("an opset twice", _set(lambda m: m.opset_import.add(domain="ai.onnx", version=20)), UsageError, ("twice",)),
    ("no IR version", _set(lambda m: m.ClearField("ir_version")), UsageError, ("ir_version is 0",)),
    ("IR version 10^9", _set(lambda m: setattr(m, "ir_version", 10**9)), UsageError, ("ir_version is 1000000000",)),
    ("no nodes", _set(lambda m: m.graph.ClearField("node")), UsageError, ("no nodes",)),
    ("a node without outputs", _set(lambda m: _named(m, "head").ClearField("output")), UsageError, ("no outputs",)),
    ("a node without an operator", _set(lambda m: _named(m, "head").ClearField("op_type")), UsageError, ("no operator",)),
    ("a missing input", _set(lambda m: _named(m, "up").ClearField("input")), UsageError, ("MatMul 'up'", "input size 0")),
    ("an empty input", _set(lambda m: _named(m, "up").input.__setitem__(1, "")), UsageError, ("MatMul 'up'",)),
    ("an undefined input", _set(lambda m: _named(m, "up").input.__setitem__(1, "q")), UsageError, ("reads 'q'", "'up'")),
    ("a name twice", _set(lambda m: _named(m, "up").output.__setitem__(0, "g")), UsageError, ("defines 'g' twice", "'up'")),
    (
        "an output that is not made",
        _set(lambda m: m.graph.output.add(name="q", type=m.graph.output[0].type)),
        UsageError,
        ("'q'",),
    ),
    ("an output without a type", _set(lambda m: m.graph.output[0].ClearField("type")), UsageError, ("'logits'", "type")),
    (
        "an attribute of another type",
        _set(lambda m: _named(m, "cache_k").attribute[0].CopyFrom(helper.make_attribute("axis", "two"))),
        UsageError,
        ("Concat 'cache_k'", "axis", "STRING"),
    ),
    (
        "an attribute twice",
        _set(lambda m: _named(m, "mask").attribute.add(name="to", i=1, type=2)),
        UsageError,
        ("two attributes",),
    ),
    (
        "a type that there is none of",
        _set(lambda m: setattr(_named(m, "mask").attribute[0], "i", 999)),
        UsageError,
        ("'mask'",),
    ),
    (
        "an attribute of a function, in none",
        _set(lambda m: _named(m, "mask").attribute[0].CopyFrom(onnx.AttributeProto(name="to", ref_attr_name="x", type=2))),
        UsageError,
        ("refers to one of a function",),
    ),
    ("an unknown domain", _set(lambda m: setattr(_named(m, "up"), "domain", "com.evil")), UsageError, ("'com.evil'",)),
    (
        "a call with too much",
        _set(lambda m: _named(m, "activation").input.append("h")),
        UsageError,
        ("function 'silu'", "2 inputs"),
    ),
    ("a call with too little", _set(lambda m: _named(m, "activation").ClearField("input")), UsageError, ("lacks its input",)),
    ("a function twice", _set(lambda m: m.functions.add().CopyFrom(m.functions[0])), UsageError, ("two functions 'silu'",)),
    ("negative sizes", _dims("down", -16, -8), UsageError, ("'down'", "[-16, -8]")),
    ("sizes beyond 64 bits", _dims("down", 2**40, 2**40), UsageError, ("'down'", "no tensor can have")),
    ("sizes beside nothing", _dims("down", 2**62, 0), UsageError, ("'down'", "no tensor can have")),
    ("very many axes", _dims("down", *[1] * 40), UsageError, ("'down'", "40 axes")),
    ("too few bytes", _dims("down", 16, 9), UsageError, ("'down'", "512 bytes", "576")),
    ("a tensor of no type", _set(lambda m: setattr(_weight(m, "down"), "data_type", 0)), UsageError, ("'down'", "no type")),
    ("a tensor of type 77", _set(lambda m: setattr(_weight(m, "down"), "data_type", 77)), UsageError, ("'down'", "77")),
    ("numbers in the wrong field", _set(lambda m: _weight(m, "down").int64_data.append(1)), UsageError, ("'down'", "twice")),
    ("text as bytes", _set(lambda m: setattr(_weight(m, "down"), "data_type", 8)), UsageError, ("'down'", "text")),
    ("a weight without a name", _set(lambda m: _weight(m, "down").ClearField("name")), UsageError, ("without a name",)),
    ("two weights of one name", _set(lambda m: setattr(_weight(m, "down"), "name", "up")), UsageError, ("'up'",)),
    (
        "a sparse weight",
        _set(lambda m: m.graph.sparse_initializer.add().dims.append(10**12)),
        UnsupportedModelError,
        ("sparse",),
    ),
    ("weights in a device", _external(location="zero"), UsageError, ("'down'", "symbolic link")),
    ("weights in a pipe", _external(location="pipe"), UsageError, ("'down'", "no such file")),
    ("weights in a folder", _external(location="."), UsageError, ("'down'",)),
    ("weights nowhere", _external(), UsageError, ("'down'", "not a path")),
    ("weights in a long name", _external(location="a" * 5000), UsageError, ("'down'", "too long")),
    ("weights in a name with NUL", _external(location="a\0b"), UsageError, ("'down'", "not a path")),
    ("weights far off", _external(location="data", offset=str(2**62)), UsageError, ("'down'", "the file has 600")),
    ("weights before the start", _external(location="data", offset="-8"), UsageError, ("'down'", "offset '-8'")),
    ("weights at a word", _external(location="data", offset="x"), UsageError, ("'down'", "offset 'x'")),
    ("weights of another length", _external(location="data", length="9"), UsageError, ("'down'", "9 bytes")),
    ("a negative axis", _axis("input", 0, 0, dim_value=-1), UsageError, ("'input_ids'", "-1")),
    ("an axis of 10^18", _axis("output", 0, 2, dim_value=10**18), UsageError, ("'logits'", "1000000000000000000")),
    ("an axis with a long name", _axis("input", 0, 0, dim_param="a" * 10**6), UsageError, ("'input_ids'",)),
    ("an axis that is a long number", _axis("input", 2, 1, dim_param="9" * 100), UsageError, ("past_key_values.0.key",)),
    ("a vocabulary of 10^9", _axis("output", 0, 2, dim_value=10**9), UnsupportedModelError, ("'logits'", "1000000000")),
    ("heads of 10^9", _axis("input", 2, 3, dim_value=10**9), UnsupportedModelError, ("past_key_values.0.key",)),
    (
        "logits of integers",
        _set(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 7)),
        UnsupportedModelError,
        ("",),
    ),
    (
        "a cache of text",
        _set(lambda m: setattr(m.graph.input[3].type.tensor_type, "elem_type", 8)),
        UnsupportedModelError,
        ("past_key_values.0.value",),
    ),
    ("a cache that is not handed on", _set(lambda m: m.graph.output.__delitem__(2)), UnsupportedModelError, ("pass on",)),
]


@pytest.mark.parametrize(("change", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_models_that_are_refused(tmp_path: Path, change: Change, error: type[CladaError], words: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "data").write_bytes(bytes(600))
    model = _fresh()
    change(model)
    path = _put(tmp_path, model.SerializeToString(), {})
    found = hold(lambda: load_decoder(path))
    assert type(found) is error, found
    for word in (str(path), *words):
        assert word in str(found)


def test_the_model_that_all_of_them_are_made_of(tmp_path: Path) -> None:
    decoder = load_decoder(_put(tmp_path, _small(), {"config.json": _CONFIG}))
    assert [ffn.name for ffn in decoder.ffns] == ["down"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config.json", {"model_type": "nonsense"}, "nonsense"),
        ("config.json", {**_config(), "vocab_size": 10**9}, "vocab_size is 1000000000"),
        ("config.json", {**_config(), "vocab_size": -1}, "vocab_size"),
        ("config.json", {**_config(), "vocab_size": "many"}, "config.json"),
        ("config.json", {**_config(), "head_dim": 10**9}, "head_dim is 1000000000"),
        ("config.json", [], "a JSON object is wanted"),
        ("genai_config.json", {"model": {"decoder": {"head_size": -4}}}, "head_size is -4"),
        ("genai_config.json", {"model": {"decoder": {"head_size": 10**12}}}, "head_size is 1000000000000"),
        ("generation_config.json", {"cache_implementation": "nonsense"}, "nonsense"),
        ("generation_config.json", {"max_new_tokens": -1}, "max_new_tokens"),
        ("generation_config.json", 3, "generation_config.json"),
    ],
)
def test_files_beside_the_model(tmp_path: Path, name: str, value: Any, words: str) -> None:
    path = _put(tmp_path, _small(), {name: value})
    found = hold(lambda: load_decoder(path))
    assert type(found) is UsageError
    assert str(tmp_path / name) in str(found) and words in str(found)


def test_models_that_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for make, words in (
        (lambda: os.mkfifo(path), "not a regular file"),
        (lambda: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: path.symlink_to("nowhere"), "No such file"),
        (lambda: path.write_bytes(b""), "no nodes"),
        (lambda: os.truncate(path.open("wb").name, 3 << 30), "2 GB at most"),
    ):
        path.unlink(missing_ok=True)
        make()
        found = hold(lambda: load_graph(path))
        assert type(found) is UsageError
        assert str(path) in str(found) and words in str(found)


def test_text_that_is_none(tmp_path: Path) -> None:
    path = _put(tmp_path, _small().replace(b"embedding", b"embedd\xffng"), {})
    found = hold(lambda: load_graph(path))
    assert type(found) is UsageError and "UTF-8" in str(found)


def test_bodies_in_bodies_without_end(tmp_path: Path) -> None:
    data = b""
    for _ in range(300):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            data = bytes([field << 3 | 2]) + _varint(len(data)) + data
    path = _put(tmp_path, bytes([7 << 3 | 2]) + _varint(len(data)) + data, {})
    found = hold(lambda: load_graph(path))
    assert type(found) is UsageError and "damaged, or no ONNX model" in str(found)


def _varint(number: int) -> bytes:
    """A varint."""
    low, rest = number & 127, number >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + _varint(rest)


def _chain(operator: str, first: str, **attributes: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for index in range(3000):
            _add(model, operator, [f"c{index - 1}" if index else first], f"c{index}", **attributes)
        _named(model, "down").input[0 if first != "down" else 1] = "c2999"

    return change


def _constants_of_other_kinds(model: onnx.ModelProto) -> None:
    """Types are none of the schema's business: a Slice from NaN, a Reshape to text."""
    _constant(model, "nan", np.array([np.nan], np.float32))
    _constant(model, "text", np.array(["a"]))
    for index, (start, end) in enumerate((("nan", "nan"), ("text", "text"), ("nan", "text"))):
        _add(model, "Slice", ["p", start, end, "nan"], f"part{index}")
        _add(model, "MatMul", [f"part{index}", "down"], f"product{index}")
        _add(model, "Reshape", ["p", start], f"shaped{index}")
        _add(model, "Shape", [f"shaped{index}"], f"shape{index}")
        _add(model, "Split", ["g", start], f"split{index}")
        _add(model, "MatMul", [f"split{index}", "down"], f"more{index}")
    _add(model, "Transpose", ["c"], "turned", perm=[7, 9])
    _add(model, "Transpose", ["turned"], "twice", perm=[1, 0])


def _pairs(model: onnx.ModelProto) -> None:
    _add(model, "Shape", ["h"], "c-1")
    for index in range(200):
        _add(model, "Concat", [f"c{index - 1}", "c-1"], f"c{index}", axis=0)
        _add(model, "Slice", [f"c{index}", "zero", "three"], f"d{index}")
    _constant(model, "zero", np.array([0]))
    _constant(model, "three", np.array([3]))


def _scales(model: onnx.ModelProto) -> None:
    """Scales of scales: each looked at three times by who looks at the next."""
    _constant(model, "level", np.uint8(3))
    _constant(model, "s0", np.float32(1))
    for index in range(60):
        _add(model, "DequantizeLinear", ["level", f"s{index}"], f"s{index + 1}")
    _add(model, "Mul", ["p", "s60"], "scaled")
    _named(model, "down").input[0] = "scaled"


def _rewritten(path: Path) -> None:
    """What an export does to a graph."""
    model = load_graph(path)
    matches = compilable_ffns(find_ffns(model)).matches
    attributes, threshold = SparseFFNAttributes(score="exact"), np.zeros(1, np.float32)
    rewrite_ffns(model, {match.name: FFNRewrite(attributes, threshold, scale_by_norm) for match in matches})
    RemoveHeadReshapes()(model)
    AddLoadOutputs()(model)
    ir.to_proto(model)


@pytest.mark.parametrize(
    "change",
    [
        _chain("Relu", "p"),
        _chain("Identity", "p"),
        _chain("Cast", "p", to=1),
        _chain("Transpose", "down", perm=[1, 0]),
        _pairs,
        _scales,
        _constants_of_other_kinds,
        lambda model: [_add(model, "silu", ["h"], f"c{index}", domain="local") for index in range(2000)],
    ],
    ids=["relu", "identity", "cast", "transpose", "concat", "scales", "kinds", "calls"],
)
def test_long_graphs_are_looked_at(tmp_path: Path, change: Change) -> None:
    """No recursion that ends at Python's limit, and nothing that takes quadratic time (the harness has ten seconds)."""
    model = _fresh()
    change(model)
    path = _put(tmp_path, model.SerializeToString(), {})
    assert hold(lambda: inspect_onnx(path)) is None
    assert hold(lambda: _rewritten(path)) is None


# --- Generated


def _bytes(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


_CHANGED = changed_message(_fresh).map(_bytes)
_GROWN = grown_model(_fresh).map(_bytes)
_MODELS = _CHANGED | _GROWN | changed_message(_fresh).map(_bytes) | st.builds(_small).flatmap(damaged)
_GENAI = {"model": {"decoder": {"head_size": 4, "num_attention_heads": 2}, "vocab_size": 32}}
_CONFIG = _config()
_GENERATION = {"eos_token_id": 2, "bos_token_id": 1, "temperature": 0.7, "do_sample": True, "max_length": 20}
_FILES = st.fixed_dictionaries(
    {},
    optional={
        "config.json": st.just(_CONFIG) | mutated(_CONFIG) | JSON_VALUES,
        "genai_config.json": mutated(_GENAI) | JSON_VALUES,
        "generation_config.json": mutated(_GENERATION) | JSON_VALUES,
    },
)


def test_graphs(tmp_path: Path) -> None:
    """Any model file, as far as the passes see it."""

    def check(model: bytes) -> None:
        path = _put(tmp_path, model, {})
        for error in (hold(lambda: _rewritten(path)), hold(lambda: inspect_onnx(path))):
            assert error is None or str(path) in str(error)

    assert fuzz("ONNX graph", _MODELS, check, chunk=50) > 0


@pytest.mark.parametrize("size", [2**27, 2**32])
@pytest.mark.parametrize("reader", ["Slice", "Gather"])
def test_sizes_cut_from_a_list_that_is_far_too_long(reader: str, size: int, tmp_path: Path) -> None:
    """Inference that follows values makes an entry for each number of the list: gigabytes, and minutes."""
    model = _fresh()
    _constant(model, "many", np.array([size]))
    _constant(model, "zero", np.array([0]))
    node = _add(model, "ConstantOfShape", ["many"], "list")
    node.attribute.append(helper.make_attribute("value", helper.make_tensor("zeros", TensorProto.INT64, [1], [0])))
    _add(model, reader, ["list", "zero", "zero"] if reader == "Slice" else ["list", "zero"], "cut")
    start = time.process_time()
    error = hold(lambda: load_graph(_put(tmp_path, model.SerializeToString(), {"config.json": _config()})))
    assert time.process_time() - start < 2.0
    assert error is None if size < SPARE_ELEMENTS else str(size) in str(error)


def test_decoders(tmp_path: Path) -> None:
    """Any model file with any files beside it, run by ONNX Runtime."""

    def check(case: tuple[bytes, dict[str, Any]]) -> None:
        path = _put(tmp_path, *case)
        error = hold(lambda: load_decoder(path))
        assert error is None or str(tmp_path) in str(error)

    assert fuzz("ONNX decoder", st.tuples(st.just(_small()) | _CHANGED | _GROWN, _FILES), check, chunk=20) > 0
