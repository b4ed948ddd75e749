"""What surrounds TensorRT's calls: the missing library name, messages, plugins, and errors that name the cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from clada_export.artifact.manifest import TensorSpec
from clada_export.artifact.profiles import make_profiles
from clada_export.errors import BackendError, UnsupportedModelError, UsageError
from clada_export.native import tensorrt as module
from clada_export.native.library import ort_library_path
from clada_export.native.tensorrt import Backend, Messages, find_backend, load_backend, load_plugin, make_logger, missing_gpu
from clada_export.targets.options import TensorRTOptions
from clada_export.targets.trt.build import _read_timing_cache, _write_atomically, build_engines, check_settings
from clada_export.targets.trt.commands import commands
from graph_passes.function_body import PLUGIN_ATTRIBUTES
from graph_passes.op import DOMAIN

INPUTS = (TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),)


@pytest.fixture(scope="module")
def rtx() -> Backend:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return load_backend(module.RTX)


def write_graph(path: Path, op_type: str = "Cast", domain: str = "", **attributes: Any) -> Path:
    """input_ids through one node to y."""
    node = helper.make_node(op_type, ["input_ids"], ["y"], name="the.node", domain=domain, **attributes)
    source = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])
    target = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    imports = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [source], [target]), opset_imports=imports, ir_version=10), path)
    return path


def build(backend: Backend, model: Path, out: Path, **changes: Any) -> Any:
    settings = TensorRTOptions(compute_capabilities=("8.9",), **changes)
    profiles = make_profiles(1, None, None, 64)
    return build_engines(backend, model, INPUTS, profiles, settings, None, out, lambda what, done, total: None)


# --- the missing name of the library ---


def test_the_parser_finds_its_library(rtx: Backend) -> None:
    assert module._can_open("libtensorrt_rtx.so")
    module.provide_rtx_library()


def test_it_is_found_in_a_new_process_and_no_file_is_written(rtx: Backend) -> None:
    code = (
        "import tensorrt_rtx, tensorrt_rtx_libs, pathlib, clada_export.native.tensorrt as b;"
        "folder = pathlib.Path(tensorrt_rtx_libs.__file__).parent; before = sorted(folder.iterdir());"
        "print(b._can_open('libtensorrt_rtx.so')); b.provide_rtx_library();"
        "print(b._can_open('libtensorrt_rtx.so'), sorted(folder.iterdir()) == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["True", "True"]


def test_it_is_found_where_memory_holds_no_libraries(rtx: Backend) -> None:
    code = (
        "import os, tensorrt_rtx, clada_export.native.tensorrt as b\n"
        "def refuse(name, flags): raise OSError(13, 'Permission denied')\n"
        "os.memfd_create = refuse\n"
        "b.provide_rtx_library()\n"
        "print(b._can_open('libtensorrt_rtx.so'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_it_says_what_to_link_where_nothing_can_be_loaded(rtx: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: bytes, name: str) -> Path:
        raise OSError("not permitted")

    monkeypatch.setattr(module, "_can_open", lambda name: False)
    monkeypatch.setattr(module, "sealed_copy", refuse)
    with pytest.raises(BackendError, match=r"not permitted.*ln -s libtensorrt_rtx\.so\.1 .*tensorrt_rtx_libs/"):
        module.provide_rtx_library()


# --- which TensorRT ---


def test_neither_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install 'clada-export\[rtx\]' .* or pip install 'clada-export\[trt\]'"):
        find_backend()


def test_the_classic_one_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "tensorrt" else None)
    monkeypatch.setattr(module, "missing_gpu", lambda: "no GPU")
    with pytest.raises(BackendError, match=r"builds only where the GPU is \(no GPU\).*clada-export\[rtx\]"):
        find_backend()
    loaded: list[str] = []
    monkeypatch.setattr(module, "missing_gpu", lambda: None)
    monkeypatch.setattr(module, "load_backend", loaded.append)
    find_backend()
    assert loaded == ["tensorrt"]


def test_one_that_can_not_be_imported() -> None:
    with pytest.raises(BackendError, match="nothing_like_it can't be imported"):
        module.EXTRAS["nothing_like_it"] = "x"
        try:
            load_backend("nothing_like_it")
        finally:
            del module.EXTRAS["nothing_like_it"]


# --- messages ---


def test_errors_are_kept_and_nothing_is_raised_through_the_logger(rtx: Backend, caplog: pytest.LogCaptureFixture) -> None:
    messages = Messages()
    logger = make_logger(rtx.trt, messages)
    logger.log(rtx.trt.ILogger.ERROR, "one\n two")
    logger.log(rtx.trt.ILogger.ERROR, "one\n two")
    logger.log(rtx.trt.ILogger.WARNING, "careful")
    assert messages.take() == "one two"
    assert messages.take() == ""
    assert "careful" in caplog.text and "one" not in caplog.text
    messages.errors = SimpleNamespace(append=lambda text: (_ for _ in ()).throw(KeyboardInterrupt()))  # type: ignore[assignment]
    logger.log(rtx.trt.ILogger.ERROR, "now")
    with pytest.raises(KeyboardInterrupt):
        messages.raise_interrupt()
    messages.raise_interrupt()


def test_ctrl_c_cancels_a_build(rtx: Backend, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    model = write_graph(tmp_path / "m.onnx", to=1)
    settings = TensorRTOptions(compute_capabilities=("8.9",))
    with pytest.raises(KeyboardInterrupt):
        build_engines(rtx, model, INPUTS, make_profiles(1, None, None, 64), settings, None, tmp_path, interrupt)
    assert not (tmp_path / "model.engine").exists()


# --- builds ---


def test_a_small_engine(rtx: Backend, tmp_path: Path) -> None:
    steps: list[str] = []
    model = write_graph(tmp_path / "m.onnx", to=1)
    settings = TensorRTOptions()
    made = build_engines(
        rtx,
        model,
        INPUTS,
        make_profiles(1, None, None, 64),
        settings,
        None,
        tmp_path,
        lambda what, done, total: steps.append(what),
    )
    assert [file.file for file in made.files] == ["model.engine"]
    assert made.files[0].compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert made.files[0].bytes == (tmp_path / "model.engine").stat().st_size > 0
    assert ("the.node", "CAST") in made.layers
    assert "Building engine" in steps


def test_a_node_that_tensorrt_does_not_know(rtx: Backend, tmp_path: Path) -> None:
    model = write_graph(tmp_path / "m.onnx", "Nonsense", "com.nobody")
    with pytest.raises(UnsupportedModelError, match=r"can't import the graph: node Nonsense of 'the\.node'.*[Pp]lugin"):
        build(rtx, model, tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"\x01\x02")
    with pytest.raises(UnsupportedModelError, match="can't import the graph"):
        build(rtx, tmp_path / "m.onnx", tmp_path)


def test_a_graph_that_needs_an_input_on_the_host(rtx: Backend, tmp_path: Path) -> None:
    source = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [2])
    data = helper.make_tensor("data", TensorProto.FLOAT, [6], [0.0] * 6)
    node = helper.make_node("Reshape", ["data", "input_ids"], ["y"], name="the.node")
    target = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    graph = helper.make_graph([node], "g", [source], [target], [data])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="computes shapes from the values of input 'input_ids'"):
        build(rtx, tmp_path / "m.onnx", tmp_path)


def test_a_build_that_fails_says_why(rtx: Backend, tmp_path: Path) -> None:
    model = write_graph(tmp_path / "m.onnx", to=1)
    with pytest.raises(BackendError, match=r"can't build an engine: .*[Pp]rofile"):
        build_engines(rtx, model, INPUTS, (), TensorRTOptions(), None, tmp_path, lambda what, done, total: None)


def test_settings_that_this_tensorrt_does_not_have(rtx: Backend, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--compute-capability 9\.0: TensorRT-RTX .* builds for 7\.5, 8\.0, .* 12\.1 and no"):
        check_settings(rtx, TensorRTOptions(compute_capabilities=("9.0",)))
    assert "no effect" in check_settings(rtx, TensorRTOptions(timing_cache=tmp_path / "cache"))[0]
    if missing_gpu() is not None:
        with pytest.raises(BackendError, match=r"--refit: .*for the GPU at hand"):
            check_settings(rtx, TensorRTOptions(refit=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_batch": 0}, "--max-batch 0 is out of range"),
        ({"max_past": -1}, "--max-past -1 is out of range"),
        ({"compute_capabilities": ()}, "at least one"),
        ({"compute_capabilities": ("sm_89",)}, "'sm_89' is not one"),
        ({"compute_capabilities": ("8.9", "8.9")}, "names one twice"),
        ({"plugin": False, "embed_plugin": True}, "exclude each other"),
        ({"timing_cache": Path("/does/not/exist/cache")}, "does not exist"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TensorRTOptions(**change).check()


# --- plugins ---


def test_a_library_without_the_plugin(rtx: Backend, tmp_path: Path) -> None:
    registry = SimpleNamespace(
        get_creator=lambda *names: None,
        load_library=lambda path: None,
        all_creators=[SimpleNamespace(name="SparseFFN", plugin_version="2", plugin_namespace="com.other")],
    )
    (tmp_path / "lib.so").write_bytes(b"")
    with pytest.raises(BackendError, match=r"no plugin com\.clada::SparseFFN version 1 .*com\.other::SparseFFN version 2"):
        load_plugin(rtx, registry, tmp_path / "lib.so")
    with pytest.raises(BackendError, match="plugin library is missing"):
        load_plugin(rtx, registry, tmp_path / "nothing.so")


def test_a_library_of_something_else(rtx: Backend) -> None:
    registry = rtx.trt.Builder(rtx.logger).get_plugin_registry()
    if module.plugin_creator(registry) is not None:
        pytest.skip("the plugin is registered in this process already")
    with pytest.raises(BackendError, match=r"finds no plugin com\.clada::SparseFFN version 1"):
        load_plugin(rtx, registry, ort_library_path())


def test_a_plugin_that_is_there_already(rtx: Backend, tmp_path: Path) -> None:
    registry = SimpleNamespace(get_creator=lambda *names: object(), load_library=pytest.fail)
    load_plugin(rtx, registry, tmp_path / "nothing.so")


# --- commands ---


def test_the_nodes_ask_for_this_version() -> None:
    assert PLUGIN_ATTRIBUTES == {"plugin_namespace": DOMAIN, "plugin_version": module.PLUGIN_VERSION}


def test_running_imports_neither_torch_nor_the_compiler() -> None:
    code = (
        "import sys, clada_export.runtime.tensorrt_session;"
        "print([m for m in ('torch', 'transformers', 'onnx_ir', 'onnxruntime', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("fits", [True, False])
def test_the_timing_cache_of_classic_tensorrt(fits: bool, tmp_path: Path) -> None:
    """A cache of another version or GPU is refused by TensorRT, and a new one takes its place."""
    made: list[bytes] = []

    def create(content: bytes) -> bytes:
        made.append(content)
        return content

    config = SimpleNamespace(create_timing_cache=create, set_timing_cache=lambda cache, ignore_mismatch: fits or cache == b"")
    backend = Backend("tensorrt", "10.14.1", None, None, Messages())
    (tmp_path / "cache").write_bytes(b"old")
    assert _read_timing_cache(backend, config, tmp_path / "cache") == (b"old" if fits else b"")
    assert made == ([b"old"] if fits else [b"old", b""])
    assert _read_timing_cache(backend, config, tmp_path / "none") == b""
    with pytest.raises(UsageError, match="can't be read"):
        _read_timing_cache(backend, SimpleNamespace(), _Unreadable())
    _write_atomically(tmp_path / "cache", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and (tmp_path / "cache").read_bytes() == b"new"


class _Unreadable:
    def is_file(self) -> bool:
        return True

    def read_bytes(self) -> bytes:
        raise PermissionError(13, "Permission denied")


def test_commands_load_the_plugin() -> None:
    record: dict[str, Any] = {
        "backend": "tensorrt_rtx",
        "files": [{"file": "model.engine"}],
        "plugin": {"file": "libclada_trt.so", "embedded": False},
    }
    profiles = make_profiles(1, None, None, 64)
    made = commands(record, INPUTS, profiles)
    assert made["tensorrt_rtx"].startswith("tensorrt_rtx --loadEngine=model.engine --dynamicPlugins=./libclada_trt.so")
    assert "--shapes=input_ids:1x1" in made["tensorrt_rtx"]
    assert "load_library('./libclada_trt.so')" in made["polygraphy"]
    assert made["polygraphy"].startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 ")
    record |= {"backend": "tensorrt", "plugin": {"file": "libclada_trt.so", "embedded": True}}
    made = commands(record, INPUTS, profiles)
    assert "Plugins" not in made["trtexec"]
    assert made["polygraphy"].startswith("polygraphy run")
