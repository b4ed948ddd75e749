"""The op on ONNX Runtime's CUDA provider gives the reference's numbers."""

from __future__ import annotations

import onnxruntime as ort
import pytest
import torch
from op_shells import Case, assert_same, make_case, make_model, run

from clada_export.errors import BackendError
from clada_export.native.library import ort_cuda_library_path
from graph_passes.op import SCORES, SparseFFNAttributes

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)

PROVIDER = "CUDAExecutionProvider"


def session(case: Case) -> ort.InferenceSession:
    if PROVIDER not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider (onnxruntime-gpu is not installed)")
    try:
        library = ort_cuda_library_path()
    except BackendError as error:
        pytest.skip(str(error))
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    made = ort.InferenceSession(make_model(case).SerializeToString(), options, providers=[PROVIDER, "CPUExecutionProvider"])
    assert made.get_providers()[0] == PROVIDER
    return made


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_scores(score: str, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.float16):
        wanted = SparseFFNAttributes(score=score, use_stat=score == "prefix", emit_active=True, emit_stat=True, load_slope=0.3)
        case = make_case(wanted, shape=shape, dtype=dtype, x_dtype=dtype)
        assert_same(run(session(case), case), case.reference(), case.x.dtype)


def test_a_long_prompt_in_float32() -> None:
    wanted = SparseFFNAttributes(emit_active=True, emit_stat=True)
    case = make_case(wanted, shape=(2, 100), load=torch.full((2, 100), float("inf")))
    assert_same(run(session(case), case), case.reference(), case.x.dtype)
