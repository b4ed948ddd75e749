"""Static pruning of FFN weights (Wanda, SparseGPT), before calibration: weights in, fewer weights or neurons out."""

from clada_export.methods.pruning.prune import LayerReport, ProjectionReport, PruneReport, prune
from clada_export.methods.pruning.spec import PruneSpec

__all__ = ["LayerReport", "ProjectionReport", "PruneReport", "PruneSpec", "prune"]
