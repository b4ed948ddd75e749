"""One model loaded for a benchmark of policies, and its cells."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import environment
from benchmarks.child import ChildFailedError
from benchmarks.decode import say
from benchmarks.policy_bytes import measured_bytes, packed_bytes
from benchmarks.policy_engine import Task, Workshop, clock, common_prefix
from benchmarks.policy_quality import Found, HeldOut, PlanDecoder, merged_quality
from benchmarks.policy_results import Contender, Settings
from benchmarks.quality import cut
from benchmarks.teal import Teal, line_chance
from benchmarks.texts import Text
from clada_export.calibration import CalibrationOptions, load_calibration_data
from clada_export.calibration.cache import CalibrationCache
from clada_export.calibration.calibrate import Calibrator
from clada_export.calibration.cost import relative_bytes
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import CladaError, UsageError
from clada_export.methods import get_policy
from clada_export.methods.static import WeightPruning
from clada_export.plan.plan import SparsityPlan
from clada_export.source.load import load_source
from clada_export.verify.eager import greedy


class Bench:
    """What is made once: the model, the dense side of every measurement, the trace.

    Args:
        place: where the model is.
        texts: held-out texts.
        work: an existing folder; it holds one engine at a time.
        plans: where the plan of every cell is kept, so that its speed can be measured later; made when it is missing.

    Raises:
        UsageError: a model without a tokenizer, or a text that is too short.
    """

    def __init__(self, place: str, settings: Settings, texts: list[Text], work: Path, plans: Path) -> None:
        self._settings, self._work = settings, work
        source = load_source(place)
        if source.tokenizer is None:
            raise UsageError(f"{place}: the model has no tokenizer, and the benchmark needs one for real text")
        self._source = source
        self._plans = plans / source.weights_digest[:16]
        decoder = source.decoder
        self._ffns = decoder.require_ffns()
        self._origin = {"name": source.name, "weights_digest": source.weights_digest, "dtype": "float32"}
        data = load_calibration_data(source.tokenizer, decoder.vocab_size, context=settings.context, seed=settings.seed)
        say("sensitivity, and the dense side of calibration")
        start = time.perf_counter()
        # Tables do not depend on the sparsity: the first cell of a row makes them, and its seconds are the ones to look at.
        cache = CalibrationCache.of(work / "calibration", decoder, data.calibration, settings.seed)
        self._calibrator = Calibrator(decoder, data, seed=settings.seed, cache=cache)
        once = time.perf_counter() - start

        windows = [self._windows(text) for text in texts]
        rows = torch.tensor([row for one in windows for row in one.rows])
        say(f"the dense model on {rows.numel()} held-out tokens")
        self._heldout = HeldOut(decoder, rows, settings.prompt, work)
        self._prompts = [rows[index, : settings.prompt].tolist() for index in _spread(len(rows), settings.prompts)]
        self._wanted = greedy(decoder, self._prompts, settings.new_tokens)
        self._workshop = Workshop(source)
        self._teal: tuple[Teal, float] | None = None
        found = self._heldout.measure(None).drift
        self.model = {
            "name": source.name,
            "weights_digest": source.weights_digest,
            "weights": source.source_dtype,
            "layers": len(self._ffns),
            "hidden_size": self._ffns[0].hidden_size,
            "intermediate_size": self._ffns[0].intermediate_size,
        }
        self.texts = [one.to_dict() for one in windows]
        self.calibration = {"text": data.origin, "digest": data.digest, "seconds_once": once}
        self.dense = {"ppl": found.summary()["dense_ppl"], "tokens": len(found.nll)}

    def _windows(self, text: Text) -> Any:
        ids = self._source.tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
        return cut(text.name, text.digest, ids, self._settings.windows, self._settings.window_tokens)

    def cell(self, contender: Contender, sparsity: float, speed: bool, kept: dict[str, Any] | None = None) -> dict[str, Any]:
        """Measure a policy at a sparsity. What a policy refuses is recorded as `error`.

        Args:
            kept: a finished cell that lacks the speed alone; it is added if the cell's plan is still there.
        """
        plan = self._kept_plan(contender, sparsity, kept) if speed and kept else None
        head = {
            "contender": contender.name,
            "policy": contender.policy,
            "kind": contender.kind,
            "trained": contender.trained,
            "sparsity": sparsity,
            "commit": environment.commit(),
            "torch_threads": torch.get_num_threads(),
        }
        try:
            if kept is not None and plan is not None:
                return kept | self._later_speed(plan, dict(kept["seconds"]))
            if contender.kind == "simulated":
                return head | self._simulated(contender.name, sparsity)
            return head | self._planned(contender, sparsity, speed)
        except (CladaError, ChildFailedError) as error:
            say(f"  failed: {error}")
            return head | {"error": str(error)}
        finally:
            self._calibrator.weights.use(None)

    def _planned(self, contender: Contender, sparsity: float, speed: bool) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        policy = get_policy(contender.policy, contender.settings)
        options = CalibrationOptions(sparsity=sparsity, seed=self._settings.seed)
        plan = self._calibrator.calibrate(policy, self._origin, options).plan
        seconds["calibration"] = time.perf_counter() - start

        path = self._plan_path(contender, sparsity)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(path)

        start = time.perf_counter()
        found = self._found(plan)
        seconds["quality"] = time.perf_counter() - start

        cell = {
            "score": plan.score,
            "rule": plan.rule,
            "variant": plan.calibration.variant,
            "allocation": plan.calibration.allocation,
            "prune": plan.prune,
            "plan_sha256": _sha256(path),
            "load_weights": [plan.load.surprisal_weight, plan.load.entropy_weight],
            "expected_sparsity": plan.expected_sparsity if plan.prune is None else sparsity,
            "expected_bytes": relative_bytes(plan),
            "bytes": measured_bytes(plan, found.layer_sparsity.tolist()),
            **_quality(found),
        }
        if plan.prune is not None:
            zeros = [float((weight == 0).float().mean()) for ffn in self._ffns for weight in (ffn.w_in(), ffn.w_out())]
            sizes = [weight.numel() for ffn in self._ffns for weight in (ffn.w_in(), ffn.w_out())]
            cell["measured_sparsity"] = float(np.average(zeros, weights=sizes))
            if contender.settings.pattern != "neurons":
                cell["packed_bytes"] = packed_bytes(cell["measured_sparsity"])
        if speed:
            cell |= self._speed(plan, seconds)
        return cell | {"seconds": seconds}

    def _found(self, plan: SparsityPlan) -> Found:
        if plan.layers[0].merge is not None:
            return merged_quality(self._heldout, self._ffns, plan)
        if plan.prune is not None and all(set(layer.threshold) == {0.0} for layer in plan.layers):
            # Static pruning: every neuron that the engine holds runs.
            return self._heldout.measure(None)
        return self._heldout.measure(PlanDecoder(self._ffns, plan, self._heldout.signals, self._settings.prompt))

    def _plan_path(self, contender: Contender, sparsity: float) -> Path:
        return self._plans / f"{contender.name.replace(':', '-')}-{sparsity:g}" / "plan.json"

    def _kept_plan(self, contender: Contender, sparsity: float, cell: dict[str, Any]) -> SparsityPlan | None:
        """The plan that a finished cell was measured with, if it is there."""
        path = self._plan_path(contender, sparsity)
        if not path.is_file() or cell.get("plan_sha256") != _sha256(path):
            return None
        return SparsityPlan.load_file(path)

    def _later_speed(self, plan: SparsityPlan, seconds: dict[str, float]) -> dict[str, Any]:
        """The speed of a plan from an earlier run; the weights are brought into the state it was made for."""
        self._calibrator.weights.follow(None if plan.prune is None else WeightPruning.parse(plan.prune), plan.arrays)
        return {"speed_commit": environment.commit(), **self._speed(plan, seconds), "seconds": seconds}

    def _speed(self, plan: SparsityPlan, seconds: dict[str, float]) -> dict[str, Any]:
        settings, folder = self._settings, self._work / "engine"
        if not self._workshop.traced:
            say("  tracing (two minutes or so for SmolLM2)")
            self._workshop.trace()
        start = time.perf_counter()
        self._workshop.build(plan, folder)
        seconds["build"] = time.perf_counter() - start
        responds = plan.load.surprisal_weight != 0.0 or plan.load.entropy_weight != 0.0
        task = Task(self._prompts, settings.new_tokens, "auto" if responds else 0.0, settings.threads)
        start = time.perf_counter()
        timed = clock(folder, task, self._work)
        seconds["speed"] = time.perf_counter() - start
        shutil.rmtree(folder)
        same = {
            side: [common_prefix(ours, wanted) for ours, wanted in zip(timed[side].pop("tokens"), self._wanted, strict=True)]
            for side in ("dense", "sparse")
        }
        # Load +inf is the dense model unless its weights were pruned: anything else would be a fault of the benchmark.
        return {
            "speed": timed,
            "greedy": {
                "tokens": settings.new_tokens,
                "prefix": same["sparse"],
                "mean_prefix": float(np.mean(same["sparse"])),
                "prefix_of_dense_side": same["dense"],
            },
        }

    def _simulated(self, name: str, sparsity: float) -> dict[str, Any]:
        if self._teal is None:
            start = time.perf_counter()
            windows = self._calibrator.data.calibration
            teal = Teal(require_torch(self._source.decoder, "TEAL"), windows, self._calibrator.prompt)
            self._teal = teal, time.perf_counter() - start
        teal, spent = self._teal
        start = time.perf_counter()
        shares = teal.greedy(sparsity) if name == "teal-greedy" else teal.uniform(sparsity)
        spent += time.perf_counter() - start
        decoder = teal.decoder(shares, self._settings.prompt)
        start = time.perf_counter()
        found = self._heldout.measure(decoder)
        kept = 1.0 - float(found.drift.sparsity)
        return {
            "allocation": "greedy" if name == "teal-greedy" else "uniform",
            "expected_sparsity": sparsity,
            "expected_bytes": 1.0 - sparsity,
            "bytes": kept,
            "shares": [list(one) for one in shares],
            "lines_skipped": decoder.lines_skipped,
            "lines_skipped_if_independent": line_chance(1.0 - kept),
            **_quality(found),
            "seconds": {"calibration": spent, "quality": time.perf_counter() - start},
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _quality(found: Found) -> dict[str, Any]:
    return {
        "measured_sparsity": found.drift.sparsity,
        "layer_sparsity": found.layer_sparsity.tolist(),
        "quality": found.drift.summary(),
    }


def _spread(count: int, wanted: int) -> list[int]:
    """Indices spread over all windows."""
    return [int(index) for index in np.linspace(0, count - 1, wanted).round()]
