"""`clada inspect`: show what an engine is, or what would be rewritten in a model."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clada_export.cli.options import hub_arguments, hub_options
from clada_export.cli.shown import say
from clada_export.errors import UsageError

if TYPE_CHECKING:
    from clada_export.price import Machine, ModelSize, Price


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; `handler` is what runs it."""
    parser.set_defaults(handler=run)
    parser.add_argument(
        "subject",
        metavar="MODEL_OR_ONNX_OR_OUT",
        help="what clada-export wrote, an .onnx file or a folder with one, or a model as clada-export takes it",
    )
    parser.add_argument("--trace", action="store_true", help="of a model: export the graph too, and match it (minutes)")
    priced = parser.add_argument_group("what an export of a model would cost, with")
    priced.add_argument("--target", default="ort", help="ort or trt (default: ort)")
    priced.add_argument("--policy", default="clada", help="a policy, or auto (default: clada)")
    priced.add_argument("--weights", metavar="FORM", help="as for an export: int8, int6, ..., auto, or a type")
    priced.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default: float32)")
    hub_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit code.

    Raises:
        CladaError: what a user has to know; it has the exit code.
    """
    from clada_export.artifact.manifest import MANIFEST_NAME
    from clada_export.cli.inspection import inspect_model, inspect_onnx
    from clada_export.price.told import told
    from clada_export.source.onnx.files import is_onnx, locate_onnx

    place = Path(options.subject)
    _require_place(place)
    if place.is_dir() and os.path.lexists(place / MANIFEST_NAME):
        return _show_engine(place, options.json)
    if is_onnx(place):
        found = inspect_onnx(locate_onnx(place))
    else:
        found = inspect_model(options.subject, traced=options.trace, **hub_options(options))
    priced = _price(found.size, options)
    if options.json:
        price, machine = (None, None) if priced is None else (priced[0].to_dict(), priced[1].to_dict())
        print(json.dumps({**found.to_dict(), "price": price, "machine": machine}, indent=2))
        return 0
    say(f"{found.what:<9} {found.name}")
    for note in found.notes:
        say(f"note      {note}")
    if priced is not None:
        for line in told(*priced):
            say(line)
    sparse = [layer for layer in found.layers if layer.rewritten]
    say(f"layers    {len(sparse)} would be rewritten, {len(found.layers) - len(sparse)} would be left dense")
    say()
    for layer in found.layers:
        mark, text = ("✓", f"{layer.form}, {layer.hidden_size} x {layer.intermediate_size}") if layer.rewritten else ("✗", "")
        say(f"[{mark}] {layer.name:<44} {'; '.join(part for part in (text, layer.reason) if part)}")
    return 0


def _price(size: ModelSize | None, options: argparse.Namespace) -> tuple[Price, Machine] | None:
    """What an export would cost here; None where no FFN would be sparse, which is no export."""
    from clada_export.decoder.spool import spool_folder
    from clada_export.export_options import ExportOptions
    from clada_export.price import measure_machine, price, work_of

    asked = ExportOptions(target=options.target, policy=options.policy, dtype=options.dtype, weights=options.weights).settled()
    asked.check()
    if size is None or not size.layers:
        return None
    machine = measure_machine(Path.cwd(), spool_folder(size.float32_bytes))
    return price(size, machine, work_of(asked)), machine


def _told_weights(weights: dict[str, Any]) -> str:
    """Bits and bytes of each kind of matrix."""
    kinds = {kind: value for kind, value in weights.items() if kind != "form"}
    sizes = {kind: f"{value['bytes'] / 1e6:.1f} MB" if value["bytes"] else "shared" for kind, value in kinds.items()}
    return "; ".join(f"{kind} {value['bits']} bits, {sizes[kind]}" for kind, value in kinds.items())


def _require_place(place: Path) -> None:
    """Refuse a name that is no path at all, or leads nowhere; one that does not exist may be a Hub id.

    Raises:
        UsageError: says what the system says.
    """
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"{place}: can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL
        raise UsageError(f"{str(place)!r}: can't be read: {error}") from error


def _show_engine(folder: Path, as_json: bool) -> int:
    from clada_export.artifact.manifest import read_manifest

    manifest = read_manifest(folder)
    if as_json:
        print(json.dumps(manifest.to_dict(), indent=2))
        return 0
    plan, source, op, drift = manifest.sparsity_plan(), manifest.source, manifest.op, manifest.drift
    signal, goal = plan.load, plan.calibration.goal
    revision = f", {source['revision']}" if source["revision"] else ""
    say(f"model     {source['name']} ({source['kind']}{revision})")
    stored = f"{'FFN weights' if manifest.engine is None else 'model'} {manifest.dtype}"
    if manifest.weights:
        stored = f"weights {manifest.weights['form']}"
    say(f"target    {manifest.target}, {stored}, {op['domain']}::{op['name']} version {op['version']}")
    if manifest.weights:
        say(f"weights   {_told_weights(manifest.weights)}")
    if manifest.engine is not None:
        _inspect_engine(manifest.engine)
    say(f"plan      policy {plan.policy}, score {plan.score}, rule {plan.rule}, budget {goal or 'given'}")
    if plan.prune is not None:
        say(f"pruned    {plan.prune}")
    if (read := plan.calibration.relative_bytes) is not None:
        say(f"reads     {read:.2f} of the dense FFNs' bytes for a token at load 0")
    say(
        f"load      {signal.surprisal_weight:g} * (S - {signal.surprisal_mean:.3f}) / {signal.surprisal_std:.3f}"
        f" + {signal.entropy_weight:g} * (H - {signal.entropy_mean:.3f}) / {signal.entropy_std:.3f}  (nats)"
    )
    if signal.rule != "exp" or signal.momentum:
        given = "".join(f", {name} {value:g}" for name, value in signal.parameters.items())
        say(f"          rule {signal.rule}{given}; momentum {signal.momentum:g}")
    if drift:
        say(
            f"drift     perplexity {drift['ppl_increase']:+.2%}, KL {drift['kl']:.4f} nats, top-1 {drift['top1']:.1%}"
            f" on {drift['tokens']} tokens"
        )
    say(f"sparsity  {plan.expected_sparsity:.1%} expected at load 0")
    say()
    say(f"{'layer':<44} {'activation':<10} {'d x f':>13} {'threshold':>10} {'skipped':>8} {'CETT':>6}")
    for layer in plan.layers:
        threshold = f"{layer.threshold[0]:.4g}" if len(layer.threshold) == 1 else f"[{len(layer.threshold)}]"
        kind = layer.activation + ("*" if layer.gated else "")
        sizes = f"{layer.hidden_size} x {layer.intermediate_size}"
        shares = f"{layer.expected_sparsity:>8.1%} {layer.expected_cett:>6.3f}"
        say(f"{layer.name:<44} {kind:<10} {sizes:>13} {threshold:>10} {shares}")
    say("(* gated)")
    for warning in manifest.warnings:
        say(f"warning: {warning}")
    return 0


def _inspect_engine(engine: dict[str, Any]) -> None:
    plugin = engine["plugin"]
    held = "embedded in the engine" if plugin and plugin["embedded"] else f"in {plugin['file']}" if plugin else ""
    layers = f"{plugin['layers']} plugin layers, {held}" if plugin else "no plugin: dense arithmetic"
    for file in engine["files"]:
        say(f"engine    {file['file']} for compute capability {', '.join(file['compute_capabilities'])}")
    say(f"          {engine['package']} {engine['version']}; {layers}")
    for profile in engine["profiles"]:
        sizes = ", ".join(f"{key} {profile[key][0]}..{profile[key][2]}" for key in ("batch", "sequence", "past"))
        say(f"profile   {profile['name']}: {sizes}")
