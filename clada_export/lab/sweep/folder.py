"""The folder of a sweep: one JSON file a cell, so that a sweep that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clada_export.errors import UsageError
from clada_export.files.json_files import read_json
from clada_export.lab.sweep.cells import VALUES, Cell, Outcome

SUMMARY, PICTURE, CELLS = "sweep.json", "sweep.png", "cells"
VERSION = 1


class SweepFolder:
    """Outcomes on disk.

    Args:
        path: is made if it is not there.
        identity, about: what the cells share, and names for it (`Worker.describe`).
        warn: told about files that can't be used.

    Raises:
        UsageError: the folder belongs to another model, text or settings, is no sweep's, or can't be written.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], warn: Callable[[str], None], about: dict[str, Any] | None = None
    ) -> None:
        self.path, self._identity, self._about, self._warn = path, identity, about or {}, warn
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        check_folder(path)
        if (path / SUMMARY).exists():
            self._check_identity(read_json(path / SUMMARY))
        try:
            (path / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path}: can't be made: {error.strerror or error}") from error
        if not (path / SUMMARY).exists():
            self.write_summary([])

    def _check_identity(self, summary: Any) -> None:
        found = summary.get("identity") if isinstance(summary, dict) else None
        if not isinstance(found, dict) or summary.get("version") != VERSION:
            raise UsageError(f"{self.path / SUMMARY}: not a sweep of this version; give another folder with -o")
        for name, wanted in self._identity.items():
            if found.get(name) != wanted:
                what = {"weights_digest": "model", "text_digest": "calibration text"}.get(name, name.replace("_", " "))
                raise UsageError(
                    f"{self.path} holds a sweep with another {what}: {name} is {_short(found.get(name))} there and "
                    f"{_short(wanted)} here. Give another folder with -o"
                )

    def known(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Those of the cells that have values already; a file that is damaged is named in a warning and left out."""
        return [outcome for cell in cells if (outcome := self._read(cell)) is not None and outcome.done]

    def _read(self, cell: Cell) -> Outcome | None:
        path = self.path / CELLS / cell.file_name
        if not path.is_file():
            return None
        try:
            value = read_json(path)
            if (
                value["version"] != VERSION
                or value["sweep"] != self._digest
                or Cell(value["policy"], value["sparsity"]) != cell
            ):
                raise ValueError("it belongs to another sweep")
            if value["values"] is not None and set(value["values"]) != set(VALUES):
                raise ValueError("it has other values than a cell has")
            return Outcome(cell, value["values"], value["reason"], value["exit_code"], value["attempts"])
        except (UsageError, KeyError, TypeError, ValueError) as error:
            self._warn(f"{path} can't be used ({error}); the cell is measured again")
            return None

    def save(self, outcome: Outcome) -> None:
        """Keep the outcome of a cell."""
        value = {"version": VERSION, "sweep": self._digest, **outcome.to_dict()}
        self._write(self.path / CELLS / outcome.cell.file_name, value)

    def write_summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Write `sweep.json`: the identity, and all outcomes. Returns what was written."""
        value = {
            "version": VERSION,
            "about": self._about,
            "identity": self._identity,
            "cells": [outcome.to_dict() for outcome in outcomes],
        }
        self._write(self.path / SUMMARY, value)
        return value

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            try:
                temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"{path}: can't be written: {error.strerror or error}") from error


def check_folder(path: Path) -> None:
    """Refuse, before any work, a place that can't hold a sweep.

    Raises:
        UsageError: it is a file, or holds other things than a sweep.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: it is a file; give a folder with -o")
    if path.is_dir() and not (path / SUMMARY).exists() and any(path.iterdir()):
        raise UsageError(f"{path}: it is not empty and holds no {SUMMARY}; give another folder with -o")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 70 else f"{text[:16]}..."
