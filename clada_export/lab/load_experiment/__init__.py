"""The experiment that decides whether the load helps: responses and controls at equal mean sparsity."""

from clada_export.lab.load_experiment.run import ExperimentOptions, run_experiment

__all__ = ["ExperimentOptions", "run_experiment"]
