"""The experiment from a model to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clada_export.calibration.allocation import Allocation, Layers, allocate
from clada_export.calibration.axis import AXES
from clada_export.calibration.budget import parse_sparsity
from clada_export.calibration.calibrate import prompt_length
from clada_export.calibration.load_response import LOAD_SLOPE, error_slopes
from clada_export.calibration.selector import LayerSelector, Selectors
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.calibration.statistics import collect_statistics
from clada_export.calibration.text import CalibrationData, load_calibration_data
from clada_export.calibration.thresholds import LOAD_MAX, LOAD_MIN
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError
from clada_export.lab.load_experiment.arms import ARMS, GROUPS, METHODS, PLAIN, PRIOR, TOPK, Arm, Scene, still
from clada_export.lab.load_experiment.balance import balanced_levels
from clada_export.lab.load_experiment.documents import Documents, cut, ending_tokens, from_file, generate
from clada_export.lab.load_experiment.intervals import paired_interval
from clada_export.lab.load_experiment.simulate import DocumentDrift, Run, document_signals, simulate
from clada_export.load.signal import LoadSignal
from clada_export.op.reference import load_multiplier
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.ranges import CONTEXT, SEED, require_between
from clada_export.progress import Progress, Stages
from clada_export.source.load import load_source
from graph_passes.op import SHADOW_BLOCK, SparseFFNAttributes

ALLOCATION = "fisher"
CALIBRATION_WINDOWS = 16
TOLERANCE = 0.002
"""The share of neurons by which an arm may skip more or less than its baseline."""
MOST_DOCUMENTS = 10_000
CORRECTIONS = 2
"""How often an arm that does not is measured again, its levels moved by what was missing."""
GAMMA = 0.25
"""Weight of the prompt statistic where it is a prior."""
SCORES = ("shadow", "gate", "exact")
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExperimentOptions:
    """What is asked of the experiment.

    Attributes:
        sparsity: mean share of neurons that every arm skips.
        documents: how many of each text; context: tokens of one, of which the first quarter (at most 128) is its prompt.
        texts: UTF-8 files of held-out text; none takes windows of the calibration text that calibration does not see.
        generated: also texts that the model writes, greedily and sampled at temperature 1.
        groups: of arms (`arms.GROUPS`); none is all.
        score: of the op; None is `shadow` where the hidden size allows it, else `gate`.
    """

    sparsity: float = 0.5
    documents: int = 6
    context: int = 256
    texts: tuple[Path, ...] = ()
    generated: bool = True
    groups: tuple[str, ...] = ()
    score: str | None = None
    calibration_data: Path | None = None
    calibration_tokens: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what can be refused before any work.

        Raises:
            UsageError: names the option.
        """
        parse_sparsity(self.sparsity)
        if self.documents < 2:
            raise UsageError(f"--documents {self.documents}: an interval over documents needs at least 2")
        require_between("--documents", self.documents, (2, MOST_DOCUMENTS))
        if self.context < 16:
            raise UsageError(f"--context {self.context} is too short: at least 16 tokens")
        require_between("--context", self.context, CONTEXT)
        require_between("--seed", self.seed, SEED)
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown:
            raise UsageError(f"--group {unknown[0]!r} is unknown; known: {', '.join(GROUPS)}")
        if self.score is not None and self.score not in SCORES:
            raise UsageError(f"--score {self.score!r} is unknown; known: {', '.join(SCORES)}")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The still baselines that are needed, then the arms."""
        arms = tuple(arm for arm in ARMS if not self.groups or arm.group in self.groups)
        methods = [name for name in METHODS if any(arm.method == name for arm in arms)]
        return (*(Arm("still", "baseline", name, still) for name in methods), *arms)


@dataclass(frozen=True)
class CalibratedModel:
    """The model, calibrated: for each method its selectors and how its layers share a sparsity."""

    decoder: Decoder
    layers: dict[str, tuple[LayerSelector, ...]]
    allocations: dict[str, Allocation]
    base: LoadSignal
    prompt_surprisal: tuple[float, float]
    prompt: int
    score: str


def run_experiment(
    model: str | Path, options: ExperimentOptions, *, progress: Progress | None = None, **source_options: Any
) -> dict[str, Any]:
    """Measure all arms on all texts.

    Args:
        source_options: of `clada_export.source.load.load_source`.

    Returns:
        Plain JSON values; `docs/load-experiment.md` says what they are.

    Raises:
        UsageError, UnsupportedModelError: see `clada_export.errors`.
    """
    options.check()
    stages = Stages(progress)
    with stages("source") as note:
        source = load_source(str(model), import_experts=False, dtype=torch.float32, **source_options)
        note(f"{source.name}, {len(source.decoder.require_ffns())} FFNs")
    data = load_calibration_data(
        source.tokenizer,
        source.decoder.vocab_size,
        text_file=options.calibration_data,
        tokens_file=options.calibration_tokens,
        context=options.context,
        calibration=CALIBRATION_WINDOWS,
        heldout=options.documents,
        seed=options.seed,
    )
    with stages("calibrate"):
        subject = calibrate_model(source.decoder, data, options, stages.inner)
    with stages("texts") as note:
        texts = _texts(source.decoder, source.tokenizer, data, options, subject.prompt, stages.inner)
        note(", ".join(text.name for text in texts))
    measured = []
    for text in texts:
        with stages(text.name) as note:
            measured.append(measure_text(subject, text, options, stages.inner))
            note(f"{len(options.arms)} arms on {len(text.tokens)} documents")
    return {
        "benchmark": "load",
        "model": {"name": source.name, "weights_digest": source.weights_digest},
        "settings": {
            "sparsity": options.sparsity,
            "documents": options.documents,
            "context": options.context,
            "prompt_tokens": subject.prompt,
            "score": subject.score,
            "allocation": ALLOCATION,
            "prior_gamma": GAMMA,
            "load_slope": LOAD_SLOPE,
            "tolerance": TOLERANCE,
            "seed": options.seed,
            "calibration_text": data.origin,
            "calibration_tokens": int(data.calibration.numel()),
            "surprisal": [subject.base.surprisal_mean, subject.base.surprisal_std],
            "entropy": [subject.base.entropy_mean, subject.base.entropy_std],
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "seconds": stages.seconds,
        "texts": [*measured, _pooled(measured)] if len(measured) > 1 else measured,
    }


def calibrate_model(decoder: Decoder, data: CalibrationData, options: ExperimentOptions, progress: Step) -> CalibratedModel:
    """Tables, prices and signal statistics of the methods that the arms need."""
    prompt, ffns = prompt_length(options.context), decoder.ffns
    fits = all(ffn.hidden_size % SHADOW_BLOCK == 0 for ffn in ffns)
    score = options.score or ("shadow" if fits else "gate")
    if score == "shadow" and not fits:
        raise UsageError(f"--score shadow needs hidden sizes divisible by {SHADOW_BLOCK}; use --score gate")
    wanted = {
        PLAIN: Method(PLAIN, score, "threshold", draft_layers(ffns)),
        PRIOR: Method(PRIOR, score, "threshold", draft_layers(ffns, prior_gamma=GAMMA)),
        TOPK: Method(TOPK, score, "topk", draft_layers(ffns)),
    }
    used = dict.fromkeys(arm.method for arm in options.arms)
    methods = tuple(wanted[name] for name in used)
    sensitivity = layer_sensitivity(
        decoder, data.calibration[:4], seed=options.seed, progress=lambda done, total: progress("sensitivity", done, total)
    )
    selectors = Selectors(ffns, methods)
    statistics = collect_statistics(
        decoder, selectors, data.calibration, prompt, lambda done, total: progress("statistics", done, total)
    )
    allocations = {}
    for method, tables in zip(methods, statistics.tables, strict=True):
        widths = tuple(layer.width for layer in method.layers)
        allocations[method.label] = allocate(ALLOCATION, Layers(AXES[method.rule], tables, widths, tuple(sensitivity)))
    surprisal, _ = document_signals(decoder, data.calibration[:, :prompt])
    means = surprisal.mean(axis=1)
    deviation = float(means.std(ddof=1)) if len(means) > 1 else statistics.load.surprisal_std
    return CalibratedModel(
        decoder,
        {method.label: selectors.of(method) for method in methods},
        allocations,
        statistics.load,
        (float(means.mean()), max(deviation, 1e-6)),
        prompt,
        score,
    )


def measure_text(subject: CalibratedModel, text: Documents, options: ExperimentOptions, progress: Step) -> dict[str, Any]:
    """All arms on one text: the entry of `texts` in the result."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("runs of a document", done, 0)

    surprisal, entropy = document_signals(subject.decoder, text.tokens, step)
    scene = Scene(surprisal, entropy, subject.prompt, subject.base, subject.prompt_surprisal)
    arms = options.arms
    loads = [arm.loads(scene, np.random.default_rng([options.seed, index])) for index, arm in enumerate(arms)]
    targets = [options.sparsity] * len(arms)
    runs = [_run(subject, arm, load, options.sparsity) for arm, load in zip(arms, loads, strict=True)]
    outcomes = simulate(subject.decoder, text.tokens, subject.prompt, runs, step)
    baselines = {arm.method: index for index, arm in enumerate(arms) if arm.group == "baseline"}
    for _ in range(CORRECTIONS):
        gaps = [
            float(outcomes[baselines[arm.method]].sparsity.mean() - outcome.sparsity.mean())
            for arm, outcome in zip(arms, outcomes, strict=True)
        ]
        off = [index for index, gap in enumerate(gaps) if abs(gap) > TOLERANCE]
        if not off:
            break
        for index in off:
            targets[index] = min(max(targets[index] + gaps[index], 0.01), 0.99)
            runs[index] = _run(subject, arms[index], loads[index], targets[index])
        again = simulate(subject.decoder, text.tokens, subject.prompt, [runs[index] for index in off], step)
        for index, outcome in zip(off, again, strict=True):
            outcomes[index] = outcome
    return {
        "name": text.name,
        "documents": len(text.tokens),
        "scored_tokens": int(text.tokens.numel()) - len(text.tokens) * (subject.prompt + 1),
        "dense_nll": float(surprisal[:, subject.prompt :].mean()),
        "arms": [
            _entry(arm, outcome, outcomes[baselines[arm.method]], run, options.seed)
            for arm, outcome, run in zip(arms, outcomes, runs, strict=True)
        ],
    }


def _run(subject: CalibratedModel, arm: Arm, load: np.ndarray, sparsity: float) -> Run:
    multiplier = _multiplier(load)
    allocation = subject.allocations[arm.method]
    exponents = None
    if arm.per_layer:
        exponents = error_slopes(allocation.layers.tables, allocation.levels_for(sparsity))
    levels = balanced_levels(allocation, sparsity, multiplier, exponents)
    return Run(subject.layers[arm.method], levels, torch.from_numpy(multiplier), exponents, arm.refresh)


def _multiplier(load: np.ndarray) -> np.ndarray:
    """m(load) as the op has it, float32; 0 is a dense step, whatever `load_min` is."""
    attributes = SparseFFNAttributes(load_slope=LOAD_SLOPE, load_min=LOAD_MIN, load_max=LOAD_MAX)
    loads = torch.from_numpy(load)
    return torch.where(loads.isposinf(), 0.0, load_multiplier(loads, attributes)).numpy()


def _entry(arm: Arm, outcome: DocumentDrift, baseline: DocumentDrift, run: Run, seed: int) -> dict[str, Any]:
    gap = float(outcome.sparsity.mean() - baseline.sparsity.mean())
    return {
        "name": arm.name,
        "group": arm.group,
        "method": arm.method,
        "kl": float(outcome.kl.mean()),
        **_difference(outcome.kl, baseline.kl, seed),
        "top1": float(outcome.top1.mean()),
        "ppl_increase": float(np.expm1(outcome.nll_increase.mean())),
        "sparsity": float(outcome.sparsity.mean()),
        "sparsity_difference": gap,
        "equal_sparsity": abs(gap) <= TOLERANCE,
        "dense_steps": float((run.multiplier == 0).float().mean()),
        "document_kl": outcome.kl.tolist(),
    }


def _difference(kl: np.ndarray, baseline: np.ndarray, seed: int) -> dict[str, float]:
    """Against the still baseline: the mean difference of KL and its interval, in nats a token."""
    interval = paired_interval(kl - baseline, seed)
    return {"difference": interval.mean, "low": interval.low, "high": interval.high, "baseline_kl": float(baseline.mean())}


def _pooled(texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All documents of all texts together."""
    arms = []
    for place, entry in enumerate(texts[0]["arms"]):
        parts = [text["arms"][place] for text in texts]
        kl = np.concatenate([part["document_kl"] for part in parts])
        still_parts = [_baseline(text, entry["method"]) for text in texts]
        baseline = np.concatenate([part["document_kl"] for part in still_parts])
        weights = [text["documents"] for text in texts]
        means = {
            key: float(np.average([part[key] for part in parts], weights=weights))
            for key in ("top1", "sparsity", "sparsity_difference", "dense_steps")
        }
        rise = np.average([np.log1p(part["ppl_increase"]) for part in parts], weights=weights)
        arms.append(
            {
                **entry,
                "kl": float(kl.mean()),
                **_difference(kl, baseline, 0),
                **means,
                "ppl_increase": float(np.expm1(rise)),
                "equal_sparsity": all(part["equal_sparsity"] for part in parts),
                "document_kl": kl.tolist(),
            }
        )
    return {
        "name": "all texts",
        "documents": sum(text["documents"] for text in texts),
        "scored_tokens": sum(text["scored_tokens"] for text in texts),
        "dense_nll": float(np.average([text["dense_nll"] for text in texts], weights=[text["documents"] for text in texts])),
        "arms": arms,
    }


def _baseline(text: dict[str, Any], method: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in text["arms"] if arm["group"] == "baseline" and arm["method"] == method)
    return found


def _texts(
    decoder: Decoder, tokenizer: Any | None, data: CalibrationData, options: ExperimentOptions, prompt: int, progress: Step
) -> list[Documents]:
    if options.texts:
        texts = [from_file(path, tokenizer, options.documents, options.context) for path in options.texts]
    else:
        ids = data.heldout.reshape(-1).tolist()
        texts = [cut(f"{data.origin}, held out", ids, options.documents, options.context)]
    if options.generated:
        prompts = texts[0].tokens[:, :prompt]
        for name, temperature in (("written greedily", 0.0), ("sampled at T = 1", 1.0)):
            tokens = generate(
                decoder,
                prompts,
                options.context,
                temperature=temperature,
                seed=options.seed,
                forbidden=ending_tokens(decoder),
                progress=lambda done, total: progress("tokens written", done, total),
            )
            texts.append(Documents(name, tokens))
    return texts
