"""Passes on ONNX graphs: find feed-forward layers and rewrite them to `com.clada::SparseFFN`."""

from graph_passes.find_ffns import FFNMiss, FFNSearch, find_ffns
from graph_passes.function_body import make_function
from graph_passes.naming import InterfaceReport, NameInterface, name_interface
from graph_passes.report import RewriteReport, RewrittenFFN
from graph_passes.rewrite_ffns import FFNRewrite, RewriteFFNs, rewrite_ffns
from graph_passes.rules.common import FFNMatch

__all__ = [
    "FFNMatch",
    "FFNMiss",
    "FFNRewrite",
    "FFNSearch",
    "InterfaceReport",
    "NameInterface",
    "RewriteFFNs",
    "RewriteReport",
    "RewrittenFFN",
    "find_ffns",
    "make_function",
    "name_interface",
    "rewrite_ffns",
]
