"""The model card of an export folder: `README.md`, as the Hugging Face Hub shows it.

Names, reasons and file names come from models and plans of strangers. All that `templates/README.md.jinja` is given was escaped
before, but what is Markdown and says so (`Markdown`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from clada_export.artifact.manifest import Manifest

MODEL_CARD = "README.md"
_TEMPLATE = Path(__file__).parent / "templates" / "README.md.jinja"
_SPECIAL = frozenset(r"\`*_[]<>#|&~!$")
_DRIFT = (
    ("perplexity, dense", "dense_ppl", ".2f"),
    ("perplexity, this engine", "ppl", ".2f"),
    ("rise of perplexity", "ppl_increase", "+.2%"),
    ("KL(dense, sparse), nats a token", "kl", ".4f"),
    ("same best token", "top1", ".1%"),
    ("neurons skipped", "sparsity", ".1%"),
    ("tokens measured", "tokens", ".0f"),
)


class Markdown(str):
    """Text that is Markdown already, and is taken as it is."""

    __slots__ = ()


def escaped(value: Any) -> Any:
    """The value as a template may take it: text on one line, with Markdown's and HTML's own characters taken literally.

    Args:
        value: text, `Markdown`, numbers, None, and lists, tuples and mappings of them; keys of mappings are ours.
    """
    if isinstance(value, Markdown):
        return value
    if isinstance(value, str):
        return Markdown("".join(f"\\{char}" if char in _SPECIAL else char for char in " ".join(value.split())))
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(item) for item in value]
    return value


def code(text: object) -> Markdown:
    """A code span. Nothing within one can be escaped, so what would end it is replaced."""
    return Markdown(f"`{' '.join(str(text).split()).replace('`', chr(39)) or ' '}`")


def _cell(text: object) -> Markdown:
    """A code span within a table."""
    return Markdown(code(text).replace("|", "\\|"))


def _literal(text: str) -> Markdown:
    """A string of Python within a block of code, on one line whatever it holds."""
    return Markdown(json.dumps(text))


class _OneLineData(ModelCardData):
    """The header with each value quoted and on one line: a line of a multi-line text could be the end of the header."""

    def to_yaml(self, line_break: str | None = None, original_order: list[str] | None = None) -> str:
        fields = self.to_dict()  # type: ignore[no-untyped-call]
        return str(yaml.safe_dump(fields, sort_keys=False, default_style='"', width=math.inf)).strip()


class _Card(ModelCard):
    card_data_class = _OneLineData


def write_model_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md`: YAML front matter for the Hugging Face Hub, how to run the engine, and what it costs in quality.

    Args:
        folder: an existing folder.
        manifest: the export's manifest; `files` need not be filled in.
    """
    card = _Card.from_template(_header(manifest), template_path=str(_TEMPLATE), **escaped(_facts(manifest)))
    # A name from a file system may hold bytes that are no UTF-8.
    (folder / MODEL_CARD).write_text(f"{card}\n", encoding="utf-8", errors="backslashreplace")


def _header(manifest: Manifest) -> _OneLineData:
    source = manifest.source
    return _OneLineData(
        library_name="clada-export",
        pipeline_tag="text-generation",
        base_model=source["name"] if source["kind"] == "hub" else None,
        license=source.get("license") or None,
        tags=["clada", "onnx", "onnxruntime" if manifest.engine is None else "tensorrt", "activation-sparsity"],
    )


def _facts(manifest: Manifest) -> dict[str, Any]:
    plan, source = manifest.sparsity_plan(), manifest.source
    on_tensorrt = manifest.engine is not None
    return {
        "kind": "A TensorRT" if on_tensorrt else "An ONNX",
        "name": str(source["name"]),
        "revision": code(source["revision"]) if source.get("revision") else None,
        "layers": len(plan.layers),
        "skipped": f"{plan.expected_sparsity:.1%}",
        "policy": code(plan.policy),
        "score": code(plan.score),
        "stored": "all weights" if manifest.weights else "model" if on_tensorrt else "FFN weights",
        "rounded": "weights" if on_tensorrt else "FFN weights",
        "dtype": manifest.weights["form"] if manifest.weights else manifest.dtype,
        "quantised": bool(manifest.weights),
        "tokenizer": manifest.tokenizer,
        "engine": None if manifest.engine is None else _engine(manifest.engine),
        "onnx": None if manifest.library is None else _onnx(manifest, manifest.library),
        "warnings": manifest.warnings,
        **_fidelity(manifest),
    }


def _onnx(manifest: Manifest, library: str) -> dict[str, Any]:
    past = {tensor.past for tensor in manifest.cache}
    return {
        "library": _literal(f"./{library}"),
        "model": _literal(manifest.model),
        "inputs": [
            (_cell(item.name), item.dtype, ", ".join(map(str, item.shape))) for item in manifest.inputs if item.name not in past
        ],
        "op": code(f"{manifest.op['domain']}::{manifest.op['name']}"),
    }


def _engine(engine: Mapping[str, Any]) -> dict[str, Any]:
    plugin = engine["plugin"]
    return {
        "package": engine["package"],
        "version": engine["version"],
        "gpus": [(code(file["file"]), ", ".join(file["compute_capabilities"])) for file in engine["files"]],
        "backend": Markdown(engine["backend"]),
        "plugin": None if plugin is None else "embedded" if plugin["embedded"] else "file",
        "plugin_file": None if plugin is None or plugin["embedded"] else _literal(f"./{plugin['file']}"),
        "file": _literal(engine["files"][0]["file"]),
        "commands": [Markdown(" ".join(command.split())) for command in engine["commands"].values()],
    }


def _fidelity(manifest: Manifest) -> dict[str, Any]:
    checks: Sequence[Any] = manifest.verification.get("checks", [])
    drift = manifest.drift or {}
    return {
        "drift": [
            (name, Markdown(format(drift[key], form))) for name, key, form in _DRIFT if isinstance(drift.get(key), int | float)
        ]
        if drift
        else None,
        "checks": len(checks),
        "passed": sum(bool(check.get("passed")) for check in checks if isinstance(check, dict)),
        "deferred": manifest.verification.get("deferred", []) if manifest.engine is not None else [],
    }
