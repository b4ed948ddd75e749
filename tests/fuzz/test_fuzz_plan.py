"""Plans that a stranger wrote or that are damaged: read, told in the report and the model card, and compiled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml
from hypothesis import strategies as st
from safetensors.numpy import load

import clada_export.pipeline
from clada_export.artifact.model_card import write_model_card
from clada_export.artifact.report import write_report
from clada_export.cli import main, main_export
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.files.json_files import read_json
from clada_export.pipeline import export
from clada_export.plan.plan import SparsityPlan
from clada_export.plan.tensors import PLAN_TENSORS
from clada_export.source.load import load_source
from clada_export.trace.trace import TracedModel
from graph_passes.op import DOMAIN, SparseFFNAttributes
from tests.clada_export.artifact.test_report import make_manifest
from tests.clada_export.conftest import _kept_trace
from tests.fuzz.harness import JSON_VALUES, damaged, fuzz, hold
from tests.fuzz.plans import CONTEXT, PAYLOADS, Given, fitted, planted, real_plans, wrong_plans
from tests.tiny_models import export_tiny, ffn_names, tiny_model

LAYER = ffn_names("llama")[0]
_TAGS = "html head meta title style body h1 h2 p div b ul li table tr th td br span code details summary svg text line rect"
_ATTRIBUTES = "lang charset name content class viewbox role aria-label x y x1 x2 y1 y2 width height fill stroke text-anchor"
TAGS, ATTRIBUTES = frozenset(_TAGS.split()), frozenset(_ATTRIBUTES.split())


class Page(HTMLParser):
    """Every tag and attribute of a page has to be one of ours; none but `class` and the like may hold a stranger's words."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            assert not any(payload in (value or "") for payload in PAYLOADS), value

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"a processing instruction: {data}")


@pytest.fixture(scope="module")
def plans() -> dict[str, Given]:
    return real_plans()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an ONNX graph."""
    folder = tmp_path_factory.mktemp("graphs") / "llama"
    folder.mkdir()
    ir.save(export_tiny("llama", "cpu"), folder / "model.onnx", external_data="model.onnx.data")
    tiny_model("llama").config.save_pretrained(folder)
    return folder / "model.onnx"


@pytest.fixture
def compile_plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Given], SparsityPlan]:
    """Export the tiny model with a plan, unverified, and hold the engine to the plan."""
    graph = _kept_trace(TorchDecoder(tiny_model("llama")))

    def trace(decoder: Any, *, fusions: str | None) -> TracedModel:
        # Of the model before a plan has changed its weights: those are not looked at, and a trace takes ten seconds.
        return TracedModel(graph.graph.clone(), fusions)

    monkeypatch.setattr(clada_export.pipeline, "trace", trace)
    return partial(_compile, str(model), tmp_path)


def _compile(model: str, folder: Path, given: Given) -> SparsityPlan:
    options = ExportOptions(plan=given.write(folder), verify=False, overwrite=True, calibration_context=CONTEXT)
    plan = export(model, folder / "out", options).plan
    nodes = {
        node.metadata_props["clada.ffn"]: node for node in ir.load(folder / "out" / "model.onnx").graph if node.domain == DOMAIN
    }
    assert set(nodes) == {layer.name for layer in plan.layers}
    for layer in plan.layers:
        values = {name: attribute.value for name, attribute in nodes[layer.name].attributes.items()}
        wanted = replace(plan.attributes(layer), has_bias=False, emit_active=True)
        assert SparseFFNAttributes.from_onnx(values) == SparseFFNAttributes.from_onnx(_in_float32(wanted)), layer.name
    assert SparsityPlan.from_dict(read_json(folder / "out" / "clada.json")["plan"], folder=folder / "out") == plan
    return plan


def _in_float32(attributes: SparseFFNAttributes) -> dict[str, Any]:
    return {
        name: float(np.float32(value)) if isinstance(value, float) else value for name, value in attributes.to_onnx().items()
    }


# What was found, by name: each is the smallest case of its kind.

Change = Callable[[dict[str, Any]], object]


def _layer(**changes: Any) -> Change:
    return lambda value: value["layers"][0].update(changes)


def _router(**changes: Any) -> Change:
    return lambda value: value["layers"][0]["router"].update(changes)


def _tensors(**changes: Any) -> Change:
    return lambda value: value["tensors"].update(changes)


def _load(**changes: Any) -> Change:
    return lambda value: value["load"].update(changes)


def _calibration(**changes: Any) -> Change:
    return lambda value: value["calibration"].update(changes)


REFUSED: dict[str, tuple[str, Change, str]] = {
    "a router of a billion layers": ("d2dmoe", _router(layers=1_000_000_000), r"holds a router of 2 layers.*says 1000000000"),
    "a router of no layer": ("d2dmoe", _router(layers=0), "0 is less than the minimum of 1"),
    "k beyond the granules": ("d2dmoe", _router(output="topk_softmax", k=10**9), "k 1000000000; .* wants 1 to 3"),
    "k without its output": ("d2dmoe", _router(k=1), "k 1, and output 'abs' has none"),
    "a router scale that float32 rounds to 0": ("d2dmoe", _router(scale=1e-320), "1e-320 is less than the minimum"),
    "an integer beyond 32 bits": ("clada", _layer(hidden_size=2**31), "2147483648 is greater than the maximum"),
    "an integer of 401 digits": ("clada", _layer(granule=10**400), "more than 308 digits"),
    "an integer written as a float": ("clada", _layer(granule=2.0), "layers/0/granule: 2.0 is not of type 'integer'"),
    "a version written as a float": ("clada", lambda value: value.update(version=1.0), "version: 1.0 is not of type 'integer'"),
    "3 thresholds": ("clada", _layer(threshold=[0.1] * 3), "has 3 thresholds; wanted 1 or 96"),
    "97 thresholds": ("clada", _layer(threshold=[0.1] * 97), "has 97 thresholds; wanted 1 or 96"),
    "2 values of k": ("griffin", _layer(threshold=[2, 2]), "has 2 thresholds; rule topk has one"),
    "k of 0": ("griffin", _layer(threshold=[0]), r"k = 0 .* between 1 and 96"),
    "a threshold that overflows float32": ("clada", _layer(threshold=[1e39]), r"threshold/0: 1e\+39 is greater than"),
    "load_max beyond float32": ("clada", _layer(load_max=1e39), r"load_max: 1e\+39 is greater than"),
    "load_min that float32 rounds to 0": ("clada", _layer(load_min=1e-320), "load_min: 1e-320 is less than"),
    "load_slope beyond float32": ("clada", _layer(load_slope=-1e39), r"load_slope: -1e\+39 is less than"),
    "load_min above load_max": ("clada", _layer(load_min=4.0, load_max=2.0), r"load_min 4\.0 above load_max 2\.0"),
    "a deviation that float32 rounds to 0": ("clada", _load(surprisal_std=1e-320), "surprisal_std: 1e-320 is less than"),
    "a window of the load's rule": ("clada", _load(rule="gate", parameters={"window": 1e9}), "window is 1e[+]09"),
    "a load rule that has no such parameter": ("clada", _load(rule="rank", parameters={"x": 1}), "has no parameter 'x'"),
    "external without a router": ("clada", lambda value: value.update(score="external"), "belong together, and there is none"),
    "a router without external": ("d2dmoe", lambda value: value.update(score="gate"), "the score is 'gate'"),
    "weighted without external": ("clada", _layer(combine="weighted"), "needs score 'external'"),
    "a granule that does not divide": ("clada", _layer(granule=7), "granules of 7 do not divide"),
    "more neurons kept than there are": ("pruned", _layer(kept_neurons=97), "keeps 97 of 96 neurons"),
    "fewer neurons kept than the order has": ("pruned", _layer(kept_neurons=48), "wanted 48 different ones"),
    "experts that do not divide": ("lory", _layer(merge=5), "merges 5 experts: they must divide"),
    "a billion experts": ("lory", _layer(merge=10**9), "merges 1000000000 experts"),
    "experts that the router does not score": ("lory", _layer(merge=4), "scores 2 granules; this layer has 64 and 4"),
    "merged experts under topk": ("lory", lambda value: value.update(rule="topk"), "no rule 'topk'"),
    "another rank of adapters": ("lte", _layer(adapter_rank=10**9), "no pair of matrices of rank 1000000000"),
    "arrays that no file holds": ("lte", lambda value: value.update(tensors=None), "the plan names no file of arrays"),
    "arrays in the folder above": ("lte", _tensors(file=".."), "not a regular file"),
    "arrays in a file of a very long name": (
        "lte",
        lambda value: value["tensors"].update(file="a" * 999),
        "tensors/file: .* is too long",
    ),
    "a hidden size that the shadow can't block": ("clada", _layer(hidden_size=65), "needs hidden_size divisible by 32"),
    "a context in words": ("clada", _calibration(context="abc"), "calibration/context: 'abc' is not of type 'integer'"),
    "a context of 10^12": ("clada", _calibration(context=10**12), "calibration/context: 1000000000000 is greater"),
    "pruning as a list": ("clada", _calibration(pruning=[]), r"calibration/pruning: \[\] is not of type 'object'"),
    "drift in words": ("clada", _calibration(drift={"kl": "x"}), "calibration/drift/kl: 'x' is not of type"),
    "a search of numbers": ("clada", _calibration(search=[1]), "calibration/search/0: 1 is not of type 'object'"),
    "candidates without a name": ("clada", _calibration(auto={"candidates": [{}]}), "'policy' is a required property"),
    "too many layers": ("clada", lambda value: value.update(layers=value["layers"][:1] * 20_000), "is too long"),
    "half of a surrogate pair": ("clada", lambda value: value.update(policy="\ud800"), "half of a surrogate pair"),
    "deep nesting": (
        "clada",
        lambda value: value["source"].update(x=_nested(900)),
        r"nested too deeply \(more than 64 levels\)",
    ),
}


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_it_is_read(name: str, plans: dict[str, Given], tmp_path: Path) -> None:
    kind, change, said = REFUSED[name]
    given = Given(json.loads(json.dumps(plans[kind].value)), plans[kind].arrays)
    change(given.value)
    path = given.write(tmp_path)
    with pytest.raises(UsageError, match=said) as caught:
        SparsityPlan.load_file(path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


TEXT = "the pruning of another text"
MISFITS: dict[str, tuple[str, Change, str]] = {
    "another activation": ("clada", _layer(activation="relu"), rf"{LAYER} has activation 'relu' in the plan and 'silu' in the"),
    "no gate": ("tt", _layer(gated=False), rf"{LAYER} has gated False in the plan and True in the model"),
    "other sizes": ("clada", _layer(hidden_size=32), rf"{LAYER} has sizes 32 x 96 in the plan and 64 x 96 in the model"),
    "a layer of another model": ("clada", _layer(name="h.0.fc"), r"layer 'h\.0\.fc' is not in this model"),
    "other weights": ("clada", lambda value: value["source"].update(weights_digest="00"), r"other weights \(digest 00\.\.\.\)"),
    "no layers": ("clada", lambda value: value.update(layers=[]), "the plan has no layers"),
    "pruning that is none": ("clada", lambda value: value.update(prune="junk"), "pruning 'junk' is not understood"),
    "pruning with nothing": ("clada", lambda value: value.update(prune=""), "pruning '' is not understood"),
    "a budget that is none": ("clada", _calibration(budget="ppl=nan%"), "--budget 'ppl=nan%' is not understood"),
    TEXT: ("pruned", _calibration(pruning={"text_digest": "0"}), "the text here is another one"),
}


@pytest.mark.parametrize(
    ("source", "name"),
    [(source, name) for source in ("model", "graph") for name in MISFITS if (source, name) != ("graph", TEXT)],
)
def test_refused_when_it_meets_the_model(
    name: str, source: str, plans: dict[str, Given], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    kind, change, said = MISFITS[name]
    place: Path = request.getfixturevalue(source)
    given = Given(json.loads(json.dumps(plans[kind].value)), plans[kind].arrays)
    given.value["source"]["weights_digest"] = load_source(str(place)).weights_digest
    change(given.value)
    options = ExportOptions(plan=given.write(tmp_path), verify=False, calibration_context=CONTEXT)
    with pytest.raises(UsageError, match=said) as caught:
        export(place, tmp_path / "out", options)
    assert "plan" in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_line_ends_with_2(plans: dict[str, Given], model: Path, tmp_path: Path, capsys: Any) -> None:
    given = Given(json.loads(json.dumps(plans["clada"].value)), b"")
    given.value["layers"][0]["activation"] = "gelu"
    arguments = [
        str(model),
        "--target",
        "ort",
        "-o",
        str(tmp_path / "out"),
        "--plan",
        str(given.write(tmp_path)),
        "--no-verify",
    ]
    assert main_export([*arguments, "--calibration-context", str(CONTEXT), "--quiet"]) == 2
    assert "activation 'gelu' in the plan and 'silu' in the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "not valid JSON"),
        (lambda path: path.write_text("[" + "9" * 5000 + "]"), "not valid JSON"),
        (lambda path: path.write_text("[1e999]"), "inf is not a finite number"),
        (lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900), "nested too deeply"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40), "larger than 32 MB"),
    ],
    ids=["pipe", "loop", "device", "folder", "no UTF-8", "5000 digits", "1e999", "900 levels", "a terabyte of nothing"],
)
@pytest.mark.parametrize("name", ["plan.json", "clada.json"])
def test_files_that_are_no_json(name: str, make: Callable[[Path], object], said: str, tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / name)
    found = hold(lambda: read_json(tmp_path / name))
    assert isinstance(found, UsageError) and said in str(found)
    if name == "clada.json":
        assert main(["inspect", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.write_bytes(b"x")]
)
def test_arrays_that_are_no_file(make: Callable[[Path], object], plans: dict[str, Given], tmp_path: Path) -> None:
    path = plans["d2dmoe"].write(tmp_path)
    (tmp_path / PLAN_TENSORS).unlink()
    make(tmp_path / PLAN_TENSORS)
    found = hold(lambda: SparsityPlan.load_file(path))
    assert isinstance(found, UsageError) and PLAN_TENSORS in str(found)


@pytest.mark.parametrize(
    ("kind", "name", "change", "said"),
    [
        ("pruned", "neurons", lambda array: array.astype("float64"), "has type float64; wanted int64"),
        ("d2dmoe", "router.0.weight", lambda array: array.astype("float16"), "has type float16; wanted float32"),
        ("d2dmoe", "router.0.weight", lambda array: array.T.copy(), "weight 1 has shape|takes .* values|wanted"),
        ("d2dmoe", "router.0.weight", lambda array: array * float("nan"), "a value that is not finite"),
        ("lte", "adapter.0.left", lambda array: array * float("inf"), "a value that is not finite"),
        ("lte", "adapter.0.left", lambda array: array[:5].copy(), None),
    ],
)
def test_arrays_that_do_not_fit(
    kind: str, name: str, change: Callable[[Any], Any], said: str | None, plans: dict[str, Given], model: Path, tmp_path: Path
) -> None:
    arrays = dict(load(plans[kind].arrays))
    arrays[f"{LAYER}.{name}"] = change(arrays[f"{LAYER}.{name}"])
    path = fitted(plans[kind].value, arrays).write(tmp_path)
    if said is not None:
        with pytest.raises(UsageError, match=said):
            SparsityPlan.load_file(path)
        return
    options = ExportOptions(plan=path, verify=False, calibration_context=CONTEXT)
    with pytest.raises(UsageError, match=rf"{LAYER}: the adapters are for weights of shapes \[\[5, 64\]"):
        export(model, tmp_path / "out", options)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_is_planted_in_a_plan_stays_text(payload: str, plans: dict[str, Given], tmp_path: Path) -> None:
    plan = SparsityPlan.from_dict(planted(plans["clada"].value, payload))
    _tell(plan, tmp_path, payload)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "<svg/" not in page
    # In a code span, where nothing is markup, or behind a backslash.
    card = re.sub(r"`[^`\n]*`|\\.", "", (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2])
    assert not re.search(r"<\w|\]\(", card)


def test_every_kind_of_plan_compiles(plans: dict[str, Given], compile_plan: Callable[[Given], SparsityPlan]) -> None:
    for given in plans.values():
        plan = compile_plan(given)
        assert json.loads(json.dumps(plan.to_dict())) == given.value


def test_one_threshold_a_granule_compiles(plans: dict[str, Given], compile_plan: Callable[[Given], SparsityPlan]) -> None:
    given = Given(json.loads(json.dumps(plans["clada"].value)), b"")
    given.value["layers"][0]["threshold"] = [index / 96 for index in range(96)]
    given.value["layers"].pop()
    assert len(compile_plan(given).layers[0].threshold) == 96


def test_a_plan_for_tensorrt_that_merges_is_refused_at_once(plans: dict[str, Given], tmp_path: Path) -> None:
    from clada_export.planning import check_goals

    plan = SparsityPlan.load_file(plans["lory"].write(tmp_path))
    with pytest.raises(UsageError, match="'lory' does not run on TensorRT"):
        check_goals(plan, "plan.json", "trt")


def _tell(plan: SparsityPlan, folder: Path, text: str = "tiny") -> None:
    """Write the report and the model card of a plan, and look for what got into their markup."""
    value = plan.to_dict()
    assert SparsityPlan.from_dict(json.loads(json.dumps(value, allow_nan=False))) == replace(plan, arrays={})
    write_report(folder, {"model": text, "plan": value, "calibration": plan.calibration.to_dict(), "warnings": [text]})
    json.loads((folder / "report.json").read_text(encoding="utf-8"))
    parser = Page()
    parser.feed((folder / "report.html").read_text(encoding="utf-8"))
    parser.close()
    source = {"name": text, "kind": "hub", "revision": text, "weights_digest": "ab", "files": {}, "license": text}
    write_model_card(
        folder, make_manifest(plan={**value, "tensors": None} if not plan.arrays else value, source=source, warnings=(text,))
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert set(front) == {"library_name", "pipeline_tag", "base_model", "license", "tags"} and front["license"] == text


def test_fuzz_reading(plans: dict[str, Given], tmp_path: Path) -> None:
    """Changed JSON and arrays: a plan that every later step can hold, or an error of the user."""

    def read(given: Given) -> None:
        (tmp_path / PLAN_TENSORS).write_bytes(given.arrays)
        plan = SparsityPlan.from_dict(given.value, folder=tmp_path)
        for layer in plan.layers:
            plan.attributes(layer)
        _tell(plan, tmp_path)

    fuzz("plan", wrong_plans(plans), lambda given: hold(lambda: read(given)))


def test_fuzz_files(plans: dict[str, Given], tmp_path: Path) -> None:
    """Damaged bytes of both files, and any JSON."""
    whole = [(json.dumps(given.value).encode(), given.arrays) for given in plans.values()]
    path = tmp_path / "plan.json"

    def cases() -> st.SearchStrategy[tuple[bytes, bytes]]:
        texts = st.sampled_from(whole).flatmap(lambda files: st.tuples(damaged(files[0]), st.just(files[1])))
        arrays = st.sampled_from([files for files in whole if files[1]]).flatmap(
            lambda files: st.tuples(st.just(files[0]), damaged(files[1]))
        )
        other = JSON_VALUES.map(lambda value: (json.dumps(value).encode(), b""))
        return st.one_of(texts, arrays, arrays, other)

    def read(files: tuple[bytes, bytes]) -> None:
        path.write_bytes(files[0])
        (tmp_path / PLAN_TENSORS).write_bytes(files[1])
        SparsityPlan.load_file(path)

    fuzz("plan files", cases(), lambda files: hold(lambda: read(files)))


def test_fuzz_export(plans: dict[str, Given], compile_plan: Callable[[Given], SparsityPlan]) -> None:
    """A whole export with a changed plan: an engine that has the plan's attributes, or an error of ours."""
    fuzz("plan export", wrong_plans(plans), lambda given: hold(lambda: compile_plan(given)), chunk=10)
