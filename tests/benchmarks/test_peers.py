"""The benchmark of engines side by side, on stand-ins for engines and tools."""

from __future__ import annotations

import json
import math
import stat
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import page
from benchmarks.peers.build import build_genai, build_llama
from benchmarks.peers.client import Contestant, Worker
from benchmarks.peers.race import Rounds, race, summary
from benchmarks.peers.runner import Logits, Runner
from benchmarks.peers.score import quality, reference_logits
from benchmarks.peers.worker import answer
from benchmarks.quality import PROMPT, Windows
from clada_export.errors import BackendError, UsageError, VerificationError

VOCABULARY = 11


class Counter(Runner):
    """The token after n is n + 1; a `tilt` of the logits makes it another model with the same best token."""

    def __init__(self, tilt: float = 0.0, width: int = VOCABULARY) -> None:
        self.tilt, self.width, self.seen = tilt, width, []  # type: ignore[var-annotated]

    def start(self, prompt: Sequence[int]) -> Logits:
        self.seen = list(prompt[:-1])
        return self.step(prompt[-1])

    def step(self, token: int) -> Logits:
        self.seen.append(token)
        logits = np.zeros(self.width, np.float32)
        logits[(token + 1) % VOCABULARY] = 4.0 + self.tilt
        return logits


class Local:
    """A worker without a process."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.calls = runner, 0

    def logits(self, tokens: Sequence[int], prompt: int, path: Path) -> Logits:
        self.calls += 1
        answer(self.runner, {"tokens": list(tokens), "prompt": prompt, "logits": str(path)})
        found: Logits = np.load(path)
        return found


def stand_in(folder: Path, body: str) -> str:
    """A Python that runs `body` whatever it is asked to run."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, pathlib, sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_runner_decodes_greedily_and_scores_a_given_text() -> None:
    runner = Counter()
    first, steps = runner.decode([3, 4], 5)
    assert runner.seen == [3, 4, 5, 6, 7, 8, 9] and len(steps) == 5 and min(first, *steps) > 0
    tokens = [1, 2, 3, 9, 9, 5]
    scored = runner.score(tokens, 2)
    assert runner.seen == tokens[:-1]
    assert scored.argmax(-1).tolist() == [4, 10, 10], "after tokens 2, 3, 4"


WINDOWS = [
    Windows("count", "a", [[n % VOCABULARY for n in range(s, s + PROMPT + 9)] for s in (0, 5)]),
    Windows("still", "b", [[3] * (PROMPT + 5)]),
]


def test_quality_is_of_the_tokens_after_the_prompt(tmp_path: Path) -> None:
    reference_logits(Local(Counter()), WINDOWS, tmp_path)
    same = quality(Local(Counter()), WINDOWS, tmp_path)
    assert same["all"]["kl"] == 0 and same["all"]["top1"] == 1 and same["all"]["ppl_increase"] == 0
    assert same["texts"]["count"]["tokens"] == 2 * 8 and same["all"]["tokens"] == 20

    def logs(size: float) -> np.ndarray:
        logits = np.array([size] + [0.0] * (VOCABULARY - 1))
        return logits - math.log(np.exp(logits).sum())

    seen: list[tuple[int, int]] = []
    other = quality(Local(Counter(tilt=1.0)), WINDOWS, tmp_path, lambda *done: seen.append(done))
    kl = float((np.exp(logs(4.0)) * (logs(4.0) - logs(5.0))).sum())
    assert other["all"]["kl"] == pytest.approx(kl, rel=1e-5)
    assert other["texts"]["count"]["ppl"] == pytest.approx(math.exp(-logs(5.0)[0]), rel=1e-5)
    assert other["texts"]["still"]["ppl"] == pytest.approx(math.exp(-logs(5.0)[1]), rel=1e-5), "where the best token is wrong"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_wider_vocabulary_is_cut_and_a_narrower_one_refused(tmp_path: Path) -> None:
    worker = Local(Counter())
    reference_logits(worker, WINDOWS, tmp_path)
    reference_logits(worker, WINDOWS, tmp_path)
    assert worker.calls == 3, "what is there is kept"
    assert quality(Local(Counter(width=VOCABULARY + 5)), WINDOWS, tmp_path)["all"]["kl"] == 0
    with pytest.raises(VerificationError, match=r"\[8, 11\]; the model has \[8, 13\]"):
        wide = tmp_path / "wide"
        reference_logits(Local(Counter(width=13)), WINDOWS, wide)
        quality(worker, WINDOWS, wide)


class Clock:
    """Says how long it took, and remembers the order of all."""

    order: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds

    def time(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        self.order.append((self.name, prompt[0]))
        self.seconds += 0.001
        return {"ttft_s": 1.0, "step_s": [self.seconds] * new_tokens}


def test_engines_take_turns_and_an_interrupted_race_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.race.SETTLE_S", 0.0)
    monkeypatch.setattr(Clock, "order", [])
    done: dict[str, Rounds] = {}
    prompts = {128: [[0], [1], [2]], 512: [[10], [11], [12]]}

    class StopError(Exception):
        pass

    kept: list[int] = []

    def stop() -> None:
        kept.append(len(Clock.order))
        if len(kept) == 3:
            raise StopError

    with pytest.raises(StopError):
        race({"a": Clock("a", 0.01), "b": Clock("b", 0.02)}, done, prompts, 4, stop)
    wanted = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 10), ("b", 10), ("a", 11), ("b", 11)]
    assert Clock.order == wanted, "a warm-up, then rounds that begin with each in turn"

    Clock.order.clear()
    again = json.loads(json.dumps(done))
    race({"a": Clock("a", 0.01), "b": Clock("b", 0.02)}, again, prompts, 4, lambda: None)
    assert Clock.order == [("a", 10), ("b", 10), ("b", 12), ("a", 12)], "the last round alone"
    assert again["a"]["128"] == done["a"]["128"]

    found = summary(again["a"])
    assert found["128"]["rounds"] == 2 and found["128"]["ttft_ms"]["median"] == 1000
    assert found["128"]["ms"] == pytest.approx({"median": 12.5, "low": 12.0, "high": 13.0})


def test_a_worker_is_asked_over_its_pipes(tmp_path: Path) -> None:
    python = stand_in(
        tmp_path,
        """print(json.dumps({"ready": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps({"ttft_s": 1, "step_s": task["prompt"], "asked": sys.argv[1:]}), flush=True)""",
    )
    with Worker(Contestant("x", "clada", "/engine", python, "dense"), 3) as worker:
        told = worker.time([5, 6], 2)
    assert told["step_s"] == [5, 6]
    assert told["asked"] == ["-m", "benchmarks.peers.worker", "clada", "/engine", "3", "dense"]


def test_a_real_worker_keeps_what_an_engine_prints_out_of_its_answers(tmp_path: Path) -> None:
    """The module itself, with an engine that writes to stdout as C libraries do."""
    (tmp_path / "noisy.py").write_text(
        """import os
from benchmarks.peers.runner import Runner
import numpy as np
class Noisy(Runner):
    def start(self, prompt):
        os.write(1, b"loading\\n")
        return np.eye(5, dtype=np.float32)[prompt[-1]]
    def step(self, token):
        print("step")
        return np.eye(5, dtype=np.float32)[(token + 1) % 5]
def open_runner(path, threads, load):
    return Noisy()
"""
    )
    launch = tmp_path / "python"
    launch.write_text(
        f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(tmp_path)!r})
from benchmarks.peers import worker
worker.KINDS["clada"] = "noisy"
sys.exit(worker.main(sys.argv[3:]))
"""
    )
    launch.chmod(0o755)
    with Worker(Contestant("noisy", "clada", "-", str(launch)), 1) as worker:
        assert len(worker.time([1, 2], 3)["step_s"]) == 3
        logits = worker.logits([0, 1, 2, 3, 4], 2, tmp_path / "logits.npy")
    assert logits.argmax(-1).tolist() == [3, 4]


def test_an_engine_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"Q4: its process ended with exit code 3"):
        Worker(Contestant("Q4", "llama", "x", stand_in(tmp_path, "sys.exit(3)")), 1)
    with pytest.raises(BackendError, match=r"Q4: its process ended with exit code 4"):
        python = stand_in(tmp_path, "print('{}', flush=True)\nsys.stdin.readline()\nsys.exit(4)")
        with Worker(Contestant("Q4", "llama", "x", python), 1) as worker:
            worker.time([1], 1)


def test_engines_on_the_command_line() -> None:
    pythons = {"llama": "/venv/python"}
    found = command.contestant("ours int8=clada:/a b/c@-0.5", pythons)
    assert (found.name, found.kind, found.path, found.load) == ("ours int8", "clada", "/a b/c", "-0.5")
    assert found.python == sys.executable
    assert command.contestant("Q8_0=llama:x.gguf", pythons).python == "/venv/python"
    for bad in ("x", "x=llama", "x=llama:", "=llama:x", "x=tgi:y", "x=llama:y@1"):
        with pytest.raises(UsageError, match="wanted NAME=KIND:PATH"):
            command.contestant(bad, pythons)


def test_peers_are_made_once_by_their_own_tools(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tool = stand_in(
        tmp_path,
        f"""a = sys.argv[1:]
open({str(log)!r}, "a").write(json.dumps(a) + "\\n")
if "--outfile" in a: pathlib.Path(a[a.index("--outfile") + 1]).write_text("f32")
elif "-o" in a: pathlib.Path(a[a.index("-o") + 1]).mkdir()
else: pathlib.Path(a[-2]).write_text(a[-1])""",
    )
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):
        assert [path.read_text() for path in build_llama("model", work, ["Q8_0", "Q4_0"], tool, Path("convert.py"))] == [
            "Q8_0",
            "Q4_0",
        ]
        assert [path.name for path in build_genai("model", work, ["int4"], tool)] == ["genai-int4"]
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 4, "the second time all is there"
    assert calls[0][:2] == ["convert.py", "model"] and calls[0][-2:] == ["--outtype", "f32"]
    assert not list(work.glob("*.part"))
    with pytest.raises(BackendError, match="exit code 7"):
        list(build_genai("model", work, ["fp32"], stand_in(tmp_path, "sys.exit(7)")))
    assert not (work / "genai-fp32").exists()


def test_a_whole_measurement_is_kept_engine_by_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Fake(Local):
        def __init__(self, each: Contestant, threads: int) -> None:
            super().__init__(Counter(tilt=0.1 * each.name.count("4")))
            opened.append(each.name)

        def time(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
            return answer(self.runner, {"prompt": list(prompt), "new_tokens": new_tokens})

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(command, "Worker", Fake)
    monkeypatch.setattr("benchmarks.peers.race.SETTLE_S", 0.0)
    monkeypatch.setattr(command, "windows_of", lambda model, options: (WINDOWS, [[n % VOCABULARY for n in range(90)]]))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"12345")
    parser = command._parser()

    def options(*more: str) -> Namespace:
        fixed = ["measure", "models/Tiny", "--work", str(tmp_path / "work"), "--prompt-tokens", "8", "--rounds", "2"]
        return parser.parse_args([*fixed, "--new-tokens", "3", *more])

    one, two = ("--engine", f"Q8=llama:{file}"), ("--engine", f"Q4=llama:{file}")
    first = command.measure(options(*one))
    assert opened == ["the model", "Q8", "Q8"]
    assert first["engines"][0]["bytes"] == 5 and first["model"] == "Tiny"
    opened.clear()
    second = command.measure(options(*one, *two))
    assert opened == ["the model", "Q4", "Q4"], "what was measured before is kept"
    assert second["engines"][0] == first["engines"][0]
    assert second["engines"][1]["quality"]["all"]["kl"] > 0
    opened.clear()
    file.write_bytes(b"123456")
    command.measure(options(*one, "--parts", "speed"))
    assert opened == ["Q8"], "another file is another engine"

    page_path, results = tmp_path / "peers.md", tmp_path / "results"
    results.mkdir()
    (results / "peers-Tiny.json").write_text(json.dumps(second))
    page.write_page(results, page_path)
    text = page_path.read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| Q8 ", "| Q4 "))]
    assert len(rows) == 2 and "| 0.0000 |" in rows[0] and "100.0%" in rows[1]
    assert "## Tiny" in text and f"after a prompt of {PROMPT} tokens" in text


def test_a_table_leaves_out_what_was_not_measured() -> None:
    times = {"ms": {"median": 5.0, "low": 4.0, "high": 6.0}, "ttft_ms": {"median": 100.0}, "load_average": 0.1}
    engines = [
        {"name": "fast", "kind": "clada", "bytes": 2e9, "speed": {"512": times, "128": times}},
        {
            "name": "other",
            "kind": "genai",
            "bytes": 1e9,
            "quality": {"all": {"kl": 0.5, "ppl": 9.0, "ppl_increase": 0.1, "top1": 0.9}},
        },
    ]
    head, _, fast, other = page.table({"engines": engines}).splitlines()
    assert head.index("after 128") < head.index("after 512")
    assert fast == "| fast | 2.00 |  |  |  | 5.0 (4.0 to 6.0) | 100 ms | 5.0 (4.0 to 6.0) | 100 ms |"
    assert other == "| other | 1.00 | 0.5000 | 9.00 (+10.0%) | 90.0% |  |  |  |  |"
    assert not page.plot({"engines": engines}, Path("nowhere.svg"))
