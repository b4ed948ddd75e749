"""The model card of an export folder: `README.md`, as the Hugging Face Hub shows it.

Names, reasons and file names come from models and plans of strangers. The texts here are templates, and what is filled into
them is Markdown only if it says so (`Markdown`); all else is escaped.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clada_export.artifact.manifest import Manifest

MODEL_CARD = "README.md"
_SPECIAL = frozenset(r"\`*_[]<>#|&~!$")


class Markdown(str):
    """Text that is Markdown already, and is taken as it is."""

    __slots__ = ()


class _Filled(string.Formatter):
    """`str.format` that escapes: `{}` gives text, `{:code}` a code span, `{:cell}` one within a table, other specs numbers."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Markdown):
            return value
        if format_spec in ("code", "cell"):
            # Nothing in a code span can be escaped, so what would end it is replaced.
            inside = " ".join(str(value).split()).replace("`", "'") or " "
            return f"`{inside}`" if format_spec == "code" else f"`{inside}`".replace("|", "\\|")
        return _escaped(format(value, format_spec))


def fill(template: str, *values: object, **named: object) -> Markdown:
    """A constant with values filled in, escaped unless they are `Markdown`.

    Args:
        template: a literal; nothing that comes from outside.
    """
    return Markdown(_Filled().vformat(template, values, named))


def _escaped(text: str) -> str:
    """Text on one line, with Markdown's and HTML's own characters taken literally."""
    return "".join(f"\\{char}" if char in _SPECIAL else char for char in " ".join(text.split()))


_CARD = """---
{front}---
# {name}, compiled by clada-export

{kind} engine of {name}{revision} whose feed-forward layers compute only the neurons that a token needs:
{layers} layers, {skipped:.1%} of their neurons skipped at load 0 (policy {policy:code}, score {score:code}, {stored} in
{dtype}).
The run-time input `load` moves that share; `+inf` is the dense model.

## Run it

{use}
## Fidelity

{fidelity}
`report.html` has all checks and every layer; `clada.json` is the manifest, with the sha256 of every file. The
library in this folder is a program: load it only if you trust where the folder came from.
{warnings}"""

_LOAD = """{command}```python
from clada_export import load_engine

engine = load_engine(".")
print(engine.generate({example})
```
"""

_ORT = """
In plain ONNX Runtime, without clada-export:

```python
import onnxruntime as ort

options = ort.SessionOptions()
options.register_custom_ops_library({library})
session = ort.InferenceSession({model}, options)
```

| input | type | shape |
| --- | --- | --- |
{inputs}
The key-value cache is input and output too; its names and shapes are under `cache` in `clada.json`. `load` is +inf for a dense
token (the prompt), -inf for padding, a number otherwise. Without the library the graph runs too, by the function body of
{op:code} in standard operators: the same numbers, none of the speed.
"""

_TENSORRT = """
The engine is for {package} {version} and GPUs of these compute capabilities: {gpus}.
In plain TensorRT, without clada-export:

```python
import {backend} as trt

runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
{register}engine = runtime.deserialize_cuda_engine(open({file}, "rb").read())
```

or by its tools, in this folder:

{shells}
The key-value cache is input and output too; its names and shapes are under `cache` in `clada.json`, the optimisation profiles
under `engine`. `load` is +inf for a dense token (the prompt), -inf for padding, a number otherwise. `model.onnx` is the graph
that the engine was built from.
"""


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
    # Quoted and on one line each: a line of a multi-line text could be the end of the header.
    front = Markdown(yaml.safe_dump(matter, sort_keys=False, default_style='"', width=math.inf))
    plan = manifest.sparsity_plan()
    name = str(source["name"])
    revision = fill(" (revision {:code})", source["revision"]) if source.get("revision") else Markdown("")
    kind, stored = ("An ONNX", "FFN weights") if manifest.engine is None else ("A TensorRT", "model")
    text = fill(
        _CARD,
        front=front,
        kind=kind,
        name=name,
        revision=revision,
        layers=len(plan.layers),
        skipped=plan.expected_sparsity,
        policy=plan.policy,
        score=plan.score,
        stored=stored,
        dtype=manifest.dtype,
        use=_use(manifest),
        fidelity=_fidelity(manifest),
        warnings=_warning_list(manifest.warnings),
    )
    # A name from a file system may hold bytes that are no UTF-8.
    (folder / MODEL_CARD).write_text(text, encoding="utf-8", errors="backslashreplace")


def _use(manifest: Manifest) -> Markdown:
    command = Markdown('    clada run . --prompt "Once upon a time"\n\n' if manifest.tokenizer else "")
    example = Markdown('"Once upon a time", 64).texts[0]' if manifest.tokenizer else "[[1, 2, 3]], 64).tokens[0]")
    text = fill(_LOAD, command=command, example=example)
    if manifest.engine is not None:
        return Markdown(text + _use_tensorrt(manifest.engine))
    if manifest.library is None:
        return text
    inputs = [
        fill("| {:cell} | {} | {} |\n", item.name, item.dtype, ", ".join(map(str, item.shape)))
        for item in manifest.inputs
        if item.name not in {tensor.past for tensor in manifest.cache}
    ]
    op = f"{manifest.op['domain']}::{manifest.op['name']}"
    files = {"library": _literal(f"./{manifest.library}"), "model": _literal(manifest.model)}
    return Markdown(text + fill(_ORT, **files, inputs=Markdown("".join(inputs)), op=op))


def _use_tensorrt(engine: Mapping[str, Any]) -> Markdown:
    plugin = engine["plugin"]
    gpus = [fill("{:code}: {}", file["file"], ", ".join(file["compute_capabilities"])) for file in engine["files"]]
    register = Markdown("")
    if plugin is not None and not plugin["embedded"]:
        register = fill("runtime.get_plugin_registry().load_library({})\n", _literal(f"./{plugin['file']}"))
    elif plugin is not None:
        register = Markdown("runtime.engine_host_code_allowed = True  # the plugin library is in the engine file\n")
    return fill(
        _TENSORRT,
        package=engine["package"],
        version=engine["version"],
        gpus=Markdown("; ".join(gpus)),
        backend=Markdown(engine["backend"]),
        register=register,
        file=_literal(engine["files"][0]["file"]),
        shells=Markdown("\n".join(f"    {' '.join(command.split())}\n" for command in engine["commands"].values())),
    )


def _literal(text: str) -> Markdown:
    """A string of Python within a block of code, on one line whatever it holds."""
    return Markdown(json.dumps(text))


def _fidelity(manifest: Manifest) -> Markdown:
    drift = manifest.drift
    if not drift:
        return Markdown("This export was not verified.\n")
    rows = [
        ("perplexity, dense", "dense_ppl", "| {} | {:.2f} |"),
        ("perplexity, this engine", "ppl", "| {} | {:.2f} |"),
        ("rise of perplexity", "ppl_increase", "| {} | {:+.2%} |"),
        ("KL(dense, sparse), nats a token", "kl", "| {} | {:.4f} |"),
        ("same best token", "top1", "| {} | {:.1%} |"),
        ("neurons skipped", "sparsity", "| {} | {:.1%} |"),
        ("tokens measured", "tokens", "| {} | {:.0f} |"),
    ]
    lines = [fill(form, name, drift[key]) for name, key, form in rows if isinstance(drift.get(key), int | float)]
    checks = manifest.verification.get("checks", [])
    passed = sum(bool(check.get("passed")) for check in checks if isinstance(check, dict))
    weights = "FFN weights" if manifest.engine is None else "weights"
    rounded = "" if manifest.dtype == "float32" else f", its {weights} rounded to {manifest.dtype}"
    intro = f"Against the source model in eager PyTorch (float32{rounded}), decoding token by token under the automatic load:"
    outcome = [f"{passed} of {len(checks)} checks passed.", ""] if checks else []
    if manifest.engine is not None:
        intro = f"The ONNX graph on a CPU, a{intro[1:]}"
        outcome += [fill("{}.\n", text) for text in manifest.verification.get("deferred", [])]
    return Markdown("\n".join([intro, "", "| | |", "| --- | --- |", *lines, "", *outcome]))


def _warning_list(warnings: Sequence[str]) -> Markdown:
    if not warnings:
        return Markdown("")
    return Markdown("\n## Warnings\n\n" + "".join(fill("- {}\n", warning) for warning in warnings))
