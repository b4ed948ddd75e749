"""A policy is its own file or folder and a line of the registry: nothing else names one, and a new one needs nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import clada_export
import graph_passes
from clada_export.calibration import CalibrationOptions, calibrate, load_calibration_data
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.methods import POLICIES, PolicySettings, all_policies, get_policy
from clada_export.methods.common.single import SinglePolicy
from clada_export.methods.registry import importing
from clada_export.methods.static import PruneSpec
from clada_export.methods.static.policy import StaticPolicy
from clada_export.plan.plan import SparsityPlan
from clada_export.source.mixtures import BLOCK_LAYOUTS, FOLDER_LAYOUTS
from tests.tiny_models import tiny_model

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (clada_export, graph_passes))
# `clada` is the project's name too. Layouts of checkpoints are called by what their files say.
NAMES = sorted(re.escape(name).replace("\\-", "[-_]?") for name in POLICIES if name != "clada")
NAMED = re.compile(rf"(?<![a-z])({'|'.join(NAMES)})(?![a-z])", re.IGNORECASE)
ELSEWHERE = [
    path
    for package in PACKAGES
    for path in sorted(package.rglob("*.py"))
    if not {"methods", "mixtures"} & set(path.relative_to(package).parts)
]


def words(tree: ast.AST) -> Iterator[str]:
    """Every identifier and every text that is no docstring: what a program can go by."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = {
        id(item.value)
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for item in node.body
        if isinstance(item, ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text) if id(node) not in prose:
                yield text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.arg(arg=name):
                yield name
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name
            case ast.ImportFrom(module=str() as name):
                yield name


def named(source: str) -> list[str]:
    return [word for word in words(ast.parse(source)) if NAMED.search(word)]


def test_nothing_outside_names_a_policy() -> None:
    assert len(ELSEWHERE) > 150
    found = {str(path): hits for path in ELSEWHERE if (hits := named(path.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "source",
    ['if policy == "lory": pass', "import clada_export.methods.lte.train", "MAX = wanda.LIMIT", 'f"{x} like llama-moe"'],
)
def test_what_names_one_is_seen(source: str) -> None:
    assert named(source)


def test_a_docstring_may_cite_one_and_a_word_may_hold_one() -> None:
    assert not named('def alter(scatter: int) -> None:\n    """As in Griffin."""\n    print("filter")')


def test_a_new_policy_is_nothing_but_an_object(tmp_path: Path) -> None:
    policy = SinglePolicy(name="mine", scores=("exact",), rule="threshold", allocations=("sparsity",))
    data = load_calibration_data(None, 256, context=32)
    plan = calibrate(
        TorchDecoder(tiny_model("llama", 0)), policy, data, {"weights_digest": "0"}, CalibrationOptions(sparsity=0.4)
    ).plan
    assert (plan.policy, plan.score, plan.rule) == ("mine", "exact", "threshold")
    assert plan.expected_sparsity == pytest.approx(0.4, abs=0.05)
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load_file(tmp_path / "plan.json") == plan


def test_settings_go_with_the_policy_and_leave_the_registry_alone() -> None:
    settings = PolicySettings(rows=7)
    assert get_policy("lte", settings).settings == settings == all_policies(settings)["lory"].settings
    assert get_policy("lte").settings == PolicySettings() == POLICIES["lory"].settings
    assert list(all_policies(settings)) == list(POLICIES)


def test_finetuning_names_the_policies_that_do_it() -> None:
    able = [name for name, policy in POLICIES.items() if policy.finetunes]
    assert able == ["lte"]
    with pytest.raises(UsageError, match="policy 'tt' does not train the model's weights; use --policy lte"):
        get_policy("tt", PolicySettings(finetune=True))
    reason = all_policies(PolicySettings(finetune=True))["tt"].left_out(())
    assert reason == "--finetune: policy 'tt' does not train the model's weights"


def test_every_layout_has_one_policy_that_imports_it() -> None:
    layouts = [layout.name for layout in (*FOLDER_LAYOUTS, *BLOCK_LAYOUTS)]
    assert [importing(layout) for layout in layouts] == ["llama-moe", "ds-moe"]
    assert sorted(layouts) == sorted(policy.imports for policy in POLICIES.values() if policy.imports is not None)


@pytest.mark.parametrize(("pattern", "sparsity"), [("1:4", 0.75), ("2:4", 0.5), ("3:4", 0.25)])
def test_a_pattern_has_its_own_sparsity(pattern: str, sparsity: float) -> None:
    policy = get_policy("wanda", PolicySettings(pattern=pattern))
    assert isinstance(policy, StaticPolicy)
    policy.check_options(pruned=False)
    policy.check(())
    assert policy.pruning(sparsity).spec == PruneSpec("wanda", pattern, sparsity)
    with pytest.raises(UsageError, match=f"--pattern {pattern} is a sparsity of {sparsity:g}, not 0.6"):
        policy.pruning(0.6)
