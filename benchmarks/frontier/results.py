"""The file of a model's cells, written whole after each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.decode import write_json
from benchmarks.frontier.families import Cell
from clada_export.errors import UsageError

FORMAT = 1


class Results:
    """Cells of one model under equal settings.

    Args:
        key: model, texts and settings.

    Raises:
        UsageError: the file is of something else.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path = path
        key = json.loads(json.dumps(key))
        self.value: dict[str, Any] = {"benchmark": "frontier", "format": FORMAT, "key": key, "cells": []}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.get("benchmark") != "frontier" or kept.get("format") != FORMAT:
                raise UsageError(f"{path}: not a result of this benchmark; choose another --out")
            if kept["key"] != key:
                changed = [name for name in key if kept["key"].get(name) != key[name]]
                raise UsageError(f"{path}: its cells were measured with other {', '.join(changed)}; choose another --out")
            self.value = kept

    def has(self, cell: Cell) -> bool:
        """Whether a cell is measured."""
        return any(one["key"] == cell.key for one in self.value["cells"])

    def put(self, cell: Cell, found: dict[str, Any]) -> None:
        """Add a cell and write the file."""
        self.value["cells"].append({"key": cell.key, **found})
        self.write()

    def write(self) -> None:
        """Write or replace the file in one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self.value)
