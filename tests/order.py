"""The order of the test files: the longest begin, so that no process of a run is left alone with one at its end.

`make test` gives each process whole files, in the order of collection (`--dist loadfile --no-loadscope-reorder`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Files that take more than some twenty seconds of a core, longest first; the others follow.
LONGEST = (
    "clada_export/test_real_model.py",
    "clada_export/test_pipeline.py",
    "op/test_sanitizers.py",
    "graph_passes/test_rewrite.py",
    "clada_export/targets/test_tensorrt_target.py",
    "clada_export/methods/test_moe_import.py",
    "clada_export/methods/test_policy_engines.py",
    "op/test_contract.py",
    "clada_export/test_real_engines.py",
    "clada_export/decoder/test_decoder_forms.py",
    "op/test_cuda_kernels.py",
    "op/test_plugin.py",
    "clada_export/calibration/test_degenerate_models.py",
    "clada_export/lab/test_sweep.py",
    "clada_export/workers/test_pool.py",
    "exporters/test_other_exporters.py",
    "benchmarks/test_decode.py",
    "clada_export/cli/test_inspection.py",
    "benchmarks/test_policies.py",
    "fuzz/test_fuzz_engine.py",
    "fuzz/test_fuzz_onnx.py",
    "fuzz/test_fuzz_plan.py",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests by their file's place in `LONGEST`; within a file, and among the others, the order stays.

    Raises:
        FileNotFoundError: a file of `LONGEST` is not there (it was renamed, say).
    """
    place = {_existing(TESTS / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; correct its name in LONGEST of tests/order.py")
    return path
