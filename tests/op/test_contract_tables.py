"""`plugins/sparse_ffn.yaml` makes the op's tables, and whatever is behind it is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graph_passes.contract_types import Condition, Constraint
from plugins.contract import quant_matmul
from plugins.contract.__main__ import HEADER, PAGE, PYTHON, ROOT, SOURCE, main, stale, texts
from plugins.contract.cpp_text import cpp_text
from plugins.contract.python_text import python_text
from plugins.contract.read import Contract, ContractFileError, read_contract

PROBES = """\
  - {name: probe_flag, type: int, default: 0, allowed: [0, 1], meaning: "of a test"}
  - {name: probe_choice, type: string, default: some_thing, allowed: [some_thing, other], meaning: "of a test"}
  - {name: probe_number, type: float, default: 0.5, above: 0.0, by_reference: true, meaning: "of a test"}

# What attributes must"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that are read and made, in a folder of their own."""
    for path in (SOURCE, quant_matmul.SOURCE, *texts(ROOT)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def add_attributes(folder: Path) -> Contract:
    change(folder / SOURCE, "\n# What attributes must", PROBES)
    return read_contract(folder / SOURCE)


def test_everything_is_up_to_date() -> None:
    assert stale(ROOT) == []


def test_the_same_contract_gives_the_same_texts() -> None:
    assert texts(ROOT) == texts(ROOT)


def test_a_changed_contract_leaves_every_file_stale(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_attributes(folder)
    assert main(["--check"], folder) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{path} is not what {SOURCE} makes: run `make contract` and commit it" for path in (PYTHON, HEADER, PAGE)]
    assert main([], folder) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in (PYTHON, HEADER, PAGE)]
    assert main(["--check"], folder) == 0


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        (PYTHON, '"relative"', '"relativ"'),
        (HEADER, "load_max = 4.0f", "load_max = 8.0f"),
        (PAGE, "| `granule` | 1 |", "| `granule` | 2 |"),
    ],
)
def test_an_edit_by_hand_is_found(folder: Path, path: Path, before: str, after: str) -> None:
    change(folder / path, before, after)
    assert stale(folder) == [path]


def test_a_missing_file_is_found_and_others_are_left_alone(folder: Path) -> None:
    (folder / HEADER).unlink()
    times = {path: (folder / path).stat().st_mtime_ns for path in (PYTHON, PAGE)}
    assert stale(folder) == [HEADER]
    assert main([], folder) == 0
    assert (folder / HEADER).read_text(encoding="utf-8") == (ROOT / HEADER).read_text(encoding="utf-8")
    assert times == {path: (folder / path).stat().st_mtime_ns for path in times}


def test_text_of_the_page_beside_the_tables_stays(folder: Path) -> None:
    change(folder / PAGE, "## Scores\n", "## Scores\n\nA sentence by hand.\n")
    add_attributes(folder)
    assert main([], folder) == 0
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert "A sentence by hand." in page and "| `probe_number` | 0.5 | above 0 | of a test |" in page


def test_a_page_without_its_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / PAGE, "<!-- contract: outputs -->\n", "")
    assert main(["--check"], folder) == 1
    assert (
        "has the parts inputs, types, attributes; wanted inputs, types, outputs, attributes once each"
        in capsys.readouterr().err
    )


def test_the_python_tables_have_new_attributes(folder: Path) -> None:
    module: dict[str, Any] = {"__name__": "made"}
    sys.modules["made"] = type(sys)("made")  # where dataclasses look up types
    try:
        exec(python_text(add_attributes(folder)), module)
    finally:
        del sys.modules["made"]
    values = module["AttributeValues"]()
    assert (values.probe_flag, values.probe_choice, values.probe_number) == (False, "some_thing", 0.5)
    assert module["PROBE_CHOICES"] == ("some_thing", "other")
    assert [attribute.name for attribute in module["ATTRIBUTES"] if attribute.by_reference][-1] == "probe_number"
    low = module["AttributeValues"](probe_number=0.0)
    broken = [constraint.message for constraint in module["CONSTRAINTS"] if constraint.broken(low)]
    assert broken == ["attribute 'probe_number' is {probe_number}; it must be above 0"]
    assert not any(constraint.broken(values) for constraint in module["CONSTRAINTS"])


PROGRAM = """\
#include <cstdio>
#include "contract_tables.h"
using namespace clada;
struct Print {
  template <class Enum, size_t N>
  void Choice(const char* name, Enum& value, const char* const (&names)[N]) {
    std::printf("%s=%s\\n", name, names[(int)value]);
  }
  void Flag(const char* name, bool& value) { std::printf("%s=%d\\n", name, value); }
  void Int(const char* name, int64_t& value) { std::printf("%s=%d\\n", name, (int)value); }
  void Float(const char* name, float& value) { std::printf("%s=%g\\n", name, (double)value); }
};
void Put(const char* text) { std::printf("%s", text); }
void Put(double value) { std::printf("%g", value); }
int main() {
  Attributes a;
  Print print;
  VisitAttributes(a, print);
  a.probe_number = -2, a.use_stat = true, a.probe_choice = ProbeChoice::kOther;
  CheckConstraints(a, [](const auto&... parts) { (Put(parts), ...), std::printf("\\n"); });
  for (const Input input : kAllInputs)
    if (Has(a, input)) std::printf("%s ", Info(input).name);
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_header_has_new_attributes(folder: Path) -> None:
    contract = add_attributes(folder)
    (folder / "contract_tables.h").write_text(cpp_text(contract), encoding="utf-8")
    (folder / "program.cc").write_text(PROGRAM, encoding="utf-8")
    program = folder / "program"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", str(folder / "program.cc"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, message, inputs = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    defaults = [a.default for a in contract.attributes]
    assert lines == [
        f"{a.name}={value:g}" if isinstance(value, float) else f"{a.name}={value}"
        for a, value in zip(contract.attributes, defaults, strict=True)
    ]
    assert message == "attribute 'probe_number' is -2; it must be above 0"
    assert inputs.split() == ["x", "load", "w_in", "w_out", "threshold", "past_stat"]


def test_the_made_module_is_formatted() -> None:
    command = [sys.executable, "-m", "ruff", "format", "--check", str(ROOT / PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("version: 1", "version: one", "$.version: 'one' is not of type 'integer'"),
        ("version: 1\n", "", "'version' is a required property"),
        ("default: silu,", "default: swish,", "attribute 'activation' can't be 'swish'; allowed: silu, gelu"),
        ("default: 0.25", "default: 1", "the default is 1; wanted a value of type float"),
        (
            "default: plain, allowed: [plain, int4, int5, int6, int8],",
            "default: plain,",
            "attribute 'weight_format': a string needs `allowed`",
        ),
        ("min: 1, below: 2^31", "allowed: [1, 2]", "allowed is [1, 2]; wanted [0, 1], or a range"),
        ("allowed: [row, none],", "allowed: [row, none], by_reference: true,", "by_reference is for floats"),
        ("{emit_stat: [1]}", "{emit_state: [1]}", "stat: there is no attribute 'emit_state'; wanted one of activation"),
        ("unless: {weight_format", "unless: {weight_form", "w_in: there is no attribute 'weight_form'"),
        (
            "shapes: [[rows]], when: {emit_active: [1]}",
            "shapes: [[rows]], instead: {type: int8, shapes: [[rows]], unless: {gated: [1]}}, when: {emit_active: [1]}",
            "outputs: 'active' has `instead`",
        ),
        ("{score: [external]}", "{score: [given]}", "score: attribute 'score' can't be 'given'; allowed: gate, exact"),
        ("when: {score: [shadow]}", "wen: {score: [shadow]}", "'wen' was unexpected"),
        ("name: up_bias", "name: gate_bias", "inputs: 'gate_bias' is there twice"),
        (
            "shapes: [[rows]], when",
            "shapes: [[rows], [B]], when",
            "outputs: 'active' has several shapes; wanted one shape of rows",
        ),
        (
            "shapes: [[rows]], when",
            "shapes: [[E]], when",
            "outputs: 'active' has the axis E; wanted one shape of rows, B, d, f",
        ),
        (
            "type: float32, shapes: [[rows]]",
            "type: float32, shapes: [[rows]], when: {gated: [1]}",
            "without `when` must come first",
        ),
        ("want: [load_min <= load_max]", "want: [load_min]", "'load_min' is no condition; wanted ATTRIBUTE COMPARISON VALUE"),
        ("[score == external]", "[score > external]", "'score > external' orders names; wanted == or !="),
        ("prior_gamma > 0]", "prior_gama > 0]", "constraints: there is no attribute 'prior_gama'"),
        ("backbone_min > 0,", "backbone_min > zero,", "'zero' is neither a number nor an attribute"),
        ("ranges: [backbone_min, prior_gamma]", "if_any: [gated == 1]", "wants nothing; state `want` or `ranges`"),
    ],
)
def test_a_contract_that_is_not_whole(folder: Path, before: str, after: str, said: str) -> None:
    change(folder / SOURCE, before, after)
    with pytest.raises(ContractFileError) as error:
        read_contract(folder / SOURCE)
    assert said in str(error.value) and str(SOURCE) in str(error.value)


def test_a_contract_that_is_not_whole_ends_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / SOURCE, "version: 1", "version: 0")
    assert main(["--check"], folder) == 1
    assert "$.version: 0 is less than the minimum of 1" in capsys.readouterr().err


def test_a_constraint_asks_only_where_it_says() -> None:
    asked, want = Condition("a", ">", 1), Condition("b", "<=", "a", right_is_attribute=True)
    constraint = Constraint((asked,), (want,), "")
    values = [type("Values", (), {"a": a, "b": b})() for a, b in ((1, 5), (2, 2), (2, 3))]
    assert [constraint.broken(each) for each in values] == [False, False, True]
