"""Markdown tables of a result of `benchmarks.decode`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

PPL_RISE, DECODE_SPEEDUP, DENSE_DECODE, DENSE_PROMPT = 0.03, 1.15, 0.10, 0.30
EXPORT_SECONDS, EXPORT_BYTES = 300.0, 4e9
BUDGET = "ppl=2%"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; with `numbers` every column but the first is aligned to the right."""
    lines = [_line(head), _line(["---", *["---:" if numbers else "---"] * (len(head) - 1)])]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def speed_table(result: dict[str, Any]) -> str:
    """Speed, and beside it quality."""
    head = [
        "engine",
        "ms a token, p50 (p90)",
        "tokens/s",
        "decode against the peer",
        f"TTFT, {result['settings']['prompt_tokens']} tokens",
        f"prompt of {result['settings']['long_prompt_tokens']}",
        "perplexity (rise ± error)",
        "KL",
        "top-1",
        "neurons skipped",
    ]
    rows = []
    for contestant in result["contestants"]:
        speed, quality = contestant["speed"], contestant["quality"]["all"]
        ratio, is_peer = speed["speedup"]["decode"], "engine" not in contestant
        rise = f"{quality['ppl']:.2f}" + (
            "" if is_peer else f" ({quality['ppl_increase']:+.2%} ± {quality['ppl_increase_error']:.2%})"
        )
        rows.append(
            [
                contestant["name"],
                f"{speed['itl_p50_ms']:.1f} ({speed['itl_p90_ms']:.1f})",
                f"{speed['tokens_per_s']:.1f}",
                "1" if is_peer else f"**{ratio['median']:.2f}x** ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{speed['ttft_ms']:.0f} ms",
                f"{speed['prompt_ms']:.0f} ms",
                rise,
                "" if is_peer else f"{quality['kl']:.4f}",
                "" if is_peer else f"{quality['top1']:.1%}",
                "" if is_peer else f"{quality['sparsity']:.1%}",
            ]
        )
    return markdown(head, rows)


def text_table(result: dict[str, Any]) -> str:
    """Quality on each text."""
    rows = []
    for text in result["texts"]:
        for contestant in result["contestants"][1:]:
            if contestant["load"] == "dense":
                continue
            quality = contestant["quality"]["texts"][text["name"]]
            rows.append(
                [
                    text["name"],
                    contestant["name"],
                    str(quality["tokens"]),
                    f"{quality['dense_ppl']:.2f}",
                    f"{quality['ppl']:.2f}",
                    f"{quality['ppl_increase']:+.2%} ± {quality['ppl_increase_error']:.2%}",
                    f"{quality['kl']:.4f}",
                    f"{quality['top1']:.1%}",
                    f"{quality['sparsity']:.1%}",
                ]
            )
    return markdown(["text", "engine", "tokens", "peer's perplexity", "perplexity", "rise", "KL", "top-1", "skipped"], rows)


def export_table(result: dict[str, Any]) -> str:
    """What the exports cost."""
    peer = result["peer_export"]
    rows = [
        [
            "peer (trace only)",
            f"{peer['seconds']:.0f} s",
            f"{peer['peak_bytes'] / 1e9:.2f} GB",
            f"{peer['bytes'] / 1e6:.0f} MB",
            "",
            "",
        ]
    ]
    for record in result["exports"]:
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in record["stages"].items() if seconds >= 0.5)
        rows.append(
            [
                f"{record['label']}, {record['budget']}, score `{record['score']}`",
                f"{record['seconds']:.0f} s",
                f"{record['peak_bytes'] / 1e9:.2f} GB",
                f"{record['bytes'] / 1e6:.0f} MB",
                f"{record['expected_sparsity']:.1%}",
                stages,
            ]
        )
    return markdown(["export", "time", "peak memory", "on disk", "sparsity by calibration", "seconds by stage"], rows)


@dataclass(frozen=True)
class Requirement:
    """A requirement, what was found, and whether that meets it."""

    engine: str
    what: str
    wanted: str
    found: str
    met: bool


def requirements(result: dict[str, Any]) -> list[Requirement]:
    """The requirements that the project set itself, for every engine with the budget that they are about."""
    prompt = result["settings"]["long_prompt_tokens"]
    found = []
    for record in result["exports"]:
        if record["budget"] != BUDGET:
            continue
        label = record["label"]
        sparse, dense = _contestant(result, label, "auto"), _contestant(result, label, "dense")
        if sparse is not None:
            rise, ratio = sparse["quality"]["all"]["ppl_increase"], sparse["speed"]["speedup"]["decode"]["median"]
            found.append(
                Requirement(
                    label, "perplexity rise on unseen text", f"at most {PPL_RISE:.0%}", f"{rise:+.2%}", rise <= PPL_RISE
                )
            )
            found.append(
                Requirement(
                    label, "decode against the peer", f"at least {DECODE_SPEEDUP}x", f"{ratio:.2f}x", ratio >= DECODE_SPEEDUP
                )
            )
        if dense is not None:
            for part, what, limit in (
                ("decode", "decode at load +inf, time over the peer's", DENSE_DECODE),
                ("prompt", f"prompt of {prompt} tokens, time over the peer's", DENSE_PROMPT),
            ):
                over = 1.0 / dense["speed"]["speedup"][part]["median"] - 1.0
                found.append(Requirement(label, what, f"at most {limit:+.0%}", f"{over:+.1%}", over <= limit))
        seconds, peak = record["seconds"], record["peak_bytes"]
        found.append(
            Requirement(label, "export time", f"at most {EXPORT_SECONDS:.0f} s", f"{seconds:.0f} s", seconds <= EXPORT_SECONDS)
        )
        found.append(
            Requirement(
                label, "export memory", f"at most {EXPORT_BYTES / 1e9:.0f} GB", f"{peak / 1e9:.2f} GB", peak <= EXPORT_BYTES
            )
        )
    return found


def requirement_table(result: dict[str, Any]) -> str:
    """The requirements beside what was found."""
    rows = [
        [item.engine, item.what, item.wanted, item.found, "met" if item.met else "**missed**"] for item in requirements(result)
    ]
    return markdown(["engine", "requirement", "wanted", "found", ""], rows)


def _contestant(result: dict[str, Any], engine: str, load: str) -> dict[str, Any] | None:
    return next((one for one in result["contestants"] if one.get("engine") == engine and one["load"] == load), None)
