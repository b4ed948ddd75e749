"""`clada sweep`: policies against sparsities on one model and one text, in parallel with Ray; see `docs/sweep.md`.

`run.run_sweep` is the entry. Nothing is imported here: `cells` travel between processes that need no PyTorch to carry them.
"""
