"""A store with all its codes, made as its form says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.plan.weights_form import COMPENSATED, NEAREST, SEARCH, WeightsForm
from clada_export.quantise.codes import Codes, Rounder, search_scales
from clada_export.quantise.compensate import compensate
from clada_export.quantise.matrices import ModelMatrices, ModelMatrix
from clada_export.quantise.store import QuantStore
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.quantise import quantise


def nearest(matrix: ModelMatrix, weight: np.ndarray, bits: int, threads: int) -> QuantisedMatrix:
    """The nearest codes for scales that follow from each block's largest weight."""
    return quantise(weight, bits, threads=threads)


_ROUNDERS: dict[str, Rounder] = {NEAREST: nearest, SEARCH: search_scales, COMPENSATED: search_scales}
"""What makes the codes of single matrices; of `compensated`, those that it leaves."""


def make_store(
    decoder: Decoder,
    matrices: ModelMatrices,
    form: WeightsForm,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantStore:
    """Make the codes of all matrices.

    Args:
        windows: int64 [N, context], the calibration text, which errors are made up on.
        progress: called with (matrices done, matrices in all).

    Raises:
        UnsupportedModelError: a weight that is not finite; names it.
        UsageError: activations that are not finite; there is no room on the disk for the codes.
    """
    store = QuantStore(Codes(decoder, matrices, _ROUNDERS[form.rounding]), form)
    if form.rounding != COMPENSATED:
        store.make(progress)
        return store
    compensate(decoder, store, windows, progress)
    store.make()  # what the pass left
    return store
