"""ONNX models from elsewhere: what is read, and what is refused before a weight is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import InlinePass

from clada_export.errors import UsageError
from clada_export.patches.onnx_ir_inlining import InlineFunctions
from clada_export.source.onnx.files import companions, is_onnx, locate_onnx, read_onnx
from tests.fuzz.small_decoder import small_decoder

WEIGHT = np.arange(64, dtype=np.float32).reshape(8, 8)


def _model(location: str | None = None, length: int | None = None, offset: int | None = None) -> onnx.ModelProto:
    """y = x w, with w inside the file, or in another one."""
    tensor = numpy_helper.from_array(WEIGHT, "w")
    if location is not None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", length), ("offset", offset)):
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "g", [x], [y], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def _write(folder: Path, model: onnx.ModelProto, data: bytes | None = WEIGHT.tobytes(), name: str = "w.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    if data is not None:
        (folder / name).write_bytes(data)
    return folder / "model.onnx"


def test_a_model_is_read_with_its_weights_left_on_disk(tmp_path: Path) -> None:
    path = _write(tmp_path, _model("w.bin", WEIGHT.nbytes, 0))
    tensor = read_onnx(path).graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_which_file_is_meant(tmp_path: Path) -> None:
    path = _write(tmp_path, _model())
    assert is_onnx(path) and is_onnx(tmp_path) and not is_onnx(tmp_path / "other.gguf")
    assert locate_onnx(tmp_path) == locate_onnx(path) == path
    (tmp_path / "other.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"2 ONNX models \(model.onnx, other.onnx\)"):
        locate_onnx(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_onnx(tmp_path)
    for missing in (tmp_path / "none.onnx", tmp_path / "none"):
        with pytest.raises(UsageError, match="neither a file nor a folder"):
            locate_onnx(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.onnx file"):
        locate_onnx(tmp_path / "empty")


def test_the_folder_of_the_hub_that_holds_onnx_models_beside_others(tmp_path: Path) -> None:
    path = _write(tmp_path / "onnx", _model())
    assert is_onnx(tmp_path) and locate_onnx(tmp_path) == path
    assert companions(path) == tmp_path / "onnx"
    (tmp_path / "config.json").write_text("{}")
    assert companions(path) == tmp_path
    (tmp_path / "onnx" / "model_q4.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"2 ONNX models \(onnx/model.onnx, onnx/model_q4.onnx\)"):
        locate_onnx(tmp_path)
    # A configuration of its own comes first, and so do safetensors.
    (tmp_path / "onnx" / "config.json").write_text("{}")
    assert companions(path) == tmp_path / "onnx"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_onnx(tmp_path)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/etc/hostname", "not a path inside"),
        ("../secret.bin", "not a path inside"),
        ("a/../../secret.bin", "not a path inside"),
        ("..\\secret.bin", "not a path inside"),
        ("C:\\secret.bin", "not a path inside"),
        ("missing.bin", "no such file"),
        ("folder", "no such file"),
    ],
)
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str, reason: str) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    path = _write(tmp_path / "model", _model(location, WEIGHT.nbytes, 0), None)
    (path.parent / "folder").mkdir()
    with pytest.raises(UsageError, match=reason) as caught:
        read_onnx(path)
    assert "'w'" in str(caught.value) and location.replace("\\", "\\\\") in str(caught.value)


@pytest.mark.parametrize("link", ["w.bin", "inner"])
def test_symbolic_links_are_refused(tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "w.bin").write_bytes(WEIGHT.tobytes())
    location = "w.bin" if link == "w.bin" else "inner/w.bin"
    path = _write(tmp_path / "model", _model(location, WEIGHT.nbytes, 0), None)
    (path.parent / link).symlink_to(outside / "w.bin" if link == "w.bin" else outside)
    with pytest.raises(UsageError, match="symbolic link"):
        read_onnx(path)


def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at bytes 0 to 256, and the file has 100"):
        read_onnx(_write(tmp_path / "a", _model("w.bin", WEIGHT.nbytes, 0), WEIGHT.tobytes()[:100]))
    with pytest.raises(UsageError, match="at bytes 8 to 264, and the file has 256"):
        read_onnx(_write(tmp_path / "b", _model("w.bin", WEIGHT.nbytes, 8)))
    with pytest.raises(UsageError, match="with 128 bytes; its shape and type need 256"):
        read_onnx(_write(tmp_path / "c", _model("w.bin", 128, 0)))


def test_weights_of_a_body_are_checked_too(tmp_path: Path) -> None:
    inner = _model("../secret.bin", WEIGHT.nbytes, 0).graph
    inner.ClearField("input")
    y = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["rows", 8])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 8])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    node = helper.make_node("If", ["flag"], ["z"], name="choice", then_branch=inner, else_branch=inner)
    graph = helper.make_graph([node], "outer", [x, flag], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(UsageError, match="not a path inside"):
        read_onnx(_write(tmp_path, model))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(_model().SerializeToString())
    if data.draw(st.booleans(), label="truncate"):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1), label="at")] ^= data.draw(st.integers(1, 255), label="bits")
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(bytes(whole))
    try:
        read_onnx(path)
    except UsageError as error:
        assert str(path) in str(error)


def test_functions_are_inlined_as_onnx_ir_does_it(tmp_path: Path) -> None:
    """Only faster: the names, by which layers are told, are the same."""
    model = small_decoder()
    model.graph.node.extend(helper.make_node("silu", ["h"], [f"more{index}"], domain="local") for index in range(20))
    mine, theirs = ir.from_proto(model), ir.from_proto(model)
    InlineFunctions()(mine)
    InlinePass()(theirs)
    assert ir.to_proto(mine).SerializeToString(deterministic=True) == ir.to_proto(theirs).SerializeToString(deterministic=True)


def test_hard_links_are_plain_files(tmp_path: Path) -> None:
    path = _write(tmp_path, _model("w.bin", WEIGHT.nbytes, 0))
    (tmp_path / "other.bin").hardlink_to(tmp_path / "w.bin")
    assert read_onnx(path).graph.initializers["w"].const_value is not None
