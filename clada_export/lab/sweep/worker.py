"""What runs cells: opens the model once, and calibrates one cell after the other."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from clada_export.calibration.cache import CalibrationCache
from clada_export.calibration.calibrate import CalibrationOptions, Calibrator
from clada_export.calibration.text import load_calibration_data
from clada_export.decoder.rounding import round_ffn_weights
from clada_export.errors import CladaError
from clada_export.lab.sweep.cells import VALUES, Cell, Outcome
from clada_export.methods import PolicySettings, get_policy
from clada_export.source.load import load_source


@dataclass(frozen=True)
class SweepJob:
    """What a worker needs to know, on any machine.

    Attributes:
        model: a Hub id, a folder, or a `.gguf` file; a path must be there on every machine that runs workers.
        dtype: of the engine's FFN weights.
        cache: of the calibration, or None for none.
        threads: of a worker.
        hub: further arguments of `clada_export.source.load.load_source`.
    """

    model: str
    dtype: str = "float32"
    settings: PolicySettings = field(default_factory=PolicySettings)
    load_response: bool = False
    text_file: Path | None = None
    tokens_file: Path | None = None
    context: int = 512
    seed: int = 0
    cache: Path | None = None
    threads: int = 1
    hub: dict[str, Any] = field(default_factory=dict)


class Worker(Protocol):
    """What a sweep runs. Nothing long is done before `describe` or `run` is called."""

    def describe(self) -> dict[str, Any]:
        """`identity`: what all cells of a sweep share, as JSON values; `about`: names of the same; `warnings`: sentences.

        Raises:
            CladaError: the model or the text can't be used.
        """
        ...

    def run(self, cell: Cell) -> Outcome:
        """Measure one cell. A cell that can't be measured is an outcome; what is raised is a fault, and worth another try."""
        ...


class SweepWorker:
    """Calibrates the cells of a job."""

    def __init__(self, job: SweepJob) -> None:
        self._job = job
        self._opened: tuple[Calibrator, dict[str, Any]] | None = None

    def describe(self) -> dict[str, Any]:
        """See `Worker.describe`."""
        return self._open()[1]

    def run(self, cell: Cell) -> Outcome:
        """See `Worker.run`."""
        job = self._job
        calibrator, described = self._open()
        options = CalibrationOptions(
            sparsity=cell.sparsity,
            load_response=job.load_response,
            seed=job.seed,
            item=getattr(torch, job.dtype).itemsize,
        )
        start = time.perf_counter()
        try:
            result = calibrator.calibrate(get_policy(cell.policy, job.settings), described["identity"], options)
        except CladaError as error:
            return Outcome.failed(cell, error)
        found = {**result.plan.calibration.to_dict(), **result.drift.summary(), "seconds": time.perf_counter() - start}
        return Outcome(cell, {name: found[name] for name in VALUES})

    def _open(self) -> tuple[Calibrator, dict[str, Any]]:
        if self._opened is None:
            self._opened = self._load()
        return self._opened

    def _load(self) -> tuple[Calibrator, dict[str, Any]]:
        job = self._job
        torch.set_num_threads(job.threads)
        source = load_source(job.model, import_experts=False, dtype=torch.float32, **job.hub)
        decoder = source.decoder
        decoder.require_ffns()

        def rounded() -> None:
            if job.dtype != "float32":
                round_ffn_weights(decoder.ffns, job.dtype)

        rounded()
        limit = decoder.sequence_limit
        data = load_calibration_data(
            source.tokenizer,
            decoder.vocab_size,
            text_file=job.text_file,
            tokens_file=job.tokens_file,
            context=job.context if limit is None else min(job.context, limit),
            seed=job.seed,
        )
        warnings = [*source.warnings, *data.warnings]
        cache = CalibrationCache.of(job.cache, decoder, data.calibration, job.seed, warnings.append)
        identity = {
            "weights_digest": source.weights_digest,
            "dtype": job.dtype,
            "text_digest": data.digest,
            "seed": job.seed,
            "load_response": job.load_response,
            "settings": asdict(job.settings),
        }
        calibrator = Calibrator(decoder, data, seed=job.seed, rounded=rounded, cache=cache)
        about = {"model": source.name, "text": data.origin}
        return calibrator, {"identity": identity, "about": about, "warnings": warnings}
