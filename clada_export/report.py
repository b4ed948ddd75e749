"""`report.json`, `report.html` and the model card of an export folder.

The HTML page is one file without scripts: its charts are inline SVG, and it asks nothing of the network. Nothing here depends
on the clock or the machine but what was timed in a calibration, so the same export gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from clada_export.manifest import Manifest

REPORT_JSON, REPORT_HTML, MODEL_CARD = "report.json", "report.html", "README.md"

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
    (folder / REPORT_HTML).write_text(_page(report), encoding="utf-8")


def _finite(value: Any) -> Any:
    """The value with numbers that JSON does not have as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _page(report: Mapping[str, Any]) -> str:
    model = str(report.get("model", ""))
    plan = report.get("plan") or {}
    calibration = report.get("calibration") or {}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(model)} - clada-export report</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(model)}</h1>",
        _subtitle(plan, calibration),
        _tiles(report),
        _warnings(report.get("warnings") or []),
        _verification(report.get("verification") or {}),
        _drift(report.get("verification") or {}, calibration),
        _layers(plan),
        _auto(calibration.get("auto") or {}),
        _search(calibration),
        _load_response(plan, calibration),
        _matches(report.get("rewrite") or {}),
        _engine(report.get("engine") or {}),
        _timings(report.get("timings") or {}),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _subtitle(plan: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    facts = [
        ("policy", plan.get("policy")),
        ("score", plan.get("score")),
        ("rule", plan.get("rule")),
        ("budget", calibration.get("budget")),
        ("allocation", calibration.get("allocation")),
        ("calibration text", calibration.get("text")),
    ]
    shown = " · ".join(f"{name} <code>{escape(str(value))}</code>" for name, value in facts if value)
    return f'<p class="sub">{shown}</p>' if shown else ""


def _tiles(report: Mapping[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    layers = (report.get("plan") or {}).get("layers") or []
    neurons = sum(_width(layer) for layer in layers)
    if neurons:
        skipped = sum(_width(layer) * layer.get("expected_sparsity", 0.0) for layer in layers)
        tiles.append(("neurons skipped at load 0", _percent(skipped / neurons)))
    rewrite = report.get("rewrite") or {}
    if rewrite:
        matched = len(rewrite.get("ffns", []))
        tiles.append(("FFNs compiled", f"{matched}/{matched + len(rewrite.get('misses', []))}"))
    verification = report.get("verification") or {}
    drift = verification.get("drift") or {}
    if "ppl_increase" in drift:
        tiles.append(("change of perplexity", f"{drift['ppl_increase']:+.2%}"))
    if "kl" in drift:
        tiles.append(("KL, nats a token", _number(drift["kl"])))
    if "top1" in drift:
        tiles.append(("same best token", _percent(drift["top1"])))
    if verification:
        checks = verification.get("checks", [])
        tiles.append(("checks passed", f"{sum(bool(check['passed']) for check in checks)}/{len(checks)}"))
    items = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in tiles)
    return f'<div class="tiles">{items}</div>' if tiles else ""


def _warnings(warnings: Sequence[Any]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(str(warning))}</li>" for warning in warnings)
    return f'<h2>Warnings</h2><ul class="warnings">{items}</ul>'


def _verification(verification: Mapping[str, Any]) -> str:
    if not verification:
        return '<h2>Verification</h2><p class="bad">Not verified.</p>'
    rows = []
    for check in verification.get("checks", []):
        mark = '<span class="ok">✓ pass</span>' if check["passed"] else '<span class="bad">✗ fail</span>'
        name = escape(str(check["name"]))
        if check.get("why"):
            name += f'<br><span class="bad">{escape(str(check["why"]))}</span>'
        bounds = check.get("bound") or {}
        found = [f"{key} {_number(_found(check.get('numbers') or {}, key))}" for key in bounds]
        if ties := (check.get("numbers") or {}).get("ties"):
            found.append(f"parted at a tie: {_number(ties)}")
        allowed = [f"{'≥' if key in _LEAST else '≤'} {_number(bound)}" for key, bound in bounds.items()]
        numbers = "<br>".join(f"{escape(key)} {escape(value)}" for key, value in _flat(check.get("numbers") or {}))
        details = f"<details><summary>numbers</summary>{numbers}</details>" if numbers else ""
        rows.append([mark, name, "<br>".join(map(escape, found)) or "no bound", "<br>".join(map(escape, allowed)), details])
    table = _table(("", "check", "found", "allowed", ""), rows)
    return f"<h2>Verification</h2>{table}{_deferred(verification)}"


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
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(_number(item) for item in value)
        else:
            yield f"{prefix}{key}", _number(value)


def _deferred(verification: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(str(text))}</li>" for text in verification.get("deferred") or [])
    return f'<p class="bad">Not checked yet:</p><ul>{items}</ul>' if items else ""


def _drift(verification: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    """The engine's drift beside the one that calibration simulated."""
    engine, simulated = verification.get("drift") or {}, calibration.get("drift") or {}
    if not engine and not simulated:
        return ""
    keys = [*engine, *(key for key in simulated if key not in engine)]

    def cell(values: Mapping[str, Any], key: str) -> str:
        value = values.get(key)
        if isinstance(value, list | tuple):
            return escape(", ".join(_number(item) for item in value))
        return escape(_number(value))

    rows = [[escape(key), cell(engine, key), cell(simulated, key)] for key in keys]
    return (
        "<h2>Drift from the dense model</h2>"
        + _table(("", "engine, as deployed", "simulated in calibration"), rows, numeric=(1, 2))
        + '<p class="note">As deployed: the prompt runs dense, each later token at the load of the text so far. '
        "Simulated: the same with masks, on the held-out part of the calibration text. KL in nats a token.</p>"
    )


def _layers(plan: Mapping[str, Any]) -> str:
    layers = plan.get("layers") or []
    if not layers:
        return ""
    names = [str(layer["name"]) for layer in layers]
    sparsity = [float(layer.get("expected_sparsity", 0.0)) for layer in layers]
    cett = [float(layer.get("expected_cett", 0.0)) for layer in layers]
    return (
        "<h2>Layers</h2>"
        + _bars("Share of neurons skipped at load 0", names, sparsity, "#2f6db5", 1.0)
        + _bars("CETT: relative error of the FFN output, mean over tokens", names, cett, "#b5622f", None)
    )


def _bars(title: str, names: Sequence[str], values: Sequence[float], colour: str, top: float | None) -> str:
    """A bar chart as SVG, one bar a layer in the model's order; the name shows when the pointer rests on it."""
    width, height, left, bottom, head = 860, 190, 46, 24, 26
    plot_width, plot_height = width - left - 6, height - bottom - head
    top = top or _round_up(max(values))
    slot = plot_width / len(values)
    parts = [f'<text x="{left}" y="14">{escape(title)}</text>']
    for tick in range(5):
        y = head + plot_height * (1 - tick / 4)
        parts.append(f'<line x1="{left}" x2="{width - 6}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e8ed"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tick * 25:.3g}%</text>')
    every = max(1, math.ceil(len(values) / 32))
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        x, bar = left + index * slot, plot_height * min(max(value / top, 0.0), 1.0)
        parts.append(
            f'<rect x="{x + slot * 0.12:.2f}" y="{head + plot_height - bar:.2f}" width="{slot * 0.76:.2f}" height="{bar:.2f}" '
            f'fill="{colour}"><title>{escape(name)}: {_percent(value)}</title></rect>'
        )
        if index % every == 0:
            parts.append(f'<text x="{x + slot / 2:.2f}" y="{height - 8}" text-anchor="middle">{index}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten, so that quarters of the axis read well."""
    if value < 1e-12 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))


def _auto(auto: Mapping[str, Any]) -> str:
    """How `--policy auto` came to its choice."""
    if not auto:
        return ""
    rows = []
    for item in auto.get("candidates") or []:
        name = f"<code>{escape(str(item['policy']))}</code>"
        numbers = [
            "" if item.get(key) is None else form(item[key])
            for key, form in (
                ("sparsity", _percent),
                ("kl", _number),
                ("ppl_increase", lambda value: f"{value:+.2%}"),
                ("relative_bytes", lambda value: f"x{value:.3f}"),
                ("seconds", lambda value: f"{value:.1f}"),
            )
        ]
        why = escape(str(item["why"]))
        outcome = f'<span class="ok">{why}</span>' if item.get("chosen") else why
        ways = [escape(str(item.get(key) or "")) for key in ("variant", "allocation")]
        rows.append([name, *ways, *numbers, outcome])
    head = ("policy", "variant", "how the layers share", "sparsity", "KL", "perplexity", "bytes read", "seconds", "")
    clock = auto.get("clock") or {}
    timed = str(clock.get("text") or (f"Not timed: {clock['left_out']}" if clock.get("left_out") else ""))
    note = f'<p class="note">{escape(timed[:1].upper() + timed[1:])}.</p>' if timed else ""
    return (
        f"<h2>Choice of the policy for {escape(str(auto.get('goal', '')))}</h2>"
        + f"<p>Taken: {escape(str(auto.get('rule', '')))}.</p>"
        + _table(head, rows, numeric=(3, 4, 5, 6, 7))
        + note
    )


def _search(calibration: Mapping[str, Any]) -> str:
    parts = []
    compared = calibration.get("compared") or []
    if compared:
        rows = [
            [escape(str(item["variant"])), escape(str(item["allocation"])), _percent(item["sparsity"]), _number(item["kl"])]
            for item in compared
        ]
        head = ("variant", "how the layers share", "sparsity", "KL")
        parts.append("<h2>What was compared</h2>" + _table(head, rows, numeric=(2, 3)))
    steps = calibration.get("search") or []
    if steps:
        in_percent = str(calibration.get("budget", "")).startswith("ppl")
        costs = [_percent(step["cost"], 2) if in_percent else _number(step["cost"]) for step in steps]
        rows = [
            [str(index + 1), _percent(step["sparsity"]), cost, _number(step["kl"])]
            for index, (step, cost) in enumerate(zip(steps, costs, strict=True))
        ]
        unit = "rise of perplexity + 1 standard error" if in_percent else "KL + 1 standard error"
        heading = f"<h2>Search for the budget {escape(str(calibration.get('budget', '')))}</h2>"
        parts.append(heading + _table(("step", "sparsity", unit, "KL"), rows, numeric=(1, 2, 3)))
    return "".join(parts)


def _load_response(plan: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    tried = calibration.get("load_response") or []
    signal = plan.get("load") or {}
    if not tried and not signal:
        return ""
    parts = ["<h2>Load response</h2>"]
    if signal:
        weights = (signal.get("surprisal_weight", 0.0), signal.get("entropy_weight", 0.0))
        chosen = f"weights: surprisal {_number(weights[0])}, entropy {_number(weights[1])}"
        parts.append(f"<p>{escape(chosen)}{'' if any(weights) else ' (the automatic load is 0: no response was better)'}</p>")
    rows = [
        [
            escape(str(item.get("signal", ""))),
            *(escape(_number(item.get(key))) for key in ("slope", "kl", "kl_without", "gain", "standard_error")),
            escape(_percent(item["sparsity"])) if "sparsity" in item else "",
            '<span class="ok">yes</span>' if item.get("better") else "no",
        ]
        for item in tried
    ]
    if rows:
        head = ("signal", "slope", "KL", "KL without", "gain", "standard error", "sparsity", "better")
        parts.append(_table(head, rows, numeric=(1, 2, 3, 4, 5, 6)))
    return "".join(parts)


def _matches(rewrite: Mapping[str, Any]) -> str:
    if not rewrite:
        return ""
    rows = [
        [
            f"<code>{escape(str(item['name']))}</code>",
            escape(str(item["kind"])),
            f"{int(item['hidden_size'])} x {int(item['intermediate_size'])}",
            f"{int(item['nodes_before'])} → {int(item['nodes_after'])}",
            _bytes(item["weight_bytes"]),
            _bytes(item["constant_bytes"]),
            f"<code>{escape(str(item['shares_weights_with']))}</code>" if item.get("shares_weights_with") else "",
        ]
        for item in rewrite.get("ffns", [])
    ]
    head = ["FFN", "kind", "hidden x neurons", "nodes", "weights", "score constants", "shares weights with"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    parts = ["<h2>Feed-forward layers in the graph</h2>"]
    if rewrite.get("nodes_before"):
        parts.append(f"<p>Nodes of the graph: {int(rewrite['nodes_before'])} before, {int(rewrite['nodes_after'])} after.</p>")
    misses = rewrite.get("misses", [])
    if misses:
        missed = [[f"<code>{escape(str(item['name']))}</code>", escape(str(item["reason"]))] for item in misses]
        parts.append('<p class="bad">Left dense:</p>' + _table(("FFN", "reason"), missed))
    if rows:
        parts.append(f"<p>Compiled: {len(rows)}.</p>" + _table(head, rows, numeric=(2, 3, 4, 5)))
    return "".join(parts)


def _engine(engine: Mapping[str, Any]) -> str:
    if not engine:
        return ""
    plugin = engine.get("plugin")
    rows = [["built by", f"{escape(str(engine['package']))} {escape(str(engine['version']))}"]]
    rows += [
        [f"<code>{escape(file['file'])}</code>", escape(", ".join(file["compute_capabilities"]))] for file in engine["files"]
    ]
    rows += [
        [f"profile {escape(item['name'])}", escape(", ".join(f"{key} {item[key]}" for key in ("batch", "sequence", "past")))]
        for item in engine["profiles"]
    ]
    rows.append(["plugin", escape(f"{plugin['namespace']}::{plugin['name']}, {plugin['layers']} layers" if plugin else "none")])
    rows += [[escape(tool), f"<code>{escape(command)}</code>"] for tool, command in engine["commands"].items()]
    return "<h2>TensorRT engine</h2>" + _table(("", ""), rows)


def _timings(timings: Mapping[str, Any]) -> str:
    if not timings:
        return ""
    rows = [[escape(str(stage)), f"{float(seconds):.1f}"] for stage, seconds in timings.items()]
    return "<h2>Time of the stages</h2>" + _table(("stage", "seconds"), rows, numeric=(1,))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """An HTML table; the cells of `rows` are HTML, those of `head` are text."""
    classes = ['class="n"' if index in numeric else "" for index in range(len(head))]
    first = "".join(f"<th {kind}>{escape(name)}</th>" for kind, name in zip(classes, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'.replace("<th >", "<th>").replace("<td >", "<td>")


def _number(value: Any) -> str:
    """Three significant digits; whole numbers in full."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.3g}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}%}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def write_model_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md`: YAML front matter for the Hugging Face Hub, how to run the engine, and what it costs in quality.

    Args:
        folder: an existing folder.
        manifest: the export's manifest; `files` need not be filled in.
    """
    source = manifest.source
    matter: dict[str, Any] = {"library_name": "clada-export", "pipeline_tag": "text-generation"}
    if source["kind"] == "hub":
        matter["base_model"] = source["name"]
    if source.get("license"):
        matter["license"] = source["license"]
    matter["tags"] = ["clada", "onnx", "onnxruntime" if manifest.engine is None else "tensorrt", "activation-sparsity"]
    # JSON strings and lists are YAML too.
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in matter.items())
    plan = manifest.sparsity_plan()
    name = _markdown(str(source["name"]))
    revision = f" (revision `{source['revision']}`)" if source.get("revision") else ""
    layers = f"{len(plan.layers)} layers, {plan.expected_sparsity:.1%} of their neurons skipped at load 0"
    kind, stored = ("An ONNX", "FFN weights") if manifest.engine is None else ("A TensorRT", "model")
    text = f"""---
{front}
---
# {name}, compiled by clada-export

{kind} engine of {name}{revision} whose feed-forward layers compute only the neurons that a token needs:
{layers} (policy `{plan.policy}`, score `{plan.score}`, {stored} in {manifest.dtype}).
The run-time input `load` moves that share; `+inf` is the dense model.

## Run it

{_use(manifest)}
## Fidelity

{_fidelity(manifest)}
`report.html` has all checks and every layer; `clada.json` is the manifest, with the sha256 of every file. The
library in this folder is a program: load it only if you trust where the folder came from.
{_warning_list(manifest.warnings)}"""
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def _use(manifest: Manifest) -> str:
    command = '    clada run . --prompt "Once upon a time"\n\n' if manifest.tokenizer else ""
    example = '"Once upon a time", 64).texts[0]' if manifest.tokenizer else "[[1, 2, 3]], 64).tokens[0]"
    text = f"""{command}```python
from clada_export import load_engine

engine = load_engine(".")
print(engine.generate({example})
```
"""
    if manifest.engine is not None:
        return text + _use_tensorrt(manifest.engine)
    if manifest.library is None:
        return text
    inputs = "\n".join(
        f"| `{_cell(item.name)}` | {item.dtype} | {_cell(', '.join(map(str, item.shape)))} |"
        for item in manifest.inputs
        if item.name not in {tensor.past for tensor in manifest.cache}
    )
    return f"""{text}
In plain ONNX Runtime, without clada-export:

```python
import onnxruntime as ort

options = ort.SessionOptions()
options.register_custom_ops_library("./{manifest.library}")
session = ort.InferenceSession("{manifest.model}", options)
```

| input | type | shape |
| --- | --- | --- |
{inputs}

The key-value cache is input and output too; its names and shapes are under `cache` in `clada.json`. `load` is +inf for a dense
token (the prompt), -inf for padding, a number otherwise. Without the library the graph runs too, by the function body of
`{manifest.op["domain"]}::{manifest.op["name"]}` in standard operators: the same numbers, none of the speed.
"""


def _use_tensorrt(engine: Mapping[str, Any]) -> str:
    plugin = engine["plugin"]
    gpus = "; ".join(f"`{file['file']}`: {', '.join(file['compute_capabilities'])}" for file in engine["files"])
    register = ""
    if plugin is not None and not plugin["embedded"]:
        register = f'runtime.get_plugin_registry().load_library("./{plugin["file"]}")\n'
    elif plugin is not None:
        register = "runtime.engine_host_code_allowed = True  # the plugin library is in the engine file\n"
    shells = "\n".join(f"    {command}\n" for command in engine["commands"].values())
    return f"""
The engine is for {engine["package"]} {engine["version"]} and GPUs of these compute capabilities: {gpus}.
In plain TensorRT, without clada-export:

```python
import {engine["backend"]} as trt

runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
{register}engine = runtime.deserialize_cuda_engine(open("{engine["files"][0]["file"]}", "rb").read())
```

or by its tools, in this folder:

{shells}
The key-value cache is input and output too; its names and shapes are under `cache` in `clada.json`, the optimisation profiles
under `engine`. `load` is +inf for a dense token (the prompt), -inf for padding, a number otherwise. `model.onnx` is the graph
that the engine was built from.
"""


def _fidelity(manifest: Manifest) -> str:
    drift = manifest.drift
    if not drift:
        return "This export was not verified.\n"
    rows = [
        ("perplexity, dense", "dense_ppl", "{:.2f}"),
        ("perplexity, this engine", "ppl", "{:.2f}"),
        ("rise of perplexity", "ppl_increase", "{:+.2%}"),
        ("KL(dense, sparse), nats a token", "kl", "{:.4f}"),
        ("same best token", "top1", "{:.1%}"),
        ("neurons skipped", "sparsity", "{:.1%}"),
        ("tokens measured", "tokens", "{:.0f}"),
    ]
    lines = [f"| {name} | {form.format(drift[key])} |" for name, key, form in rows if isinstance(drift.get(key), int | float)]
    checks = manifest.verification.get("checks", [])
    passed = sum(bool(check.get("passed")) for check in checks if isinstance(check, dict))
    weights = "FFN weights" if manifest.engine is None else "weights"
    rounded = "" if manifest.dtype == "float32" else f", its {weights} rounded to {manifest.dtype}"
    intro = f"Against the source model in eager PyTorch (float32{rounded}), decoding token by token under the automatic load:"
    outcome = [f"{passed} of {len(checks)} checks passed.", ""] if checks else []
    if manifest.engine is not None:
        intro = f"The ONNX graph on a CPU, a{intro[1:]}"
        outcome += [f"{_markdown(text)}.\n" for text in manifest.verification.get("deferred", [])]
    return "\n".join([intro, "", "| | |", "| --- | --- |", *lines, "", *outcome])


def _warning_list(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return "\n## Warnings\n\n" + "".join(f"- {_markdown(warning)}\n" for warning in warnings)


def _markdown(text: str) -> str:
    """Text on one line, with Markdown's and HTML's own characters taken literally."""
    return "".join(f"\\{char}" if char in r"\`*_[]<>#|" else char for char in " ".join(text.split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def _width(layer: Mapping[str, Any]) -> int:
    """The neurons that the engine holds of a layer."""
    return int(layer.get("kept_neurons") or layer["intermediate_size"])
