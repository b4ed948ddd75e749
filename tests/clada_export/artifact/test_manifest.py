"""The manifest and its reader: any damage is a UsageError that says where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clada_export.artifact.manifest import (
    MANIFEST_NAME,
    CacheTensor,
    Manifest,
    TensorSpec,
    _digest,
    file_record,
    read_manifest,
    write_manifest,
)
from clada_export.errors import BackendError, UsageError
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan


def make_manifest(**changes: Any) -> Manifest:
    plan = SparsityPlan(
        policy="clada",
        score="gate",
        rule="threshold",
        layers=(LayerPlan("model.layers.0.mlp.down_proj", "silu", True, 8, 16, (0.5,)),),
        load=LoadSignal(),
        source={"weights_digest": "ab"},
    )
    values: dict[str, Any] = {
        "tool_version": "0.1.0",
        "source": {"name": "org/tiny", "kind": "hub", "revision": "abc", "weights_digest": "ab", "files": {}},
        "target": "ort",
        "op": {"domain": "com.clada", "name": "SparseFFN", "version": 1},
        "plan": plan.to_dict(),
        "load_signal": LoadSignal(surprisal_mean=1.5),
        "inputs": (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        "outputs": (TensorSpec("logits", "float32", ("batch", "sequence", 10)),),
        "dtype": "float32",
        "cache": (CacheTensor(0, "key", "past_key_values.0.key", "present.0.key", "float32", ("batch", 2, "past", 4)),),
        "versions": {"onnx": "1.0"},
        "library": "libclada_ort.so",
        "verification": {"max_abs": 1e-6},
        "drift": {"tokens": 9, "ppl_increase": 0.01, "kl": 0.01, "top1": 0.9},
        "warnings": ("careful",),
    }
    return Manifest(**{**values, **changes})


def write_folder(folder: Path, **changes: Any) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "libclada_ort.so").write_bytes(b"library")
    (folder / "sub" / "note.txt").write_text("note")
    files = {name: file_record(folder / name) for name in ("model.onnx", "libclada_ort.so", "sub/note.txt")}
    write_manifest(folder, make_manifest(**changes).with_files(files))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "out")


def rewrite(folder: Path, change: Any) -> None:
    """Change the parsed manifest and give it a digest that fits, as a careful editor would."""
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text())
    change(value)
    value["digest"] = _digest({key: item for key, item in value.items() if key != "digest"})
    path.write_text(json.dumps(value))


def test_round_trip(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest == make_manifest().with_files(manifest.files)
    assert set(manifest.files) == {"model.onnx", "libclada_ort.so", "sub/note.txt"}
    assert manifest.sparsity_plan().layers[0].threshold == (0.5,)
    assert manifest.digest == json.loads((folder / MANIFEST_NAME).read_text())["digest"]


def test_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    assert (first / MANIFEST_NAME).read_bytes() == (second / MANIFEST_NAME).read_bytes()


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_manifest(tmp_path / "nope")
    with pytest.raises(UsageError, match=r"no clada\.json"):
        read_manifest(tmp_path)


def test_edited_manifest(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(path.read_text().replace("careful", "all well"))
    with pytest.raises(UsageError, match="edited or damaged"):
        read_manifest(folder)


def test_newer_schema(folder: Path) -> None:
    rewrite(folder, lambda value: value.update(schema_version=2))
    with pytest.raises(UsageError, match="schema_version 2 is newer"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", ".", "", "a\\b", "x\n", "a\0b", ".hidden", "C:x"])
def test_file_names_that_leave_the_folder(folder: Path, name: str) -> None:
    rewrite(folder, lambda value: value["files"].update({name: {"sha256": "0" * 64, "bytes": 0}}))
    with pytest.raises(UsageError, match="not a plain relative path"):
        read_manifest(folder)


def test_a_link_that_leads_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"graph")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leads out of the folder"):
        read_manifest(folder)


def test_a_pipe_instead_of_a_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(UsageError, match="not a regular file"):
        read_manifest(folder)


def test_missing_shorter_and_edited_files(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"grapH")
    read_manifest(folder, check_files=False)
    with pytest.raises(UsageError, match=r"model\.onnx: changed after the export"):
        read_manifest(folder)
    (folder / "model.onnx").write_bytes(b"gra")
    with pytest.raises(UsageError, match="has 3 bytes, and the manifest says 5"):
        read_manifest(folder, check_files=False)
    (folder / "model.onnx").unlink()
    with pytest.raises(UsageError, match=r"model\.onnx: .* missing"):
        read_manifest(folder)
    (folder / "libclada_ort.so").unlink()
    (folder / "model.onnx").write_bytes(b"graph")
    with pytest.raises(BackendError, match="library is missing"):
        read_manifest(folder)


def test_an_extra_library(folder: Path) -> None:
    (folder / "extra.txt").write_text("fine")
    read_manifest(folder)
    (folder / "sub" / "libother.so.1").write_bytes(b"")
    with pytest.raises(UsageError, match="a library that the manifest does not list"):
        read_manifest(folder)


def test_model_and_library_must_be_listed(folder: Path) -> None:
    rewrite(folder, lambda value: value["files"].pop("model.onnx"))
    with pytest.raises(UsageError, match=r"model: 'model\.onnx' is not one of the listed files"):
        read_manifest(folder)


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a finite number"):
        write_manifest(tmp_path, make_manifest(library=None, drift={"kl": float("nan")}))
    assert not (tmp_path / MANIFEST_NAME).exists()
