"""Benchmarks of the tool against a dense engine; each module says how to run it. Not part of the package."""
