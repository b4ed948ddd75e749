"""The model itself, in float32 in PyTorch: what all engines are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.peers.runner import Logits, Scorer
from clada_export.decoder.torch_decoder import require_torch
from clada_export.source.load import load_source


class ReferenceScorer(Scorer):
    """A model folder or GGUF file. It scores a window in one pass; it does not decode."""

    def __init__(self, path: str, threads: int, load: str) -> None:
        torch.set_num_threads(threads)
        self._model = require_torch(load_source(path).decoder, "a reference").model

    @torch.no_grad()
    def score(self, tokens: Sequence[int], prompt: int) -> Logits:
        logits: Logits = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, prompt:-1].float().numpy()
        return np.ascontiguousarray(logits)


def open_runner(path: str, threads: int, load: str) -> Scorer:
    """`load` has no meaning here."""
    return ReferenceScorer(path, threads, load)
