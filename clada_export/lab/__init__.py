"""Experiments that write no engine: sweeps, and whether a load helps."""
