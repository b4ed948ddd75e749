"""`report.json` and `report.html` of an export folder.

The HTML page is one file without scripts: its charts are inline SVG, and it asks nothing of the network. What it shows comes
from models and plans of strangers, so it is put together from pieces that escape by default (`clada_export.artifact.html`).
Nothing here depends on the clock or the machine but what was timed in a calibration, so the same export gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clada_export.artifact.html import NOTHING, Markup, bars, code, html, joined, number, percent, size, table

REPORT_JSON, REPORT_HTML = "report.json", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2530; background: #fff; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.sub, .note { color: #5a6673; } .note { font-size: .88rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #d6dce3; border-radius: 6px; padding: .5rem .9rem; } .tile b { display: block; font-size: 1.25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #e4e8ed; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.ok { color: #1a7f4b; font-weight: 600; } .bad { color: #b3261e; font-weight: 600; }
code { font: .88em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
ul.warnings { background: #fff6e0; border: 1px solid #ecd9a6; border-radius: 6px; padding: .6rem .8rem .6rem 2rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: #5a6673; }
summary { cursor: pointer; color: #5a6673; }
"""

# Where a check keeps the number that a bound is for, when the two have different names.
_BOUND_PLACES = {"max_abs": ("same_neurons", "max_abs"), "kl_after_a_flip": ("after_a_flip", "kl")}
_LEAST = ("equal_prefix",)
"""Bounds that are a least value; all others are a greatest one."""
_BREAK = Markup("<br>")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and `report.html`.

    Args:
        folder: an existing folder.
        report: `model` (str), `plan`, `verification`, `rewrite` (the `to_dict()` of `SparsityPlan`, `Verification` and
            `RewriteReport`), `calibration` (dict), `engine` (as in the manifest), `warnings` (list of str), and
            where wanted `timings` (seconds by stage). What is missing or empty is left out of the page.
    """
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    # A name from a file system may hold bytes that are no UTF-8.
    (folder / REPORT_HTML).write_text(_page(report), encoding="utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    """The value with numbers that JSON does not have as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _page(report: Mapping[str, Any]) -> Markup:
    model = str(report.get("model", ""))
    plan = report.get("plan") or {}
    calibration = report.get("calibration") or {}
    verification = report.get("verification") or {}
    parts = [
        Markup("<!DOCTYPE html>"),
        Markup('<html lang="en"><head><meta charset="utf-8">')
        + Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        html("<title>{} - clada-export report</title><style>{}</style></head><body>", model, Markup(_STYLE)),
        html("<h1>{}</h1>", model),
        _subtitle(plan, calibration),
        _tiles(report),
        _warnings(report.get("warnings") or []),
        _verification(verification),
        _drift(verification, calibration),
        _layers(plan),
        _auto(calibration.get("auto") or {}),
        _search(calibration),
        _load_response(plan, calibration),
        _matches(report.get("rewrite") or {}),
        _engine(report.get("engine") or {}),
        _timings(report.get("timings") or {}),
        Markup("</body></html>"),
    ]
    return joined((part for part in parts if part), "\n") + "\n"


def _subtitle(plan: Mapping[str, Any], calibration: Mapping[str, Any]) -> Markup:
    facts = [
        ("policy", plan.get("policy")),
        ("score", plan.get("score")),
        ("rule", plan.get("rule")),
        ("budget", calibration.get("budget")),
        ("allocation", calibration.get("allocation")),
        ("calibration text", calibration.get("text")),
    ]
    shown = joined((html("{} {}", name, code(value)) for name, value in facts if value), " · ")
    return html('<p class="sub">{}</p>', shown) if shown else NOTHING


def _tiles(report: Mapping[str, Any]) -> Markup:
    tiles: list[tuple[str, str]] = []
    layers = (report.get("plan") or {}).get("layers") or []
    neurons = sum(_width(layer) for layer in layers)
    if neurons:
        skipped = sum(_width(layer) * layer.get("expected_sparsity", 0.0) for layer in layers)
        tiles.append(("neurons skipped at load 0", percent(skipped / neurons)))
    rewrite = report.get("rewrite") or {}
    if rewrite:
        matched = len(rewrite.get("ffns", []))
        tiles.append(("FFNs compiled", f"{matched}/{matched + len(rewrite.get('misses', []))}"))
    verification = report.get("verification") or {}
    drift = verification.get("drift") or {}
    if "ppl_increase" in drift:
        tiles.append(("change of perplexity", f"{drift['ppl_increase']:+.2%}"))
    if "kl" in drift:
        tiles.append(("KL, nats a token", number(drift["kl"])))
    if "top1" in drift:
        tiles.append(("same best token", percent(drift["top1"])))
    if verification:
        checks = verification.get("checks", [])
        tiles.append(("checks passed", f"{sum(bool(check['passed']) for check in checks)}/{len(checks)}"))
    items = joined(html('<div class="tile"><b>{}</b>{}</div>', value, name) for name, value in tiles)
    return html('<div class="tiles">{}</div>', items) if tiles else NOTHING


def _warnings(warnings: Sequence[Any]) -> Markup:
    if not warnings:
        return NOTHING
    return html('<h2>Warnings</h2><ul class="warnings">{}</ul>', joined(html("<li>{}</li>", text) for text in warnings))


def _verification(verification: Mapping[str, Any]) -> Markup:
    if not verification:
        return Markup('<h2>Verification</h2><p class="bad">Not verified.</p>')
    rows = []
    for check in verification.get("checks", []):
        passed, why = check["passed"], check.get("why")
        mark = Markup('<span class="ok">✓ pass</span>') if passed else Markup('<span class="bad">✗ fail</span>')
        name = html('{}<br><span class="bad">{}</span>', check["name"], why) if why else html("{}", check["name"])
        bounds, numbers = check.get("bound") or {}, check.get("numbers") or {}
        found = [f"{key} {number(_found(numbers, key))}" for key in bounds]
        if ties := numbers.get("ties"):
            found.append(f"parted at a tie: {number(ties)}")
        allowed = [f"{'≥' if key in _LEAST else '≤'} {number(bound)}" for key, bound in bounds.items()]
        shown = _BREAK.join(f"{key} {value}" for key, value in _flat(numbers))
        details = html("<details><summary>numbers</summary>{}</details>", shown) if shown else NOTHING
        rows.append([mark, name, _BREAK.join(found) or "no bound", _BREAK.join(allowed), details])
    checks = table(("", "check", "found", "allowed", ""), rows)
    return html("<h2>Verification</h2>{}{}", checks, _deferred(verification))


def _found(numbers: Mapping[str, Any], bound: str) -> Any:
    if bound in numbers:
        value = numbers[bound]
        return min(value) if isinstance(value, list | tuple) and value else value
    outer, inner = _BOUND_PLACES.get(bound, (bound, bound))
    nested = numbers.get(outer)
    return nested.get(inner) if isinstance(nested, Mapping) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _numbers(value)


def _numbers(value: Any) -> str:
    return ", ".join(number(item) for item in value) if isinstance(value, list | tuple) else number(value)


def _deferred(verification: Mapping[str, Any]) -> Markup:
    items = joined(html("<li>{}</li>", text) for text in verification.get("deferred") or [])
    return html('<p class="bad">Not checked yet:</p><ul>{}</ul>', items) if items else NOTHING


def _drift(verification: Mapping[str, Any], calibration: Mapping[str, Any]) -> Markup:
    """The engine's drift beside the one that calibration simulated."""
    engine, simulated = verification.get("drift") or {}, calibration.get("drift") or {}
    if not engine and not simulated:
        return NOTHING
    keys = [*engine, *(key for key in simulated if key not in engine)]
    rows = [[key, _numbers(engine.get(key)), _numbers(simulated.get(key))] for key in keys]
    note = Markup(
        '<p class="note">As deployed: the prompt runs dense, each later token at the load of the text so far. '
        "Simulated: the same with masks, on the held-out part of the calibration text. KL in nats a token.</p>"
    )
    drifts = table(("", "engine, as deployed", "simulated in calibration"), rows, numeric=(1, 2))
    return html("<h2>Drift from the dense model</h2>{}{}", drifts, note)


def _layers(plan: Mapping[str, Any]) -> Markup:
    layers = plan.get("layers") or []
    if not layers:
        return NOTHING
    names = [str(layer["name"]) for layer in layers]
    sparsity = [float(layer.get("expected_sparsity", 0.0)) for layer in layers]
    cett = [float(layer.get("expected_cett", 0.0)) for layer in layers]
    return html(
        "<h2>Layers</h2>{}{}",
        bars("Share of neurons skipped at load 0", names, sparsity, "#2f6db5", 1.0),
        bars("CETT: relative error of the FFN output, mean over tokens", names, cett, "#b5622f", None),
    )


def _auto(auto: Mapping[str, Any]) -> Markup:
    """How `--policy auto` came to its choice."""
    if not auto:
        return NOTHING
    rows = []
    for item in auto.get("candidates") or []:
        numbers = [
            "" if item.get(key) is None else form(item[key])
            for key, form in (
                ("sparsity", percent),
                ("kl", number),
                ("ppl_increase", lambda value: f"{value:+.2%}"),
                ("relative_bytes", lambda value: f"x{value:.3f}"),
                ("seconds", lambda value: f"{value:.1f}"),
            )
        ]
        outcome = html('<span class="ok">{}</span>', item["why"]) if item.get("chosen") else item["why"]
        ways = [item.get(key) or "" for key in ("variant", "allocation")]
        rows.append([code(item["policy"]), *ways, *numbers, outcome])
    head = ("policy", "variant", "how the layers share", "sparsity", "KL", "perplexity", "bytes read", "seconds", "")
    clock = auto.get("clock") or {}
    timed = str(clock.get("text") or (f"Not timed: {clock['left_out']}" if clock.get("left_out") else ""))
    return html(
        "<h2>Choice of the policy for {}</h2><p>Taken: {}.</p>{}{}",
        auto.get("goal", ""),
        auto.get("rule", ""),
        table(head, rows, numeric=(3, 4, 5, 6, 7)),
        html('<p class="note">{}.</p>', timed[:1].upper() + timed[1:]) if timed else NOTHING,
    )


def _search(calibration: Mapping[str, Any]) -> Markup:
    parts = []
    compared = calibration.get("compared") or []
    if compared:
        rows = [[item["variant"], item["allocation"], percent(item["sparsity"]), number(item["kl"])] for item in compared]
        head = ("variant", "how the layers share", "sparsity", "KL")
        parts.append(html("<h2>What was compared</h2>{}", table(head, rows, numeric=(2, 3))))
    steps = calibration.get("search") or []
    if steps:
        budget = str(calibration.get("budget", ""))
        in_percent = budget.startswith("ppl")
        costs = [percent(step["cost"], 2) if in_percent else number(step["cost"]) for step in steps]
        found = [
            [str(index + 1), percent(step["sparsity"]), cost, number(step["kl"])]
            for index, (step, cost) in enumerate(zip(steps, costs, strict=True))
        ]
        unit = "rise of perplexity + 1 standard error" if in_percent else "KL + 1 standard error"
        shown = table(("step", "sparsity", unit, "KL"), found, numeric=(1, 2, 3))
        parts.append(html("<h2>Search for the budget {}</h2>{}", budget, shown))
    return joined(parts)


def _load_response(plan: Mapping[str, Any], calibration: Mapping[str, Any]) -> Markup:
    tried = calibration.get("load_response") or []
    signal = plan.get("load") or {}
    if not tried and not signal:
        return NOTHING
    parts = [Markup("<h2>Load response</h2>")]
    if signal:
        weights = (signal.get("surprisal_weight", 0.0), signal.get("entropy_weight", 0.0))
        still = "" if any(weights) else " (the automatic load is 0: no response was better)"
        parts.append(html("<p>weights: surprisal {}, entropy {}{}</p>", number(weights[0]), number(weights[1]), still))
    rows = [
        [
            item.get("signal", ""),
            *(number(item.get(key)) for key in ("slope", "kl", "kl_without", "gain", "standard_error")),
            percent(item["sparsity"]) if "sparsity" in item else "",
            Markup('<span class="ok">yes</span>') if item.get("better") else "no",
        ]
        for item in tried
    ]
    if rows:
        head = ("signal", "slope", "KL", "KL without", "gain", "standard error", "sparsity", "better")
        parts.append(table(head, rows, numeric=(1, 2, 3, 4, 5, 6)))
    return joined(parts)


def _matches(rewrite: Mapping[str, Any]) -> Markup:
    if not rewrite:
        return NOTHING
    rows = [
        [
            code(item["name"]),
            item["kind"],
            f"{int(item['hidden_size'])} x {int(item['intermediate_size'])}",
            f"{int(item['nodes_before'])} → {int(item['nodes_after'])}",
            size(item["weight_bytes"]),
            size(item["constant_bytes"]),
            code(item["shares_weights_with"]) if item.get("shares_weights_with") else NOTHING,
        ]
        for item in rewrite.get("ffns", [])
    ]
    head = ["FFN", "kind", "hidden x neurons", "nodes", "weights", "score constants", "shares weights with"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    parts = [Markup("<h2>Feed-forward layers in the graph</h2>")]
    if rewrite.get("nodes_before"):
        nodes = (int(rewrite["nodes_before"]), int(rewrite["nodes_after"]))
        parts.append(html("<p>Nodes of the graph: {} before, {} after.</p>", *nodes))
    misses = rewrite.get("misses", [])
    if misses:
        missed = [[code(item["name"]), item["reason"]] for item in misses]
        parts.append(html('<p class="bad">Left dense:</p>{}', table(("FFN", "reason"), missed)))
    if rows:
        parts.append(html("<p>Compiled: {}.</p>{}", len(rows), table(head, rows, numeric=(2, 3, 4, 5))))
    return joined(parts)


def _engine(engine: Mapping[str, Any]) -> Markup:
    if not engine:
        return NOTHING
    plugin = engine.get("plugin")
    rows: list[list[object]] = [["built by", f"{engine['package']} {engine['version']}"]]
    rows += [[code(file["file"]), ", ".join(file["compute_capabilities"])] for file in engine["files"]]
    rows += [
        [f"profile {item['name']}", ", ".join(f"{key} {item[key]}" for key in ("batch", "sequence", "past"))]
        for item in engine["profiles"]
    ]
    rows.append(["plugin", f"{plugin['namespace']}::{plugin['name']}, {plugin['layers']} layers" if plugin else "none"])
    rows += [[tool, code(command)] for tool, command in engine["commands"].items()]
    return html("<h2>TensorRT engine</h2>{}", table(("", ""), rows))


def _timings(timings: Mapping[str, Any]) -> Markup:
    if not timings:
        return NOTHING
    rows = [[stage, f"{float(seconds):.1f}"] for stage, seconds in timings.items()]
    return html("<h2>Time of the stages</h2>{}", table(("stage", "seconds"), rows, numeric=(1,)))


def _width(layer: Mapping[str, Any]) -> int:
    """The neurons that the engine holds of a layer."""
    return int(layer.get("kept_neurons") or layer["intermediate_size"])
