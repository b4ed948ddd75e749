"""Attention of a decoder graph: what it is recognised by, what its mask lets through, and how it is written as one node."""
