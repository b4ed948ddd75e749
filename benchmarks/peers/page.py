"""docs/peers.md and its pictures, from the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS
from benchmarks.environment import ROOT
from benchmarks.table import markdown

PAGE = ROOT / "docs" / "peers.md"
LOOKS = {"clada": ("C0", "o", "clada-export"), "llama": ("C1", "s", "llama.cpp"), "genai": ("C2", "^", "onnxruntime-genai")}

_HEAD = """# Beside other engines

What a user would pick instead: llama.cpp (through `llama-cpp-python`, its own loop left out) and onnxruntime-genai. Every
engine is made from the same full-precision weights by its own quantiser, runs in a process of its own, and takes turns with the
others, round after round. Quality is held against the model in float32, token by token after a prompt of {prompt} tokens. Made
by `python -m benchmarks.peers` from the results in `benchmarks/results/peers-*.json`.
"""


def speed_of(engine: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The shortest prompt that was measured, and its times."""
    lengths = sorted(engine.get("speed", {}), key=int)
    return (lengths[0], engine["speed"][lengths[0]]) if lengths else None


def table(result: dict[str, Any]) -> str:
    """A line for each engine; what was not measured is left empty."""
    lengths = sorted({length for engine in result["engines"] for length in engine.get("speed", {})}, key=int)
    head = ["engine", "GB", "KL", "perplexity", "top-1"]
    for length in lengths:
        head += [f"ms a token after {length}", f"TTFT, {length}"]
    rows = []
    for engine in result["engines"]:
        quality = engine.get("quality", {}).get("all")
        row = [engine["name"], f"{engine['bytes'] / 1e9:.2f}"]
        row += (
            [f"{quality['kl']:.4f}", f"{quality['ppl']:.2f} ({quality['ppl_increase']:+.1%})", f"{quality['top1']:.1%}"]
            if quality
            else ["", "", ""]
        )
        for length in lengths:
            times = engine.get("speed", {}).get(length)
            row += [_spread(times["ms"]), f"{times['ttft_ms']['median']:.0f} ms"] if times else ["", ""]
        rows.append(row)
    return markdown(head, rows)


def _spread(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})"


def plot(result: dict[str, Any], path: Path, say: Callable[[str], None] = lambda text: None) -> bool:
    """Quality against tokens a second; without matplotlib nothing is drawn, and that is said."""
    measured = [(engine, speed_of(engine)) for engine in result["engines"] if engine.get("quality")]
    points = [(engine, speed[1]) for engine, speed in measured if speed]
    if not points:
        return False
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is missing (pip install 'clada-export[eval]')")
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "clada"  # the same result gives the same bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    seen = set()
    for engine, times in points:
        color, marker, label = LOOKS[engine["kind"]]
        ms, kl = times["ms"], max(engine["quality"]["all"]["kl"], 1e-7)
        speed = 1e3 / ms["median"]
        bars = [[speed - 1e3 / ms["high"]], [1e3 / ms["low"] - speed]]
        known = engine["kind"] in seen
        seen.add(engine["kind"])
        axes.errorbar(speed, kl, xerr=bars, fmt=marker, color=color, capsize=3, label=None if known else label)
        axes.annotate(engine["name"], (speed, kl), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens a second", ylabel="KL to the float32 model, nats a token", yscale="log")
    axes.set_title(f"{result['model']} on {result['machine']['cpu']}, threads: {result['machine']['threads']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return True


def _section(result: dict[str, Any], picture: str | None) -> str:
    machine, settings = result["machine"], result["settings"]
    texts = ", ".join(
        f"{text['windows']} windows of {text['window_tokens']} tokens of {text['name']}" for text in result["texts"]
    )
    loads = [times["load_average"] for engine in result["engines"] for times in engine.get("speed", {}).values()]
    busy = f" The load average was at most {max(loads):.1f}." if loads else ""
    lines = [
        f"## {result['model']}",
        "",
        f"{machine['cpu']} ({', '.join(machine['features'])}), {machine['cores']} cores, {machine['threads']} threads. "
        f"{texts}; {settings['new_tokens']} new tokens, {settings['rounds']} rounds: "
        f"the median of the rounds' medians (lowest to highest).{busy}",
        "",
        table(result),
    ]
    if picture:
        lines += ["", f"![Quality against speed, {result['model']}]({picture})"]
    return "\n".join(lines) + "\n"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of this benchmark, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("peers-*.json"))]


def write_page(folder: Path = RESULTS, page: Path = PAGE, say: Callable[[str], None] = lambda text: None) -> None:
    """Write the page, and a picture beside each result that has quality and speed."""
    sections = []
    results: Sequence[dict[str, Any]] = read_results(folder)
    for result in results:
        picture = folder / f"peers-{result['model']}.svg"
        drawn = plot(result, picture, say) or picture.is_file()
        relative = Path("..") / picture.relative_to(ROOT) if picture.is_relative_to(ROOT) else picture
        sections.append(_section(result, relative.as_posix() if drawn else None))
    prompt = results[0]["settings"]["scored_after"] if results else 0
    page.write_text(_HEAD.format(prompt=prompt) + "\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    write_page(say=print)
