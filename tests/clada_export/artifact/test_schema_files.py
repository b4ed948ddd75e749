"""The schemas that are shipped as files are those that the program holds plans and manifests to."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from clada_export.artifact.manifest_schema import MANIFEST_SCHEMA
from clada_export.artifact.schema_files import COMMAND, SCHEMA_FILES, main, schema_text, stale
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.schema import PLAN_SCHEMA


def shipped(room: str, name: str) -> dict[str, Any]:
    """A schema as an installed package has it."""
    value: dict[str, Any] = json.loads(resources.files(f"clada_export.{room}").joinpath(name).read_text(encoding="utf-8"))
    return value


def test_the_files_are_not_stale() -> None:
    assert not stale(), f"make them again: {COMMAND}"
    assert shipped("plan", "plan.schema.json") == PLAN_SCHEMA
    assert shipped("artifact", "manifest.schema.json") == MANIFEST_SCHEMA


@pytest.mark.parametrize(("room", "name"), [("plan", "plan.schema.json"), ("artifact", "manifest.schema.json")])
def test_another_program_can_use_them(room: str, name: str) -> None:
    schema = shipped(room, name)
    assert schema["$schema"].startswith("https://json-schema.org/draft/2020-12/")
    Draft202012Validator.check_schema(schema)
    assert not Draft202012Validator(schema).is_valid({})


def test_a_plan_follows_its_file() -> None:
    layer = LayerPlan("model.layers.0.mlp.down_proj", "silu", True, 64, 96, (0.5,))
    plan = SparsityPlan("clada", "gate", "threshold", (layer,), LoadSignal(), {"weights_digest": "00"}).to_dict()
    validator = Draft202012Validator(shipped("plan", "plan.schema.json"))
    assert validator.is_valid(json.loads(json.dumps(plan)))
    assert not validator.is_valid({**json.loads(json.dumps(plan)), "score": "loud"})


def test_a_stale_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, manifest = (tmp_path / path for path in SCHEMA_FILES)
    for path in (plan, manifest):
        path.parent.mkdir(parents=True)
    assert main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.count(f"is stale; make it again: {COMMAND}") == 2
    assert main([], tmp_path) == 0 and main(["--check"], tmp_path) == 0
    manifest.write_text(schema_text({**MANIFEST_SCHEMA, "title": "of another version"}))
    assert main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.startswith("clada_export/artifact/manifest.schema.json is stale")
    assert json.loads(plan.read_text()) == PLAN_SCHEMA
