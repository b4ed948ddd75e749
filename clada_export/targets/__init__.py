"""Targets: what an export is compiled for. Each is a module with the interface `common.Target`."""
