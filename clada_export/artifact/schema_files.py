"""The JSON schemas of plan and manifest as files, for editors and for programs that do not run Python.

`python -m clada_export.artifact.schema_files` writes them from `PLAN_SCHEMA` and `MANIFEST_SCHEMA`, which are what this program
itself holds a file to; with `--check` it says which is stale, and ends with 1 if one is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clada_export.artifact.manifest_schema import MANIFEST_SCHEMA
from clada_export.plan.schema import PLAN_SCHEMA

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILES: Mapping[Path, Mapping[str, Any]] = {
    Path("clada_export") / "plan" / "plan.schema.json": PLAN_SCHEMA,
    Path("clada_export") / "artifact" / "manifest.schema.json": MANIFEST_SCHEMA,
}
COMMAND = "python -m clada_export.artifact.schema_files"


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema as it stands in its file: JSON, ends with a line break."""
    return json.dumps(schema, indent=2) + "\n"


def stale(root: Path = ROOT) -> list[Path]:
    """The files under `root` that are missing or do not say what Python says."""
    return [
        path
        for path, schema in SCHEMA_FILES.items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != schema_text(schema)
    ]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the files, or with `--check` compare them; the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write the JSON schemas of plan and manifest as files.")
    parser.add_argument("--check", action="store_true", help="write nothing; say which file is stale")
    check: bool = parser.parse_args(arguments).check
    behind = stale(root)
    for path in behind:
        if check:
            print(f"{path} is stale; make it again: {COMMAND}", file=sys.stderr)
        else:
            (root / path).write_text(schema_text(SCHEMA_FILES[path]), encoding="utf-8")
            print(path)
    return int(check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
