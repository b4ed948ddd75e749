"""What the page of a report shows, in the words and numbers that it shows; `templates/report.html.jinja` says where.

The values come from models and plans of strangers. They are text here, and the templates escape all text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clada_export.artifact.bar_chart import BarChart
from clada_export.artifact.formats import number, numbers, percent, size

TEMPLATES = Path(__file__).parent / "templates"

# Where a check keeps the number that a bound is for, when the two have different names.
_BOUND_PLACES = {"max_abs": ("same_neurons", "max_abs"), "kl_after_a_flip": ("after_a_flip", "kl")}
_LEAST = ("equal_prefix",)
"""Bounds that are a least value; all others are a greatest one."""


def page(report: Mapping[str, Any]) -> str:
    """The HTML page of a report, as `write_report` takes it."""
    return _environment().get_template("report.html.jinja").render(_shown(report))


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"number": number, "percent": percent, "size": size}
    return found


def _shown(report: Mapping[str, Any]) -> dict[str, Any]:
    plan, calibration, verification = (report.get(key) or {} for key in ("plan", "calibration", "verification"))
    rewrite = report.get("rewrite") or {}
    auto = calibration.get("auto") or {}
    return {
        "model": str(report.get("model", "")),
        "facts": _facts(plan, calibration),
        "tiles": [*_layer_tiles(plan, rewrite), *_verification_tiles(verification)],
        "warnings": report.get("warnings") or [],
        "verification": verification,
        "checks": [_check(check) for check in verification.get("checks", [])],
        "drift": _drift(verification.get("drift") or {}, calibration.get("drift") or {}),
        "charts": _charts(plan.get("layers") or []),
        "calibration": calibration,
        "auto": auto,
        "candidates": [_candidate(candidate) for candidate in auto.get("candidates") or []],
        "timed": _timed(auto.get("clock") or {}),
        **_search(calibration),
        "signal": _signal(plan.get("load") or {}),
        "responses": [_response(response) for response in calibration.get("load_response") or []],
        "rewrite": rewrite,
        "engine": report.get("engine") or {},
        "timings": report.get("timings") or {},
    }


def _facts(plan: Mapping[str, Any], calibration: Mapping[str, Any]) -> list[tuple[str, Any]]:
    facts = [
        ("policy", plan.get("policy")),
        ("score", plan.get("score")),
        ("rule", plan.get("rule")),
        ("budget", calibration.get("budget")),
        ("allocation", calibration.get("allocation")),
        ("calibration text", calibration.get("text")),
    ]
    return [(name, value) for name, value in facts if value]


def _layer_tiles(plan: Mapping[str, Any], rewrite: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    layers = plan.get("layers") or []
    if neurons := sum(_width(layer) for layer in layers):
        skipped = sum(_width(layer) * layer.get("expected_sparsity", 0.0) for layer in layers)
        yield "neurons skipped at load 0", percent(skipped / neurons)
    if rewrite:
        matched = len(rewrite.get("ffns", []))
        yield "FFNs compiled", f"{matched}/{matched + len(rewrite.get('misses', []))}"


def _verification_tiles(verification: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    drift = verification.get("drift") or {}
    if "ppl_increase" in drift:
        yield "change of perplexity", f"{drift['ppl_increase']:+.2%}"
    if "kl" in drift:
        yield "KL, nats a token", number(drift["kl"])
    if "top1" in drift:
        yield "same best token", percent(drift["top1"])
    if verification:
        checks = verification.get("checks", [])
        yield "checks passed", f"{sum(bool(check['passed']) for check in checks)}/{len(checks)}"


def _width(layer: Mapping[str, Any]) -> int:
    """The neurons that the engine holds of a layer."""
    return int(layer.get("kept_neurons") or layer["intermediate_size"])


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    bounds, measured = check.get("bound") or {}, check.get("numbers") or {}
    found = [f"{key} {number(_found(measured, key))}" for key in bounds]
    if ties := measured.get("ties"):
        found.append(f"parted at a tie: {number(ties)}")
    return {
        "name": check["name"],
        "passed": check["passed"],
        "why": check.get("why"),
        "found": found,
        "allowed": [f"{'≥' if key in _LEAST else '≤'} {number(bound)}" for key, bound in bounds.items()],
        "numbers": list(_flat(measured)),
    }


def _found(measured: Mapping[str, Any], bound: str) -> Any:
    if bound in measured:
        value = measured[bound]
        return min(value) if isinstance(value, list | tuple) and value else value
    outer, inner = _BOUND_PLACES.get(bound, (bound, bound))
    nested = measured.get(outer)
    return nested.get(inner) if isinstance(nested, Mapping) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", numbers(value)


def _drift(engine: Mapping[str, Any], simulated: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The engine's drift beside the one that calibration simulated."""
    keys = [*engine, *(key for key in simulated if key not in engine)]
    return [(key, numbers(engine.get(key)), numbers(simulated.get(key))) for key in keys]


def _charts(layers: Sequence[Mapping[str, Any]]) -> list[BarChart]:
    if not layers:
        return []
    names = [str(layer["name"]) for layer in layers]
    sparsity = [float(layer.get("expected_sparsity", 0.0)) for layer in layers]
    cett = [float(layer.get("expected_cett", 0.0)) for layer in layers]
    return [
        BarChart("Share of neurons skipped at load 0", names, sparsity, "#2f6db5", top=1.0),
        BarChart("CETT: relative error of the FFN output, mean over tokens", names, cett, "#b5622f"),
    ]


def _candidate(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """What `--policy auto` tried."""
    forms = (
        ("sparsity", percent),
        ("kl", number),
        ("ppl_increase", "{:+.2%}".format),
        ("relative_bytes", "x{:.3f}".format),
        ("seconds", "{:.1f}".format),
    )
    return {
        "policy": candidate["policy"],
        "variant": candidate.get("variant") or "",
        "allocation": candidate.get("allocation") or "",
        "numbers": ["" if candidate.get(key) is None else form(candidate[key]) for key, form in forms],
        "chosen": candidate.get("chosen"),
        "why": candidate["why"],
    }


def _timed(clock: Mapping[str, Any]) -> str:
    """How the candidates were timed, or why not."""
    text = str(clock.get("text") or (f"Not timed: {clock['left_out']}" if clock.get("left_out") else ""))
    return text[:1].upper() + text[1:]


def _search(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The search's steps; of plans from before budgets had several bounds what they took of the budget is not known."""
    steps = [
        {
            "sparsity": percent(step["sparsity"]),
            "cost": "" if step.get("ppl_increase") is None else percent(step["cost"]),
            "ppl_increase": "" if step.get("ppl_increase") is None else percent(step["ppl_increase"], 2),
            "kl": number(step["kl"]),
        }
        for step in calibration.get("search") or []
    ]
    return {"steps": steps}


def _signal(load: Mapping[str, Any]) -> dict[str, float]:
    if not load:
        return {}
    return {"surprisal": load.get("surprisal_weight", 0.0), "entropy": load.get("entropy_weight", 0.0)}


def _response(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response to load that calibration tried."""
    texts = [number(response.get(key)) for key in ("slope", "kl", "kl_without", "gain", "standard_error")]
    sparsity = percent(response["sparsity"]) if "sparsity" in response else ""
    return {"signal": response.get("signal", ""), "numbers": [*texts, sparsity], "better": response.get("better")}
