"""The decode benchmark from end to end on a tiny model, and the page that is made of its results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decode, make_page
from benchmarks.child import ChildFailedError, run_child
from benchmarks.quality import PROMPT, Quality, cut
from benchmarks.table import requirements
from clada_export.calibration.text import default_text
from clada_export.errors import UsageError
from clada_export.runtime import load_engine
from tests.benchmarks.tiny import write_tiny_llama

SMALL = [
    *("--dtype", "float32", "--rounds", "2", "--prompt-tokens", "24", "--long-prompt-tokens", "40", "--new-tokens", "6"),
    *("--budget", "sparsity=0.5", "--windows", "2", "--window-tokens", "64", "--threads", "1"),
    *(f"--export-argument={text}" for text in ("--calibration-context=64", "--no-load-response", "--quiet")),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, Any]]:
    """The work folder, the arguments, and the result of a small benchmark."""
    work = tmp_path_factory.mktemp("decode")
    write_tiny_llama(work / "tiny")
    (work / "text.txt").write_text(default_text()[:20000])
    places = {"--model": work / "tiny", "--text": work / "text.txt", "--work": work, "--results": work / "results"}
    arguments = [part for name, path in places.items() for part in (name, str(path))]
    assert decode.main([*arguments, *SMALL]) == 0
    return work, [*arguments, *SMALL], json.loads((work / "results" / "tiny.json").read_text())


def test_the_result_has_speed_beside_quality(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    work, _, result = run
    assert [one["name"] for one in result["contestants"]] == ["peer", "float32, dense", "float32, auto"]
    peer, dense, sparse = result["contestants"]
    scored = 2 * (64 - PROMPT - 1)
    for one in result["contestants"]:
        assert one["quality"]["all"]["tokens"] == scored
        assert len(one["speed"]["rounds"]["itl_p50_ms"]) == 2
        ratio = one["speed"]["speedup"]["decode"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert peer["speed"]["speedup"]["decode"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert peer["quality"]["all"]["kl"] == 0
    # Load +inf is the dense model; load 0 is not.
    assert abs(dense["quality"]["all"]["ppl_increase"]) < 1e-4 and dense["quality"]["all"]["top1"] == 1
    assert sparse["quality"]["all"]["kl"] > 1e-4
    assert 0.2 < sparse["quality"]["all"]["sparsity"] < 0.8 and len(sparse["quality"]["all"]["layer_sparsity"]) == 2
    assert 0.2 < sparse["speed"]["sparsity"] < 0.8 and dense["speed"]["sparsity"] == 0
    assert result["exports"][0]["peak_bytes"] > 1e8 and result["peer_export"]["seconds"] > 0
    assert str(work) not in json.dumps(result)


def test_quality_is_that_of_scoring_by_the_engine(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    work, _, result = run
    engine = load_engine(work / "tiny" / "engine-float32-sparsity-0.5", threads=1)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode((work / "text.txt").read_text(), special_tokens=False)
    rows = cut("text", "", ids, 2, 64).rows
    scores = [row[1:] for row in engine.score(rows, load="auto", prompt_length=PROMPT)]
    assert np.exp(-np.mean(scores)) == pytest.approx(result["contestants"][2]["quality"]["all"]["ppl"], rel=1e-5)


def test_a_second_run_keeps_every_part(
    run: tuple[Path, list[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, arguments, result = run

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a part was done again")

    for name in ("run_child", "measure", "race"):
        monkeypatch.setattr(decode, name, fail)
    assert decode.main(arguments) == 0
    assert json.loads((arguments_path(arguments) / "tiny.json").read_text()) == result
    assert capsys.readouterr().err.count("kept from before") == 6
    with pytest.raises(AssertionError, match="done again"):
        decode.main([*arguments, "--fresh", "speed"])


def arguments_path(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--results") + 1])


def test_the_page_states_requirements_beside_results(run: tuple[Path, list[str], dict[str, Any]]) -> None:
    result = copy.deepcopy(run[2])
    result["exports"][0]["budget"] = "ppl=2%"
    sparse = result["contestants"][2]
    sparse["quality"]["all"]["ppl_increase"] = 0.031
    sparse["speed"]["speedup"]["decode"]["median"] = 1.16
    found = {item.what: item.met for item in requirements(result)}
    assert not found["perplexity rise on unseen text"] and found["decode against the peer"]
    page = make_page.page([result], set())
    assert "| float32 | perplexity rise on unseen text | at most 3% | +3.10% | **missed** |" in page
    assert "| float32 | decode against the peer | at least 1.15x | 1.16x | met |" in page
    assert "No results" in make_page.page([], set())


def test_the_recorded_page_is_what_the_recorded_results_give() -> None:
    assert make_page.PAGE.read_text() == make_page.current()


def test_windows_need_text() -> None:
    assert [row[0] for row in cut("t", "", list(range(200)), 3, 50).rows] == [0, 75, 150]
    with pytest.raises(UsageError, match="100 tokens; 3 windows of 50"):
        cut("t", "", list(range(100)), 3, 50)


def test_quality_numbers() -> None:
    quality = Quality()
    wanted = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    quality.add(found, wanted, np.array([0, 0]))
    summary = quality.summary()
    assert summary["ppl"] == pytest.approx((0.25 * 0.9) ** -0.5)
    assert summary["ppl_increase"] == pytest.approx(2**0.5 - 1)
    assert summary["kl"] == pytest.approx(0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), rel=1e-5)


def test_a_child_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError, match="exit code 2"):
        run_child("clada_export.cli:main_export", [str(tmp_path / "none.gguf"), "--quiet"], tmp_path / "cost.json")


def test_memory_of_a_child_is_its_own(tmp_path: Path) -> None:
    ballast = np.ones(60_000_000)
    _, cost = run_child("benchmarks.make_page:main", ["--check"], tmp_path / "cost.json")
    assert 1e6 < cost.peak_bytes < ballast.nbytes
