"""A target is known by one name wherever a table holds one."""

from __future__ import annotations

import pytest

from clada_export.artifact.manifest import TARGETS as MANIFEST_TARGETS
from clada_export.cli import main
from clada_export.plan.targets import TARGET_TRAITS, merging_refused
from clada_export.runtime.opening import OPENERS
from clada_export.targets.registry import TARGETS


def test_every_table_has_every_target() -> None:
    assert list(TARGETS) == list(TARGET_TRAITS) == list(OPENERS) == list(MANIFEST_TARGETS)


def test_a_target_that_merges_nothing_names_one_that_does() -> None:
    assert merging_refused("ort", "lory") is None
    refused = merging_refused("trt", "lory")
    assert refused is not None and refused.startswith("policy 'lory' does not run on TensorRT: ")
    assert refused.endswith("; use --target ort or another --policy")


def test_an_unknown_target_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere", "--target", "coreml"]) == 2
    said = capsys.readouterr().err
    assert "'coreml'" in said and all(name in said for name in TARGETS)
