"""The survey of architectures: small models of any type, and the page that the results fill in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import architecture_page, architectures, markers
from benchmarks.architectures import Row, apart, examine
from benchmarks.tiny_decoders import MAX_PARAMETERS, NotMadeError, model_types, tiny_decoder
from clada_export.decoder.ffn import find_eager_ffns


def test_types_come_from_the_mapping() -> None:
    types = model_types()
    assert len(types) > 150 and types == sorted(types)
    assert {"llama", "gpt2", "phi3", "mixtral"} <= set(types)


@pytest.mark.parametrize("model_type", ["gptj", "glm", "mpt", "qwen2_moe", "biogpt"])
def test_a_small_model_of_any_type(model_type: str) -> None:
    model = tiny_decoder(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) < MAX_PARAMETERS
    assert len(find_eager_ffns(model).found) == 2


def test_a_type_that_can_not_be_made_says_why() -> None:
    with pytest.raises(NotMadeError, match="no_such_type"):
        tiny_decoder("no_such_type")


@pytest.mark.long
def test_a_type_is_examined_to_the_end() -> None:
    row = examine("gpt_neox")
    assert not row.failed, row.why
    assert row.expected == 2 and row.matched == {"none": 2, "cpu": 2, "cuda": 2}
    assert not row.false and not row.misses
    assert any(check["name"].startswith("dense parity") for check in row.checks)
    assert all(check["passed"] for check in row.checks)


def test_what_is_left_dense_is_counted() -> None:
    row = examine("bitnet")
    assert not row.failed and row.expected == 0 and not row.matched
    assert sum(row.dense.values()) == 2


class _Process:
    """In place of a process: it leaves a row, or nothing."""

    exitcode = -11

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.answer = args[-1]

    def start(self) -> None:
        self.answer.close()

    def kill(self) -> None: ...

    def join(self) -> None: ...


def test_a_process_that_ends_is_a_row() -> None:
    class Context:
        Process = _Process

        @staticmethod
        def Pipe(duplex: bool) -> Any:  # noqa: N802
            import multiprocessing

            return multiprocessing.Pipe(duplex)

    row = apart("llama", Context())
    assert (row.failed, row.why) == ("crash", "the process ended with exit code -11")


def _row(model_type: str, **values: Any) -> dict[str, Any]:
    return vars(Row(model_type, **values))


def test_results_fill_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"name": "dense parity", "passed": True}
    rows = [
        _row("a", model="A", expected=2, forms={"silu gated": 2}, matched={"none": 2, "cpu": 2, "cuda": 2}, checks=[good]),
        _row("b", model="B", expected=2, matched={"none": 2, "cpu": 1, "cuda": 2}, misses=["x (cpu): a | b"], checks=[good]),
        _row("c", model="C", expected=2, matched={"none": "no cache"}, failed="trace", why="at /some/place/file.py"),
        _row("d", model="D", dense={"a norm inside": 2}),
        _row("e", failed="make", why="no defaults"),
    ]
    results, page = tmp_path / "architectures.json", tmp_path / "page.md"
    results.write_text(json.dumps({"versions": {"transformers": "5"}, "rows": rows}))
    page.write_text(f"# Title\n\n{markers.BEGIN}\nold\n{markers.END}\n\nafter\n")
    monkeypatch.setattr(architecture_page, "RESULTS", results)
    monkeypatch.setattr(architecture_page, "PAGE", page)
    assert architecture_page.main(["--check"]) == 1
    assert architecture_page.main([]) == 0 and architecture_page.main(["--check"]) == 0
    text = page.read_text()
    assert "Of 5 model types, 2 have dense FFNs and an ONNX graph. In 1 every FFN is matched" in text
    assert "| a | A | 2 | silu gated | 2 | 2 | 2 | verified |" in text
    assert "x (cpu): a \\| b" in text and "| c | C | 2 |  | at file.py |" in text
    assert "| d | D | 2 x a norm inside |" in text and "| e | no defaults |" in text
    with pytest.raises(ValueError, match="results: begin"):
        markers.fill("no markers", "new")


def test_the_recorded_page_is_what_the_recorded_results_give() -> None:
    assert architecture_page.main(["--check"]) == 0


def test_finished_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    asked: list[str] = []

    def examined(model_type: str, *_: Any) -> Row:
        asked.append(model_type)
        return Row(model_type, model="M")

    monkeypatch.setattr(architectures, "apart", examined)
    assert architectures.main(["--out", str(out), "--types", "a,b"]) == 0
    assert architectures.main(["--out", str(out), "--types", "a,b,c"]) == 0
    assert asked == ["a", "b", "c"]
    assert [row["model_type"] for row in json.loads(out.read_text())["rows"]] == ["a", "b", "c"]


def test_recorded_results_reach_what_is_promised() -> None:
    rows = json.loads(architecture_page.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {row["model_type"] for row in rows} == set(model_types())
    graphs = [row for row in rows if architecture_page.has_graph(row)]
    assert len(graphs) >= 100
    assert not any(row["false"] for row in rows)
    assert [row["model_type"] for row in graphs if not architecture_page.all_matched(row)] == []
    # The whole export holds dense and sparse parity; random weights in 30 layers can be too much for the bound of float32.
    assert sum(map(architecture_page.verified, graphs)) >= 0.99 * len(graphs)
