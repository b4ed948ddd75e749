"""Quantised weights before there is an engine: the matrices of a model, their codes, and the model computed with them."""
