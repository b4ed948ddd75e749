"""Quality of one engine on held-out windows, token by token, against the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.runner import Logits
from benchmarks.quality import PROMPT, Quality, Windows
from clada_export.errors import VerificationError

CHUNK = 64
"""Positions that are compared at a time: float64 copies of 150,000 logits each."""


class Scorer(Protocol):
    """A worker, or what stands in for one."""

    def logits(self, tokens: Sequence[int], prompt: int, path: Path) -> Logits:
        """See `client.Worker`."""


def reference_logits(worker: Scorer, windows: Sequence[Windows], folder: Path) -> None:
    """Write what the model itself gives for each window, for `quality`; windows that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for text in windows:
        for number, row in enumerate(text.rows):
            path = _path(folder, text, number)
            if not path.is_file():
                part = path.with_name("part.npy")
                worker.logits(row, PROMPT, part)
                part.replace(path)


def quality(
    worker: Scorer, windows: Sequence[Windows], folder: Path, progress: Callable[[int, int], None] = lambda done, wanted: None
) -> dict[str, Any]:
    """Perplexity, KL and agreement of the best token, over all texts and of each.

    Args:
        folder: where `reference_logits` wrote.
        progress: called with windows done and wanted.

    Raises:
        VerificationError: the engine knows fewer tokens than the model.
    """
    whole, texts, done = Quality(), {}, 0
    wanted = sum(len(text.rows) for text in windows)
    mine = folder / "engine.npy"
    for text in windows:
        found = Quality()
        for number, row in enumerate(text.rows):
            theirs = np.load(_path(folder, text, number), mmap_mode="r")
            ours = worker.logits(row, PROMPT, mine)
            if ours.shape[0] != theirs.shape[0] or ours.shape[1] < theirs.shape[1]:
                raise VerificationError(f"logits are {list(ours.shape)}; the model has {list(theirs.shape)}")
            follow = np.array(row[PROMPT + 1 :])
            for at in range(0, len(follow), CHUNK):
                part = slice(at, at + CHUNK)
                # Runtimes pad vocabularies; what is behind the model's own tokens is no token.
                found.add(np.asarray(ours[part, : theirs.shape[1]]), np.asarray(theirs[part]), follow[part])
            done += 1
            progress(done, wanted)
        texts[text.name] = found.summary()
        whole.extend(found)
    mine.unlink()
    return {"all": whole.summary(), "texts": texts}


def _path(folder: Path, text: Windows, number: int) -> Path:
    return folder / f"{text.name}-{number}.npy"
