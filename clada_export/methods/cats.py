"""CATS (arXiv 2404.08763): keep neuron j where |act(W_g x)_j| reaches the layer's threshold.

The threshold is a percentile of the calibration text's gate activations, the same percentile in every layer as published. The
gate is computed for all neurons; rows of up and down are saved.
"""

from __future__ import annotations

from clada_export.methods.single import SinglePolicy

CATS = SinglePolicy("cats", "gate", "threshold", ("sparsity", "fisher"), gated=True)
