"""The GPU benchmark, on the emulated runtime: its results are right and complete; its times mean nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "op"))

from emulation import emulation_folder

from benchmarks import ffn_cuda, plot_cuda


def test_results_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = emulation_folder() / "plugins" / "libclada_cuda_kernels.so"
    record = tmp_path / "found.json"
    sizes = ["--sizes", "64,96", "--dtypes", "float16", "--rows", "1", "4", "--fractions", "1", "0.5", "--rounds", "1"]
    assert ffn_cuda.main(["--library", str(library), *sizes, "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    one, four = found["results"]
    assert set(one["variants"]) == {"dense", "dense_split", "load=inf", *(f"{score} 50%" for score in ffn_cuda.SCORES)}
    for name, variant in one["variants"].items():
        assert variant["microseconds"]["lowest"] <= variant["microseconds"]["median"]
        # float16's rounding of the result, and no more.
        assert variant.get("error", 0.0) < 1e-3 and variant.get("active_differs", 0) == 0, name
    assert 0.4 < one["variants"]["external 50%"]["active"] < 0.6
    # Four rows need more neurons than one of them.
    assert four["variants"]["external 50%"]["active_in_any_row"] > 0.8
    assert found["break_even_batch"].keys() == {"64,96 float16 50%"}
    monkeypatch.setattr(sys, "argv", ["plot_cuda", str(record), str(tmp_path / "found.svg")])
    assert plot_cuda.main() == 0
    assert (tmp_path / "found.svg").stat().st_size > 10_000
