"""Static pruning of FFN weights (Wanda, SparseGPT): fewer weights or neurons, before calibration or as a policy of its own."""

from clada_export.methods.prune_spec import PruneSpec
from clada_export.methods.static.prune import LayerReport, ProjectionReport, PruneReport, WeightPruning, prune

__all__ = ["LayerReport", "ProjectionReport", "PruneReport", "PruneSpec", "WeightPruning", "prune"]
