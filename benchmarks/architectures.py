"""Which decoders of transformers the compiler handles: every type that `AutoModelForCausalLM` knows, from small random models.

    python -m benchmarks.architectures --out benchmarks/results/architectures.json

For each type: the FFNs of the eager model; those that the graph passes match in the exporter's graph, without fusions and with
those for each provider; matches that are no FFN of the eager model; and a whole export for ONNX Runtime with its dense parity
(`load` = +inf) and sparse parity. A row is written when it is finished, and a run that was cut off goes on where it stood.
`python -m benchmarks.architecture_page` makes the table of `docs/architectures.md` from the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.decode import say
from benchmarks.tiny_decoders import NotMadeError, model_types, tiny_decoder
from clada_export.decoder.torch_decoder import TorchDecoder

FUSIONS = (None, "cpu", "cuda")
TIMEOUT = 600.0
PRELOAD = [
    "benchmarks.architectures",
    "transformers",
    "clada_export.pipeline",
    "clada_export.trace.trace",
    "clada_export.decoder.ffn",
]


@dataclass
class Row:
    """What is known about one model type.

    Attributes:
        model: name of the class.
        failed: at which step it went no further (`make`, `eager`, `trace`, `export`), and `why`.
        expected: how many FFNs the eager model has; `forms` counts them by form.
        dense: reasons why layers that look like an FFN stay dense, with how many.
        matched: by fusions of the exporter (`none`, `cpu`, `cuda`), how many of the expected FFNs; or why there is no graph.
        misses: reasons of those that are expected and not matched.
        false: matches that are no FFN of the eager model.
        checks: name, result and error of each check of the export.
        commit: of the sources that the row was made with.
    """

    model_type: str
    model: str = ""
    failed: str = ""
    why: str = ""
    expected: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    matched: dict[str, int | str] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)
    false: list[str] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    commit: str | None = None


def examine(model_type: str) -> Row:
    """Everything about one type; what goes wrong is in the row."""
    from clada_export.errors import CladaError

    row = Row(model_type)
    step, start = "make", time.perf_counter()
    try:
        decoder = TorchDecoder(tiny_decoder(model_type))
        row.model, step = decoder.name, "eager"
        row.expected = len(decoder.ffns)
        row.forms = dict(Counter(_form(ffn.activation, ffn.gated, ffn.packing) for ffn in decoder.ffns))
        row.dense = dict(Counter(item.reason for item in decoder.skipped))
        if decoder.ffns:
            step = "trace"
            _match(row, decoder, [ffn.name for ffn in decoder.ffns])
            step = "export"
            _export(row, decoder.model)
    except (NotMadeError, CladaError) as error:
        row.failed, row.why = step, str(error)
    except Exception as error:
        # No error that a user is meant to see: a bug, of ours or of what we call.
        row.failed, row.why = f"{step}, unexpected", f"{type(error).__name__}: {error}"[:1000]
    row.seconds = time.perf_counter() - start
    return row


def _form(activation: str, gated: bool, packing: str | None) -> str:
    return activation + (" gated" if gated else "") + (f", packed in {packing}" if packing else "")


def _match(row: Row, decoder: Any, expected: Sequence[str]) -> None:
    from clada_export.errors import UnsupportedModelError
    from clada_export.trace.trace import trace
    from graph_passes import find_ffns

    refusal: UnsupportedModelError | None = None
    for fusions in FUSIONS:
        name = fusions or "none"
        try:
            graph = trace(decoder, fusions=fusions).graph
        except UnsupportedModelError as error:
            row.matched[name], refusal = str(error), error
            continue
        search = find_ffns(graph, expected=expected)
        found = [match.name for match in search.matches]
        row.matched[name] = sum(name in found for name in expected)
        row.false += [f"{item} ({name})" for item in found if item not in expected]
        row.misses += [f"{miss.name} ({name}): {miss.reason}" for miss in search.misses if miss.name in expected]
    if refusal is not None and len(row.matched) == len(FUSIONS) and not any(isinstance(n, int) for n in row.matched.values()):
        raise refusal


def _export(row: Row, model: Any) -> None:
    from clada_export import export

    with tempfile.TemporaryDirectory(prefix="clada-architectures-") as folder:
        model.save_pretrained(f"{folder}/model")
        result = export(f"{folder}/model", f"{folder}/engine", sparsity=0.3, calibration_context=32, calibration_cache=None)
        assert result.verification is not None
        row.checks = [_check(check) for check in result.verification.to_dict()["checks"]]


def _check(check: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a check: the largest difference and its bound stand for all numbers."""
    sizes = {key: check[key].get("max_abs") for key in ("numbers", "bound") if check.get(key, {}).get("max_abs") is not None}
    return {"name": check["name"], "passed": check["passed"], "why": check["why"], **sizes}


def _child(model_type: str, threads: int, answer: Connection) -> None:
    import torch

    torch.set_num_threads(threads)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    answer.send(asdict(examine(model_type)))


def apart(model_type: str, context: Any, threads: int = 1, timeout: float = TIMEOUT) -> Row:
    """`examine` in a process of its own: modeling code may end it, or never end."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, threads, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return Row(**ours.recv())
        return Row(model_type, failed="time", why=f"not done after {timeout:.0f} s")
    except EOFError:
        process.join()
        return Row(model_type, failed="crash", why=f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of results")
    parser.add_argument("--types", help="model types (default: all)")
    parser.add_argument("--again", action="store_true", help="examine finished types anew")
    options = parser.parse_args(arguments)
    wanted = options.types.split(",") if options.types else model_types()
    rows: dict[str, dict[str, Any]] = {}
    if options.out.is_file():
        rows = {row["model_type"]: row for row in json.loads(options.out.read_text(encoding="utf-8"))["rows"]}
    missing = [name for name in wanted if options.again or name not in rows]
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The sources are loaded once, by the process that all others are forked from.
    commit = environment.commit()
    for number, name in enumerate(missing, 1):
        row = replace(apart(name, context, threads), commit=commit)
        rows[name] = asdict(row)
        outcome = f"{row.failed}: {row.why[:100]}" if row.failed else f"{row.expected} FFNs, matched {row.matched}"
        say(f"[{number}/{len(missing)}] {name} ({row.seconds:.0f} s): {outcome}")
        result = {
            "benchmark": "architectures",
            "format": 1,
            **environment.describe(threads),
            "rows": [rows[key] for key in sorted(rows)],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
