"""What checking its files costs the opening of an engine.

Every opening is a process of its own, and the files are in the page cache. `unchecked` compares sizes only, like `--no-check`;
`first` hashes every file, as on the first opening; `again` trusts the stamp that the first one left. `--lengthen GB` measures a
copy of the engine that has one more file of that size, which stands for the weights of a larger model: opening reads no more
of it than the check does.

    python -m benchmarks.opening ENGINE [--lengthen 6] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import busy, describe
from clada_export.artifact.manifest import file_record, read_manifest, write_manifest

WAYS = ("unchecked", "first", "again")
_BLOCK = 16 << 20

_OPEN = """
import json, sys, time
from clada_export.runtime import load_engine
import clada_export.runtime.session
start = time.perf_counter()
load_engine(sys.argv[1], verify_files=sys.argv[2] == "True")
print(json.dumps(time.perf_counter() - start))
"""


def open_once(folder: Path, checked: bool, cache: Path) -> float:
    """Seconds that `load_engine` takes in a new process, imports not counted."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(folder), str(checked)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout))


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each way, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    read_manifest(folder)  # reads every file: none comes from the disk afterwards
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds["unchecked"].append(open_once(folder, False, Path(cache)))
            seconds["first"].append(open_once(folder, True, Path(cache)))
            seconds["again"].append(open_once(folder, True, Path(cache)))
    size = sum(record["bytes"] for record in read_manifest(folder, check_files=False).files.values())
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "bytes": size,
        "seconds": seconds,
        "median_seconds": medians,
        "first_seconds_a_gb": (medians["first"] - medians["unchecked"]) / (size / 1e9),
        "again_seconds": medians["again"] - medians["unchecked"],
    }


def lengthened(folder: Path, place: Path, gigabytes: float) -> Path:
    """A copy of an engine with one more file of random bytes."""
    copy = place / "engine"
    shutil.copytree(folder, copy)
    manifest = read_manifest(copy)
    with (copy / "more.data").open("wb") as stream:
        for _ in range(round(gigabytes * 1e9 / _BLOCK)):
            stream.write(os.urandom(_BLOCK))
    write_manifest(copy, manifest.with_files({**manifest.files, "more.data": file_record(copy / "more.data")}))
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--lengthen", type=float, metavar="GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    results = {"engine": measure(options.engine, options.rounds)}
    if options.lengthen:
        with tempfile.TemporaryDirectory(dir=options.engine.resolve().parent) as place:
            results["lengthened"] = measure(lengthened(options.engine, Path(place), options.lengthen), options.rounds)
    found = {**describe(len(os.sched_getaffinity(0))), "busy": busy(), "results": results}
    text = json.dumps(found, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
