"""clada-export: compile a Hugging Face decoder into an engine whose FFN layers compute only the neurons a token needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ExportOptions", "ExportResult", "__version__", "export", "load_engine", "verify_folder"]

if TYPE_CHECKING:
    from clada_export.export_options import ExportOptions
    from clada_export.pipeline import ExportResult, export, verify_folder
    from clada_export.runtime import load_engine

_HOMES = {
    "ExportOptions": "clada_export.export_options",
    "ExportResult": "clada_export.pipeline",
    "export": "clada_export.pipeline",
    "verify_folder": "clada_export.pipeline",
    "load_engine": "clada_export.runtime",
}


def __getattr__(name: str) -> Any:
    # Running an engine needs neither torch nor transformers, so what needs them is imported when it is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
