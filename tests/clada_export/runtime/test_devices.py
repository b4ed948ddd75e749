"""Which device an export for ONNX Runtime is opened on. There is no GPU here: what there is, is pretended."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from clada_export.cli import main
from clada_export.errors import BackendError, UsageError
from clada_export.native import library as native
from clada_export.native.library import ort_library_path
from clada_export.runtime import devices, load_engine
from clada_export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER, choose_device, providers
from tests.clada_export.runtime.test_runtime import write_export

_Session = ort.InferenceSession


class FakeBinding:
    """Real binding, but that what is to stay on the GPU stays on the CPU."""

    def __init__(self, real: Any, places: dict[str, str]) -> None:
        self.real, self._places = real, places

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self._places[name] = device
        self.real.bind_output(name, "cpu")

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


class FakeCuda:
    """A session that says it runs on the GPU, and runs on the CPU."""

    asked: list[Any]
    places: dict[str, str]
    comes_up = True

    def __init__(self, model: str, options: Any, providers: list[Any]) -> None:
        FakeCuda.asked, FakeCuda.places = providers, {}
        self._real = _Session(model, options, providers=[CPU_PROVIDER])

    def get_providers(self) -> list[str]:
        return [CUDA_PROVIDER, CPU_PROVIDER] if self.comes_up else [CPU_PROVIDER]

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self._real.io_binding(), self.places)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        self._real.run_with_iobinding(binding.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretend that these are there; the CUDA library is a copy of the one for the CPU."""

    def make(*, provider: bool = True, gpu: bool = True, library: bool = True) -> None:
        found = [CUDA_PROVIDER, CPU_PROVIDER] if provider else [CPU_PROVIDER]
        monkeypatch.setattr(ort, "get_available_providers", lambda: found)
        monkeypatch.setattr(devices, "missing_gpu", lambda: None if gpu else "there is no NVIDIA driver")
        monkeypatch.setattr(ort, "InferenceSession", FakeCuda)
        monkeypatch.delenv(native.ORT_CUDA_ENVIRONMENT_VARIABLE, raising=False)
        monkeypatch.setattr(native, "_candidates", lambda name: [tmp_path / "installed" / name])
        (tmp_path / "installed").mkdir(exist_ok=True)
        if library:
            shutil.copyfile(ort_library, tmp_path / "installed" / native.ORT_CUDA_LIBRARY_NAME)

    ort_library = ort_library_path()
    return make


LACKING = {
    "provider": r"has no CUDA provider here: pip uninstall onnxruntime, then pip install 'clada-export\[ort-gpu\]'",
    "gpu": "no NVIDIA GPU can be used: there is no NVIDIA driver",
    "library": r"libclada_ort_cuda\.so was not found .* install the CUDA toolkit",
}


@pytest.mark.parametrize("lacks", LACKING)
def test_what_is_missing_is_named_if_cuda_is_wanted_and_the_cpu_taken_if_not(pretend: Callable[..., None], lacks: str) -> None:
    pretend(**{lacks: False})
    assert choose_device("auto", own_library=True) == "cpu"
    with pytest.raises(BackendError, match=f"^device cuda: .*{LACKING[lacks]}.*; or run on the CPU: device cpu$"):
        choose_device("cuda", own_library=True)


def test_auto_takes_cuda_only_with_the_own_library(pretend: Callable[..., None]) -> None:
    pretend()
    assert choose_device("auto", own_library=True) == "cuda"
    assert choose_device("auto", own_library=False) == "cpu"
    assert choose_device("cpu", own_library=True) == "cpu"


def test_a_graph_for_the_cpu_stays_there(pretend: Callable[..., None]) -> None:
    pretend()
    assert choose_device("auto", own_library=True, for_cpu="it is so") == "cpu"
    assert choose_device("cpu", own_library=True, for_cpu="it is so") == "cpu"
    with pytest.raises(BackendError, match="device cuda: it is so; or run on the CPU"):
        choose_device("cuda", own_library=True, for_cpu="it is so")


def test_a_library_of_the_caller_needs_no_installed_one(pretend: Callable[..., None]) -> None:
    pretend(library=False)
    assert choose_device("cuda", own_library=False) == "cuda"


def test_providers_end_with_the_cpu() -> None:
    assert providers("cpu") == [CPU_PROVIDER]
    assert providers("cuda") == [(CUDA_PROVIDER, {"device_id": "0", "use_tf32": "0"}), CPU_PROVIDER]


def test_an_engine_on_cuda_keeps_its_state_there_and_gives_the_same(pretend: Callable[..., None], tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    wanted = load_engine(folder, threads=1, device="cpu")
    wanted_logits = wanted.prefill([[1, 2, 3], [4]]).logits
    pretend()
    engine = load_engine(folder, threads=1)
    assert FakeCuda.asked == providers("cuda")
    np.testing.assert_array_equal(engine.prefill([[1, 2, 3], [4]]).logits, wanted_logits)
    np.testing.assert_array_equal(engine.step([5, 6], 0.5).logits, wanted.step([5, 6], 0.5).logits)
    on_the_gpu = {name for name, place in FakeCuda.places.items() if place == "cuda"}
    assert on_the_gpu == {"present.0.key", "present.0.value"}
    assert FakeCuda.places["logits"] == FakeCuda.places["active_neurons"] == "cpu"


def test_the_cuda_library_is_checked(pretend: Callable[..., None], tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export")
    pretend()
    (tmp_path / "installed" / native.ORT_CUDA_LIBRARY_NAME).write_bytes(b"no library")
    with pytest.raises(BackendError, match=r"libclada_ort_cuda\.so can't be loaded"):
        load_engine(folder, device="cuda")


def test_a_provider_that_does_not_come_up(
    pretend: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_export(tmp_path / "export")
    pretend()
    monkeypatch.setattr(FakeCuda, "comes_up", False)
    with pytest.raises(BackendError, match=r"can't use its CUDA provider .* or run on the CPU: device cpu"):
        load_engine(folder)
    assert FakeCuda.asked == providers("cuda")


def test_a_device_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_export(tmp_path / "export")
    with pytest.raises(UsageError, match="device is 'gpu'; it must be one of auto, cpu, cuda"):
        load_engine(folder, device="gpu")
    with pytest.raises(UsageError, match="which runs on a GPU"):
        load_engine(write_export(tmp_path / "trt", target="trt"), device="cpu")
    for command in (["run", "--prompt", "x"], ["bench"]):
        assert main([command[0], str(folder), *command[1:], "--device", "cuda"]) == 5
        assert "device cuda: ONNX Runtime" in capsys.readouterr().err
