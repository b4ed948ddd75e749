"""TDA, threshold-based dynamic activation (arXiv 2408.11393): the prompt picks the neurons, by a threshold of each layer.

s_j = ||A[:, j]||_2 over the prompt's activations A, R_j = s_j / max_i s_i, and neurons with R_j >= the layer's threshold stay
for the whole generation. The formula is our own reading of the paper's text; its exact normaliser could not be checked.
"""

from __future__ import annotations

from clada_export.methods.common.single import SinglePolicy

TDA = SinglePolicy(name="tda", scores=("prefix",), rule="relative", allocations=("cett", "fisher"), stat_norm="none")
