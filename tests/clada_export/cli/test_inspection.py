"""What `clada inspect` says of models and graphs, without an export."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from clada_export.cli import main
from clada_export.cli.inspection import inspect_model, inspect_onnx
from clada_export.cli.shown import say
from tests.tiny_models import export_tiny

Folder = Callable[[str], Path]


def _saved(kind: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    ir.save(export_tiny(kind, None), path, external_data="model.onnx.data")
    return path


@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
def test_a_graph(kind: str, tmp_path: Path) -> None:
    found = inspect_onnx(_saved(kind, tmp_path))
    assert [layer.rewritten for layer in found.layers] == [True, True]
    assert all((layer.hidden_size, layer.intermediate_size, layer.reason) == (64, 96, "") for layer in found.layers)
    assert found.layers[0].form.startswith({"phi3": "swiglu", "gpt2": "gelu_tanh"}[kind])
    assert ("biases" in found.layers[0].form) == (kind == "gpt2")
    assert found.notes[0].startswith("opset ")


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError(f"{self.name} was read")

    path = _saved("llama", tmp_path)
    # Small constants, like the exponent of a Pow, lie in the model file itself.
    monkeypatch.setattr(ir.ExternalTensor, "_load", refuse)
    assert len(inspect_onnx(path).layers) == 2


def test_a_model(model_folder: Folder) -> None:
    found = inspect_model(str(model_folder("llama")))
    assert [(layer.name, layer.rewritten, layer.form) for layer in found.layers] == [
        (f"model.layers.{index}.mlp.down_proj", True, "silu, gated") for index in (0, 1)
    ]


def test_a_traced_model(model_folder: Folder, kept_traces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect_model(str(model_folder("opt")), traced=True)
    assert [layer.rewritten for layer in found.layers] == [True, True]
    assert found.layers[0].form.startswith("relu, float")


def test_a_mixture_says_why_not(model_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_folder("mixtral"))]) == 0
    shown = capsys.readouterr().out
    assert "0 would be rewritten, 2 would be left dense" in shown
    assert "mixture of experts" in shown


def test_the_command_on_a_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _saved("gpt2", tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 would be rewritten, 0 would be left dense" in shown and "[✓] transformer.h.1.mlp.c_proj" in shown
    assert main(["inspect", str(path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 2
    path.write_bytes(path.read_bytes()[:-40])
    assert main(["inspect", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_an_opset_that_is_too_old_is_said(tmp_path: Path) -> None:
    path = _saved("gpt2", tmp_path)
    model = ir.load(path)
    model.graph.opset_imports[""] = 14
    ir.save(model, tmp_path / "old.onnx")
    assert any("opset 14" in note and "can't be rewritten" in note for note in inspect_onnx(tmp_path / "old.onnx").notes)


@pytest.mark.parametrize("trace", [[], ["--trace"]])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("pipe", os.mkfifo),
        ("pipe.onnx", os.mkfifo),
        ("pipe.gguf", os.mkfifo),
        ("loop", lambda path: path.symlink_to(path)),
        ("loop.onnx", lambda path: path.symlink_to(path)),
        ("gone", lambda path: path.symlink_to("/nowhere")),
        ("zero", lambda path: path.symlink_to("/dev/zero")),
        ("zero.onnx", lambda path: path.symlink_to("/dev/zero")),
        ("empty", Path.mkdir),
        ("folder.onnx", Path.mkdir),
        ("junk", lambda path: path.write_bytes(bytes(range(256)))),
        ("junk.onnx", lambda path: path.write_bytes(bytes(range(256)))),
        ("junk.gguf", lambda path: path.write_bytes(b"GGUF" + bytes(range(256)))),
    ],
)
def test_places_that_hold_nothing_to_inspect(
    name: str, make: Callable[[Path], object], trace: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    assert main(["inspect", str(tmp_path / name), "--local-files-only", *trace]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clada.json", "config.json", "model.onnx"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev/zero"), Path.mkdir],
    ids=["pipe", "loop", "device", "folder"],
)
def test_folders_whose_file_is_none(
    name: str, make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / name)
    assert main(["inspect", str(tmp_path), "--local-files-only"]) == 2
    assert f"{tmp_path / name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "a\0b", "\udcff", "org/" + "x" * 300, "a/b/c"])
def test_names_that_are_no_place(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--local-files-only"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_control_characters_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say("layer \x1b[2J\x9b1m\u202e\n✓ ü")
    assert capsys.readouterr().out == "layer \\x1b[2J\\x9b1m\\u202e\\n✓ ü\n"
