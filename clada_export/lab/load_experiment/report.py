"""The result as a Markdown table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError

NAME = "load-experiment"
MARKS = {True: "lower", False: "higher"}


def tables(result: Mapping[str, Any]) -> str:
    """Two Markdown tables: the still baselines, and every arm against its own.

    Differences of KL are in percent of the baseline's, with their 95% interval over documents. An interval that does not
    contain 0 is bold; a dagger marks an arm whose sparsity could not be made equal.
    """
    return f"{_baselines(result)}\n\n{_arms(result)}"


def verdict(result: Mapping[str, Any]) -> str:
    """One paragraph: which arms lower or raise KL on all documents together, by their interval."""
    text = result["texts"][-1]
    named: dict[bool, list[str]] = {True: [], False: []}
    for arm in _compared(text):
        if not arm["equal_sparsity"]:
            continue
        if arm["high"] < 0 or arm["low"] > 0:
            named[arm["high"] < 0].append(f"{arm['name']} ({arm['group']}, {_percent(arm)})")
    parts = []
    for better, names in named.items():
        listed = "; ".join(names) if names else "none"
        parts.append(f"KL is {MARKS[better]} than without a response, by an interval without 0, with: {listed}.")
    return f"On {text['name']} ({text['documents']} documents): " + " ".join(parts)


def plot(result: Mapping[str, Any], path: Path, say: Callable[[str], None] = lambda text: None) -> bool:
    """Draw every arm's difference and interval, one panel a text; without matplotlib nothing is drawn, and that is said."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is missing (pip install 'clada-export[eval]')")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts: Sequence[Mapping[str, Any]] = result["texts"]
    rows = len(_compared(texts[0]))
    height = max(2.0, 0.24 * rows + 1.2)
    figure, panels = plt.subplots(
        1, len(texts), figsize=(3.4 * len(texts) + 2.6, height), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, text in zip(panels[0], texts, strict=True):
        arms = _compared(text)
        groups = list(dict.fromkeys(arm["group"] for arm in arms))
        for place, arm in enumerate(arms):
            middle, low, high = _shares(arm)
            color = f"C{groups.index(arm['group'])}"
            look = {"fmt": "o" if arm["equal_sparsity"] else "x", "color": color, "capsize": 2, "markersize": 4}
            panel.errorbar(middle, place, xerr=[[middle - low], [high - middle]], **look)
        panel.axvline(0.0, color="0.7", zorder=0)
        panel.set(title=f"{text['name']} ({text['documents']})", xlabel="KL against still, %")
    panels[0][0].set_yticks(range(rows), [f"{arm['group']}: {arm['name']}" for arm in _compared(texts[0])], fontsize=7)
    panels[0][0].invert_yaxis()
    figure.suptitle(f"{result['model']['name']}: responses to the load at {result['settings']['sparsity']:.0%} sparsity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def save(result: Mapping[str, Any], folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Write `load-experiment.json`, `.md` and, with matplotlib, `.png` into a folder, which is made.

    Args:
        say: told what could not be written.

    Raises:
        UsageError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        page = f"# {result['model']['name']}\n\n{verdict(result)}\n\n{tables(result)}\n"
        (folder / f"{NAME}.md").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{folder}: can't be written: {error.strerror or error}") from error
    plot(result, folder / f"{NAME}.png", say)


def _compared(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [arm for arm in text["arms"] if arm["group"] != "baseline"]


def _shares(arm: Mapping[str, Any]) -> tuple[float, float, float]:
    """Difference, low and high in percent of the baseline's KL; an interval without bounds has no width."""
    base = max(arm["baseline_kl"], 1e-12)
    middle = 100 * arm["difference"] / base
    bounds = [100 * arm[key] / base if abs(arm[key]) != float("inf") else middle for key in ("low", "high")]
    return middle, bounds[0], bounds[1]


def _percent(arm: Mapping[str, Any]) -> str:
    middle, low, high = _shares(arm)
    return f"{middle:+.1f}% [{low:+.1f}, {high:+.1f}]"


def _baselines(result: Mapping[str, Any]) -> str:
    lines = [
        "| baseline | text | documents | tokens | skipped | KL, nats a token | perplexity | top-1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for text in result["texts"]:
        for arm in text["arms"]:
            if arm["group"] == "baseline":
                numbers = f"{arm['sparsity']:.1%} | {arm['kl']:.4f} | {arm['ppl_increase']:+.2%} | {arm['top1']:.1%}"
                lines.append(
                    f"| {arm['method']} | {text['name']} | {text['documents']} | {text['scored_tokens']} | {numbers} |"
                )
    return "\n".join(lines)


def _arms(result: Mapping[str, Any]) -> str:
    texts = result["texts"]
    names = " | ".join(str(text["name"]) for text in texts)
    lines = [f"| arm | dense steps | {names} |", "| --- " * (2 + len(texts)) + "|"]
    group = ""
    for place, first in enumerate(texts[0]["arms"]):
        if first["group"] == "baseline":
            continue
        if first["group"] != group:
            group = first["group"]
            lines.append(f"| *{group}* | " + "| " * len(texts) + "|")
        cells = []
        for text in texts:
            arm = text["arms"][place]
            cell = _percent(arm) + ("" if arm["equal_sparsity"] else " †")
            cells.append(f"**{cell}**" if arm["high"] < 0 or arm["low"] > 0 else cell)
        dense = texts[-1]["arms"][place]["dense_steps"]
        lines.append(f"| {first['name']} | {f'{dense:.1%}' if dense else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)
