"""Passes on ONNX graphs: find feed-forward layers and rewrite them to `com.clada::SparseFFN`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graph_passes.function_body import make_function
    from graph_passes.load_outputs import AddLoadOutputs
    from graph_passes.matchers.common import FFNMatch
    from graph_passes.naming import InterfaceReport, NameInterface, name_interface
    from graph_passes.pass_list import PassList
    from graph_passes.report import RewriteReport, RewrittenFFN
    from graph_passes.rewrite import FFNRewrite, RewriteFFNs, rewrite_ffns
    from graph_passes.search import FFNMiss, FFNSearch, find_ffns

_HOMES = {
    "AddLoadOutputs": "graph_passes.load_outputs",
    "FFNMatch": "graph_passes.matchers.common",
    "FFNMiss": "graph_passes.search",
    "FFNRewrite": "graph_passes.rewrite",
    "FFNSearch": "graph_passes.search",
    "InterfaceReport": "graph_passes.naming",
    "NameInterface": "graph_passes.naming",
    "PassList": "graph_passes.pass_list",
    "RewriteFFNs": "graph_passes.rewrite",
    "RewriteReport": "graph_passes.report",
    "RewrittenFFN": "graph_passes.report",
    "find_ffns": "graph_passes.search",
    "make_function": "graph_passes.function_body",
    "name_interface": "graph_passes.naming",
    "rewrite_ffns": "graph_passes.rewrite",
}

__all__ = [
    "AddLoadOutputs",
    "FFNMatch",
    "FFNMiss",
    "FFNRewrite",
    "FFNSearch",
    "InterfaceReport",
    "NameInterface",
    "PassList",
    "RewriteFFNs",
    "RewriteReport",
    "RewrittenFFN",
    "find_ffns",
    "make_function",
    "name_interface",
    "rewrite_ffns",
]


def __getattr__(name: str) -> Any:
    # A runtime needs only the op's contract (`graph_passes.op`); onnx_ir is imported when a pass is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
