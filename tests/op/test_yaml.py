"""`plugins/sparse_ffn.yaml`, `graph_passes/op.py` and the built library state one contract."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from op_shells import make_case, make_model, session

from clada_export.errors import BackendError
from clada_export.native.library import build_info, check_library, ort_library_path
from graph_passes.op import (
    DOMAIN,
    OP_TYPE,
    OP_VERSION,
    SHADOW_BLOCK,
    WEIGHT_TYPES,
    ContractError,
    SparseFFNAttributes,
    input_names,
    output_names,
    weight_shapes,
    x_types,
)

YAML = Path(__file__).parents[2] / "plugins" / "sparse_ffn.yaml"
CONTRACT: dict[str, Any] = yaml.safe_load(YAML.read_text(encoding="utf-8"))


def present(entries: list[dict[str, Any]], attributes: SparseFFNAttributes) -> list[dict[str, Any]]:
    stored = attributes.to_onnx()
    return [e for e in entries if all(stored[name] in values for name, values in e.get("when", {}).items())]


def kinds(entries: list[dict[str, Any]]) -> dict[str, str]:
    return {entry["name"]: entry["type"] for entry in entries}


def variants() -> list[SparseFFNAttributes]:
    found = []
    for score, gated, bias, stat in itertools.product(("gate", "exact", "shadow", "prefix", "external"), *[(False, True)] * 3):
        use = stat or score == "prefix"
        found.append(
            SparseFFNAttributes(score=score, gated=gated, has_bias=bias, use_stat=use, emit_stat=stat, emit_active=not stat)
        )
    return found


def test_head() -> None:
    assert (CONTRACT["domain"], CONTRACT["name"], CONTRACT["version"]) == (DOMAIN, OP_TYPE, OP_VERSION)
    assert CONTRACT["shadow_block"] == SHADOW_BLOCK


def test_attributes() -> None:
    assert [e["name"] for e in CONTRACT["attributes"]] == [field.name for field in fields(SparseFFNAttributes)]
    defaults = SparseFFNAttributes().to_onnx()
    types = {"int": int, "float": float, "string": str}
    for entry in CONTRACT["attributes"]:
        assert defaults[entry["name"]] == entry["default"]
        assert type(defaults[entry["name"]]) is types[entry["type"]]
        for value in entry.get("allowed", []):
            extra = {"score": "external"} if value == "weighted" else {"use_stat": True} if value == "prefix" else {}
            extra |= {"score": "exact"} if entry["name"] == "weight_format" else {}
            SparseFFNAttributes.from_onnx({**extra, entry["name"]: value})
        bad = [entry["min"] - 1] if "min" in entry else [entry["above"]] if "above" in entry else []
        bad += ["no such value"] if entry["type"] == "string" else []
        for value in bad:
            with pytest.raises(ContractError):
                SparseFFNAttributes.from_onnx({entry["name"]: value})


def test_inputs_and_outputs() -> None:
    for attributes in variants():
        assert [e["name"] for e in present(CONTRACT["inputs"], attributes)] == list(input_names(attributes))
        assert [e["name"] for e in present(CONTRACT["outputs"], attributes)] == list(output_names(attributes))


def test_weight_shapes() -> None:
    d, f = 64, 96
    for attributes in variants():
        sizes = {"d": d, "f": f, "n": 2 if attributes.gated else 1, "E": f, "d/2": d // 2, "d/32": d // 32}
        listed = {e["name"]: e["shapes"][-1] for e in present(CONTRACT["inputs"], attributes)}
        for name, shape in weight_shapes(attributes, d, f).items():
            assert tuple(sizes.get(size, size) for size in listed[name]) == shape, name


def test_types() -> None:
    assert {name for name, kind in kinds(CONTRACT["inputs"]).items() if kind == "X"} == {"x"}
    assert {name for name, kind in kinds(CONTRACT["outputs"]).items() if kind == "X"} == {"y"}
    text = " ".join(YAML.read_text(encoding="utf-8").replace("#", " ").split())
    assert f"W is {', '.join(WEIGHT_TYPES[:-1])} or {WEIGHT_TYPES[-1]}, one for both weights;" in text
    assert "X, one for x and y, is float32 or W." in text
    assert [x_types(kind) for kind in WEIGHT_TYPES] == [("float32",), ("float32", "float16"), ("float32", "bfloat16")]
    with pytest.raises(ContractError, match="int8"):
        x_types("int8")


@pytest.mark.parametrize(
    ("dtype", "x_dtype"), [(getattr(torch, kind), getattr(torch, x)) for kind in WEIGHT_TYPES for x in x_types(kind)]
)
def test_the_library_has_these_inputs_outputs_and_types(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    x_type = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}[x_dtype]
    onnx_types = {"float32": "tensor(float)", "int32": "tensor(int32)", "X": f"tensor({x_type})"}
    for attributes in variants():
        case = make_case(attributes, shape=(1, 2), dtype=dtype, x_dtype=x_dtype)
        model = make_model(case)
        # Types and shapes come from the library alone.
        for output in model.graph.output:
            output.ClearField("type")
        found = session(model, library=ort_library_path())
        wanted = present(CONTRACT["outputs"], attributes)
        assert [(o.name, o.type) for o in found.get_outputs()] == [(e["name"], onnx_types[e["type"]]) for e in wanted]
        ranks = {"y": ["x_0", "x_1", "x_2"], "stat": ["x_0", 96], "active": ["load_0", "load_1"]}
        assert all(output.shape == ranks[output.name] for output in found.get_outputs())


def test_the_library_names_attributes_of_a_wrong_type() -> None:
    case = make_case(SparseFFNAttributes(), shape=(1, 2))
    for entry in CONTRACT["attributes"]:
        wrong = {"int": "text", "float": "text", "string": 1}[entry["type"]]
        with pytest.raises(Exception, match=f"layer7/ffn.*'{entry['name']}'"):
            session(make_model(case, node_attributes={entry["name"]: wrong}), library=ort_library_path())


def test_library_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ort_library_path()
    check_library(path)
    assert re.search(rf"{DOMAIN}::{OP_TYPE} {OP_VERSION},", build_info(path))
    monkeypatch.setenv("CLADA_ORT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError, match=r"none\.so"):
        ort_library_path()
    text = tmp_path / "text.so"
    text.write_text("no library", encoding="utf-8")
    with pytest.raises(BackendError, match="can't be loaded"):
        check_library(text)
    with pytest.raises(BackendError, match="is no file"):
        check_library(tmp_path)
