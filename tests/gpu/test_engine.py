"""A TensorRT engine with the plugin runs and agrees with eager PyTorch, where a TensorRT is installed that serves this GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from clada_export import export, load_engine
from clada_export.errors import BackendError
from clada_export.pipeline import verify_folder
from clada_export.targets.options import TensorRTOptions

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no GPU", allow_module_level=True)

# TensorRT-RTX has no target for Hopper or data-centre Blackwell; whether its other engines run there is worth knowing.
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tiny_model(tmp_path: Path, dtype: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    options = TensorRTOptions(compute_capabilities=CAPABILITIES)
    try:
        export(tmp_path / "model", tmp_path / "out", target="trt", tensorrt=options, dtype=dtype, sparsity=0.3, verify=False)
    except BackendError as error:
        pytest.skip(f"no engine can be built here: {error}")
    try:
        engine = load_engine(tmp_path / "out")
        assert len(engine.generate([1, 2, 3], 8).tokens) == 1
    except BackendError as error:
        major, minor = torch.cuda.get_device_capability()
        pytest.skip(f"the engine for {', '.join(CAPABILITIES)} does not run on compute capability {major}.{minor}: {error}")
    assert verify_folder(tmp_path / "out", str(tmp_path / "model")).passed
