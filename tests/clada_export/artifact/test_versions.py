"""The ranges of versions that are said to be tested, and what an export says of others."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from clada_export.artifact.versions import installed_versions, required_packages, untested_versions, version_ranges

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    """What the tests run with."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def users_requirements(project: dict[str, Any]) -> list[str]:
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "dev"}
    return [*project["dependencies"], *(line for lines in extras.values() for line in lines)]


def test_every_range_has_both_ends_and_holds_the_version_that_is_tested(
    project: dict[str, Any], constraints: dict[str, str]
) -> None:
    ranges = version_ranges(users_requirements(project))
    assert {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy", "onnxruntime", "gguf"} <= set(ranges)
    for name, tested in ranges.items():
        assert sorted(spec.operator for spec in tested) == ["<", ">="], f"{name}: {tested}"
        # GPU builds and TensorRT of another kind are tested where there is a GPU, and are no part of constraints.txt.
        if name not in ("onnxruntime-gpu", "tensorrt"):
            assert tested.contains(constraints[name]), f"{name} {constraints[name]} is outside of {tested}"


def test_no_range_starts_before_the_release_that_is_tested(project: dict[str, Any], constraints: dict[str, str]) -> None:
    for name, tested in version_ranges(users_requirements(project)).items():
        lower = next(Version(spec.version) for spec in tested if spec.operator == ">=")
        if name in constraints:
            assert lower.release[:2] == Version(constraints[name]).release[:2], (
                f"{name}: from {lower}, tested {constraints[name]}"
            )


def test_a_version_outside_is_named_with_what_was_tested() -> None:
    ranges = {"torch": SpecifierSet(">=2.13,<2.14"), "onnx-ir": SpecifierSet(">=1.1,<1.2")}
    versions = {"torch": "2.9.1+cpu", "onnx_ir": "1.1.3", "unknown": "7"}
    (warning,) = untested_versions(versions, ranges)
    assert "torch 2.9.1+cpu" in warning and ">=2.13" in warning and "<2.14" in warning


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.1"])
def test_builds_and_patches_of_a_tested_release_pass(version: str) -> None:
    assert untested_versions({"torch": version}, {"torch": SpecifierSet(">=2.13,<2.14")}) == []


def test_what_only_developers_need_has_no_range() -> None:
    found = version_ranges(['ruff>=0.8; extra == "dev"', 'onnxruntime>=1.32; extra == "ort"', "numpy>=2.4"])
    assert set(found) == {"onnxruntime", "numpy"}


def test_the_packages_of_extras_are_not_required() -> None:
    assert required_packages(['onnxruntime>=1.32; extra == "ort"', "numpy>=2.4"]) == ("numpy",)
    assert {"torch", "gguf"} <= set(required_packages())


def test_the_ranges_come_from_the_installed_metadata() -> None:
    declared = {canonicalize_name(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in metadata.requires("clada-export") or ()}
    assert "torch" in version_ranges() and set(version_ranges()) < declared


def test_a_package_that_is_not_there_has_no_version() -> None:
    found = installed_versions(("onnx-ir", "no-such-package"))
    assert found == {"onnx-ir": metadata.version("onnx-ir")}
