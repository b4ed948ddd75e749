"""Experts made of a dense FFN's neurons, and the small routers that choose among them.

Plain functions on the tensors of one layer; nothing here knows the pipeline. Losses and sources: `docs/routers.md`.
"""
