"""From an eager decoder to a graph."""
