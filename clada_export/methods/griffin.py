"""Griffin (arXiv 2404.01365): the prompt picks the neurons, and they stay for the whole generation.

s_j = sqrt(sum over prompt tokens of h_j^2 / ||h||^2), the neurons with the k largest s are kept; the same k in every layer as
published. With another allocation than `sparsity`, k differs by layer (our own extension).
"""

from __future__ import annotations

from clada_export.methods.common.single import SinglePolicy

GRIFFIN = SinglePolicy(name="griffin", scores=("prefix",), rule="topk", allocations=("sparsity", "fisher"))
