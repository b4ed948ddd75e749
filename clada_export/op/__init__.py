"""The meaning of the op in PyTorch: the eager reference, scorers, routers, merged experts."""
