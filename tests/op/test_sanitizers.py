"""The framework-free kernels, and the plugin around those for CUDA, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from emulation import SANITIZED, emulation_folder, native_build, plugin_program
from op_shells import Case, make_case
from plugin_harness import PluginCase, run_plugin_cases

from graph_passes.op import RULES, SCORES, STAT_NORMS, SparseFFNAttributes


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_kernels_under_sanitizers() -> None:
    programs = ("clada_kernel_test", "clada_quant_test", "clada_ffn_quant_test")
    folder = native_build("sanitized", [*SANITIZED, "-DCLADA_ORT=OFF"], programs)
    for program in programs:
        command = [str(folder / "tests" / "op" / "native" / program), "300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_cuda_kernels_under_sanitizers() -> None:
    """Each score and rule, at sizes that no block, warp or vector divides, in both paths; and a node that is refused."""
    cases: list[Case | PluginCase] = []
    for i, (score, rule) in enumerate((score, rule) for score in SCORES for rule in RULES):
        wanted = SparseFFNAttributes(
            score=score, rule=rule, granule=1 + i % 3, gated=i % 2 == 0, use_stat=True, emit_stat=True, emit_active=True,
            stat_norm=STAT_NORMS[i // 2 % 2], has_bias=True, backbone_min=0.3, prior_gamma=0.2,
        )  # fmt: skip
        dtype = (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        shape = ((1, 1), (2, 5), (1, 19))[i // 3 % 3]
        cases.append(make_case(wanted, shape=shape, d=64 if score == "shadow" else 37, f=42, dtype=dtype, x_dtype=dtype))
    good = len(cases)
    cases.append(PluginCase.of(make_case(SparseFFNAttributes())).with_fields(granule=5))
    results = run_plugin_cases(cases, *plugin_program(emulation_folder(sanitize=True)))
    assert [result.failed for result in results] == [""] * good + ["configure"]
