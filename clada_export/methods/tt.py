"""TT, threshold truncation (arXiv 2405.09274; threshold by CETT, arXiv 2402.03804).

A neuron is dropped where the norm of its output, |h_j| * ||W_d[:, j]||, is below the layer's threshold, evaluated on the true
h. Gate and up are computed for all neurons, so that only rows of the down projection are saved.
"""

from __future__ import annotations

from clada_export.methods.common.single import SinglePolicy

TT = SinglePolicy(name="tt", scores=("exact",), rule="threshold", allocations=("cett", "sensitivity"))
