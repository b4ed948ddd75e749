"""Keep the exporter's notes to itself, and say in one line what went wrong in it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, warned or logged; with CLADA_DEBUG set, what was printed goes to the log afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    spoken = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(spoken), contextlib.redirect_stderr(spoken):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if os.environ.get("CLADA_DEBUG"):
            logging.getLogger(__name__).warning("%s", spoken.getvalue())


def first_line(error: BaseException) -> str:
    """What went wrong first: the exporter wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
