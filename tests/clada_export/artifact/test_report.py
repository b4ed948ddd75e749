"""The report and the model card: well-formed, escaped, the same bytes each time, and honest about what failed."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clada_export.artifact.manifest import Manifest, TensorSpec
from clada_export.artifact.model_card import write_model_card
from clada_export.artifact.report import write_report
from clada_export.artifact.report_page import TEMPLATES
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.plan import SparsityPlan
from clada_export.verify.report import Check, Verification
from graph_passes import FFNMiss, RewriteReport
from graph_passes.report import RewrittenFFN

VOID = {"meta", "br", "line", "rect"}
NASTY = "<script>alert('x')</script> & \"quotes\" | `ticks`"


class WellFormed(HTMLParser):
    """Fails on a tag that is closed out of order; keeps the text, the tags and their attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parse(page: str) -> WellFormed:
    parser = WellFormed()
    parser.feed(page)
    parser.close()
    assert not parser.open, f"never closed: {parser.open}"
    return parser


def make_plan(layers: int = 3, name: str = "model.layers.{}.mlp.down_proj", **signal: float) -> SparsityPlan:
    planned = []
    for index in range(layers):
        expected = {"expected_sparsity": 0.3 + 0.5 * index / layers, "expected_cett": 0.02 * (index + 1)}
        planned.append(LayerPlan(name.format(index), "silu", True, 64, 96, (0.1,), load_slope=0.25, **expected))
    return SparsityPlan("clada", "shadow", "threshold", tuple(planned), LoadSignal(**signal), {"weights_digest": "ab"})


def make_verification(failed: bool = False) -> Verification:
    drift = {"tokens": 254, "dense_ppl": 20.0, "ppl": 20.3, "ppl_increase": 0.015, "kl": 0.012, "top1": 0.94, "sparsity": 0.44}
    same = {"max_abs": 2e-5, "kl": 1e-9}
    checks = [
        Check("dense parity, prompt (text, batch 1)", True, {"positions": 56, "max_abs": 1.2e-5}, {"max_abs": 3e-4}),
        Check(
            "sparse parity (text, batch 1)",
            not failed,
            {"same_neurons": same, "after_a_flip": {"kl": 0.0}, "flipped": 1, "flipped_share": 1e-5},
            {"max_abs": 6e-4, "kl_after_a_flip": 1e-3, "flipped_share": 2e-3},
            "with the same neurons, logits differ by up to 0.1; allowed 0.0006" if failed else "",
        ),
        Check("dense parity, greedy tokens", True, {"equal_prefix": [64, 61], "ties": 1}, {"equal_prefix": 64.0}),
        Check("drift", True, {**drift, "greedy_prefix": [64, 12]}, {"ppl_increase": 0.04}),
    ]
    return Verification(checks, {**drift, "greedy_prefix": [64, 12]})


def make_report(**changes: Any) -> dict[str, Any]:
    ffns = [RewrittenFFN(f"layers.{i}", f"layers.{i}.ffn", "gated", 64, 96, 9, 3, 73728, 1_500_000) for i in range(3)]
    calibration = {
        "text": "pydoc_data.topics",
        "budget": "ppl=2.0000%",
        "allocation": "sensitivity",
        "allocations": {"uniform": {"kl": 0.04, "sparsity": 0.45}, "sensitivity": {"kl": 0.017, "sparsity": 0.45}},
        "search": [
            {"sparsity": 0.45, "cost": 1.053, "kl": 0.017, "ppl_increase": 0.0187},
            {"sparsity": 0.43, "cost": 0.0195, "kl": 0.0153},
        ],
        "load_response": [
            {
                "signal": "surprisal",
                "slope": 0.05,
                "kl": 0.0149,
                "kl_without": 0.015,
                "gain": 0.0001,
                "standard_error": 0.0002,
                "sparsity": 0.43,
                "better": False,
            }
        ],
        "drift": {"kl": 0.015, "ppl_increase": 0.018},
    }
    report = {
        "model": "org/tiny",
        "plan": make_plan(surprisal_weight=0.0).to_dict(),
        "verification": make_verification().to_dict(),
        "rewrite": RewriteReport(ffns, [], 300, 280).to_dict(),
        "calibration": calibration,
        "timings": {"trace": 12.25},
        "warnings": [],
    }
    return report | changes


def written(folder: Path, report: dict[str, Any]) -> WellFormed:
    write_report(folder, report)
    return parse((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_shows_every_part(tmp_path: Path) -> None:
    page = written(tmp_path, make_report())
    for part in ("org/tiny", "ppl=2.0000%", "clada", "+1.50%", "4/4", "3/3", "Verification", "Search for the budget", "12.2"):
        assert part in page.text, part
    # A step of an older plan has its cost in another unit, and is shown without.
    assert "105.3%" in page.text and "1.87%" in page.text and "0.0153" in page.text and "1.9%" not in page.text
    assert page.tags.count("svg") == 2 and page.tags.count("rect") == 6
    # The number that each bound is for.
    assert "max_abs 2e-05" in page.text and "equal_prefix 61 parted at a tie: 1" in page.text
    assert "✗" not in page.text
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(make_report()))


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = written(tmp_path, make_report())
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [value for key, value in page.attributes if key in ("src", "href") or key.startswith("on") or "//" in value]


def test_failed_checks_and_misses_are_shown_with_their_reasons(tmp_path: Path) -> None:
    rewrite = RewriteReport([], [FFNMiss("layers.1", "its activation is unknown")], 300, 300).to_dict()
    page = written(tmp_path, make_report(verification=make_verification(failed=True).to_dict(), rewrite=rewrite))
    for part in ("✗ fail", "allowed 0.0006", "3/4", "0/1", "its activation is unknown", "Left dense"):
        assert part in page.text, part


def test_an_unverified_export_says_so(tmp_path: Path) -> None:
    assert "Not verified." in written(tmp_path, make_report(verification={})).text


@pytest.mark.parametrize("part", ["plan", "verification", "rewrite", "calibration", "timings", "warnings"])
def test_a_missing_part_is_left_out(tmp_path: Path, part: str) -> None:
    report = make_report()
    del report[part]
    written(tmp_path, report)


def test_a_plan_given_by_the_user_has_no_calibration(tmp_path: Path) -> None:
    page = written(tmp_path, make_report(calibration={}, plan=make_plan(layers=120, surprisal_weight=0.2).to_dict()))
    assert page.tags.count("rect") == 240
    assert "surprisal 0.2" in page.text


def test_everything_is_escaped(tmp_path: Path) -> None:
    check = Check(NASTY, False, {NASTY: NASTY, "list": [NASTY]}, {NASTY: 1.0}, NASTY)
    report = make_report(
        model=NASTY,
        plan=make_plan(name=NASTY + "{}").to_dict() | {"policy": NASTY},
        verification=Verification([check], {NASTY: NASTY}).to_dict(),
        rewrite=RewriteReport([RewrittenFFN(NASTY, NASTY, NASTY, 1, 1, 1, 1, 1, 1, NASTY)], [FFNMiss(NASTY, NASTY)]).to_dict(),
        calibration={
            "budget": NASTY,
            "text": NASTY,
            "allocations": {NASTY: {"kl": 0.0, "sparsity": 0.0}},
            "load_response": [{"signal": NASTY}],
        },
        timings={NASTY: 1.0},
        warnings=[NASTY],
    )
    page = written(tmp_path, report)
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") >= 15


def test_the_templates_mark_nothing_as_safe_but_what_they_say_themselves() -> None:
    """Escaping is the default; only a literal of a template may go round it."""
    templates = sorted(TEMPLATES.glob("*.jinja"))
    assert templates
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"autoescape|Markup", text), path.name
        for before in re.findall(r"([^{|]*)\|\s*safe\b", text):
            assert re.fullmatch(r"\s*'[^']*'\s*", before), f"{path.name}: {before!r} is marked as safe"


@given(st.text(), st.floats(), st.floats(0, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
@example("", 0.0, 5e-324)
def test_any_text_and_number_gives_a_page(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, share: float
) -> None:
    layers = [make_plan(1).to_dict()["layers"][0] | {"name": text, "expected_sparsity": share, "expected_cett": share}]
    check = Check(text, True, {"max_abs": number}, {"max_abs": number})
    folder = tmp_path_factory.mktemp("report")
    report = make_report(model=text, plan={"layers": layers}, verification=Verification([check], {"kl": number}).to_dict())
    written(folder, report)
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write_report(folder, make_report())
        write_model_card(folder, make_manifest())
    for name in ("report.json", "report.html", "README.md"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second
        assert str(tmp_path).encode() not in first


def test_infinite_numbers_are_json(tmp_path: Path) -> None:
    check = Check("dense parity", False, {"max_abs": math.inf}, {"max_abs": 3e-4}, "logits are not finite")
    page = written(tmp_path, make_report(verification=Verification([check]).to_dict()))
    assert "max_abs inf" in page.text
    assert json.loads((tmp_path / "report.json").read_text())["verification"]["checks"][0]["numbers"]["max_abs"] == "inf"


def make_manifest(**changes: Any) -> Manifest:
    verification = make_verification()
    values: dict[str, Any] = {
        "tool_version": "0.1.0",
        "source": {"name": "org/tiny", "kind": "hub", "revision": "abc", "weights_digest": "ab", "files": {}, "license": "mit"},
        "target": "ort",
        "op": {"domain": "com.clada", "name": "SparseFFN", "version": 1},
        "plan": make_plan().to_dict(),
        "load_signal": LoadSignal(),
        "inputs": (TensorSpec("input_ids", "int64", ("batch", "length")), TensorSpec("load", "float32", ("batch", "length"))),
        "outputs": (TensorSpec("logits", "float32", ("batch_size", "sequence_length", 10)),),
        "dtype": "float32",
        "cache": (),
        "versions": {},
        "library": "libclada_ort.so",
        "verification": verification.to_dict(),
        "drift": verification.drift,
        "tokenizer": True,
    }
    return Manifest(**{**values, **changes})


def card(folder: Path, manifest: Manifest) -> tuple[dict[str, Any], str]:
    write_model_card(folder, manifest)
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_model_card_of_a_hub_model(tmp_path: Path) -> None:
    front, body = card(tmp_path, make_manifest(warnings=("careful",)))
    assert front["base_model"] == "org/tiny" and front["license"] == "mit" and front["library_name"] == "clada-export"
    assert "activation-sparsity" in front["tags"]
    for part in ("register_custom_ops_library", "libclada_ort.so", "load_engine", "clada run", "+1.50%", "4 of 4", "- careful"):
        assert part in body, part


def test_the_model_card_of_a_local_unverified_export(tmp_path: Path) -> None:
    source = {"name": NASTY, "kind": "folder", "revision": None, "weights_digest": "ab", "files": {}, "license": None}
    front, body = card(tmp_path, make_manifest(source=source, verification={}, drift={}, library=None))
    assert "base_model" not in front and "license" not in front
    assert "not verified" in body and "<script>" not in body and "register_custom_ops_library" not in body


@pytest.mark.parametrize(
    ("tokenizer", "used"), [(True, '"Once upon a time", 64).texts[0])'), (False, "[[1, 2, 3]], 64).tokens[0])")]
)
def test_the_example_takes_text_only_where_there_is_a_tokenizer(tmp_path: Path, tokenizer: bool, used: str) -> None:
    _, body = card(tmp_path, make_manifest(tokenizer=tokenizer))
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert used in code and ("clada run" in body) == tokenizer


def test_a_license_that_looks_like_yaml_stays_a_string(tmp_path: Path) -> None:
    source = {"name": "no: [1", "kind": "hub", "revision": None, "weights_digest": "ab", "files": {}, "license": "other: {x}"}
    front, _ = card(tmp_path, make_manifest(source=source))
    assert front["base_model"] == "no: [1" and front["license"] == "other: {x}"


def test_what_strangers_wrote_is_text_in_the_model_card(tmp_path: Path) -> None:
    """A name, a package, a warning and a reason that are Markdown and HTML; only in code spans they are as they were."""
    engine = {
        "package": NASTY,
        "version": NASTY,
        "backend": "tensorrt",
        "files": [{"file": NASTY, "compute_capabilities": [NASTY]}],
        "plugin": {"embedded": False, "file": NASTY},
        "commands": {},
    }
    source = {"name": NASTY, "kind": "hub", "revision": NASTY, "license": NASTY}
    verification = make_verification().to_dict() | {"deferred": [NASTY]}
    manifest = make_manifest(engine=engine, source=source, warnings=(NASTY,), verification=verification, dtype=NASTY)
    front, body = card(tmp_path, manifest)
    assert front["base_model"] == NASTY and front["license"] == NASTY
    blocks = body.split("```")
    prose = re.sub(r"(?<!\\)`[^`]*`", "", " ".join(blocks[::2]))
    assert prose.count(r"\<script\>") >= 7 and "<script>" not in prose
    assert json.dumps(NASTY) in blocks[3]
