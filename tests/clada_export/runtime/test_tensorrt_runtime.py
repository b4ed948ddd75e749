"""The TensorRT session on a GPU of NumPy: buffers, profiles, messages. What a real GPU computes is not tested here."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clada_export.artifact.manifest import TensorSpec, read_manifest
from clada_export.artifact.profiles import Profile, choose_profile, make_profiles
from clada_export.errors import BackendError, UsageError
from clada_export.native.library import check_content, ort_library_path
from clada_export.native.tensorrt import missing_gpu
from clada_export.runtime import Engine, load_engine
from clada_export.runtime import tensorrt_session as module
from clada_export.runtime.cuda import CudaDevice, host_array, to_float32
from clada_export.runtime.tensorrt_session import RuntimeCache, TensorRTSession, engine_for, open_engine
from tests.clada_export.fake_gpu import FakeDevice, FakeEngine, fake_backend
from tests.clada_export.runtime.test_runtime import write_export

BATCH, SEQUENCE, PAST = 2, 5, 20
RECORD: dict[str, Any] = {
    "backend": "tensorrt_rtx",
    "version": "1.7.1.116",
    "package": "tensorrt-rtx-cu13",
    "files": [{"file": "model.onnx", "compute_capabilities": ["8.6", "8.9"]}],
    "profiles": [profile.to_dict() for profile in make_profiles(BATCH, SEQUENCE, PAST, None)],
    "plugin": None,
    "refit": False,
    "weight_streaming": False,
    "layers": "model.onnx",
    "commands": {},
}


class Loaded:
    """An engine over a fake GPU, and what it is made of."""

    def __init__(self, folder: Path, cache: RuntimeCache | None = None, limit: int = 1 << 30) -> None:
        self.device = FakeDevice(limit)
        backend = fake_backend()
        self.fake = FakeEngine(folder / "model.onnx", self.device, backend.messages)
        manifest = read_manifest(folder)
        self.session = TensorRTSession(backend, self.fake, manifest, self.device, cache)
        self.engine = Engine(folder, manifest, self.session)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "tiny", target="trt", engine=RECORD)


@pytest.fixture(scope="module")
def ort_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(write_export(tmp_path_factory.mktemp("export") / "ort"), threads=1)


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1], [4, 5, 6, 7]], [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4], [5]]])
def test_it_generates_what_onnx_runtime_does(folder: Path, ort_engine: Engine, prompts: list[list[int]]) -> None:
    loaded = Loaded(folder)
    for load in ("dense", "auto"):
        found = loaded.engine.generate(prompts, 6, load=load, eos_token_id=[])  # type: ignore[arg-type]
        wanted = ort_engine.generate(prompts, 6, load=load, eos_token_id=[])  # type: ignore[arg-type]
        assert found.tokens == wanted.tokens
        np.testing.assert_allclose(found.loads, wanted.loads, rtol=1e-5)
    # Prompts run in parts of the profile's length; single tokens use the profile of decoding.
    longest = max(map(len, prompts))
    sizes = [tokens for _, _, tokens in loaded.fake.runs]
    assert max(sizes) == min(longest, SEQUENCE)
    assert {profile for profile, _, tokens in loaded.fake.runs if tokens == 1} == {0}
    assert {profile for profile, _, tokens in loaded.fake.runs if tokens > 1} <= {1}


def test_scores_and_logits_use_a_state_of_their_own(folder: Path, ort_engine: Engine) -> None:
    loaded = Loaded(folder)
    loaded.engine.prefill([[1, 2, 3]])
    np.testing.assert_allclose(loaded.engine.logits([[4, 5, 6]])[0], ort_engine.logits([[4, 5, 6]])[0], rtol=1e-5)
    ort_engine.prefill([[1, 2, 3]])
    np.testing.assert_allclose(loaded.engine.step([4]).logits, ort_engine.step([4]).logits, rtol=1e-5)


def test_memory_is_allocated_once_and_given_back(folder: Path) -> None:
    loaded = Loaded(folder)
    loaded.engine.prefill([[1, 2]])
    loaded.engine.step([3])
    allocations = loaded.device.allocations
    inputs = len(loaded.fake.inputs) - 2
    assert allocations >= 2 * 2 + inputs  # two buffers for key and value, one for each other input
    for token in range(1, 8):
        loaded.engine.step([token])
    # Only the mask grows with the text, and its buffer with it.
    assert loaded.device.allocations - allocations <= 8
    state_before = sum(map(len, loaded.device.memory.values()))
    loaded.engine.prefill([[1, 2]])
    gc.collect()
    assert sum(map(len, loaded.device.memory.values())) <= state_before
    loaded.engine._state = None
    loaded.session.close()
    gc.collect()
    assert loaded.device.memory == {}


def test_sizes_that_the_engine_does_not_take(folder: Path) -> None:
    loaded = Loaded(folder)
    with pytest.raises(UsageError, match=r"3 sequences in a batch are more than this engine takes: 2; .*--max-batch 3"):
        loaded.engine.prefill([[1], [2], [3]])
    assert loaded.engine.max_positions == PAST + 1
    with pytest.raises(UsageError, match=r"22 tokens, and the model takes at most 21; shorten it; a larger --max-past"):
        loaded.engine.prefill([[1] * 22])
    made = loaded.engine.generate([[1] * 16], 30, eos_token_id=[])
    assert made.finish == ["context"]


def test_failures_of_the_run(folder: Path) -> None:
    loaded = Loaded(folder)
    loaded.fake.fail = "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal address)"
    with pytest.raises(BackendError, match=r"fails to run the engine: .*illegal address"):
        loaded.engine.prefill([[1, 2]])
    small = Loaded(folder, limit=100)
    with pytest.raises(BackendError, match="out of memory"):
        small.engine.prefill([[1, 2]])
    gc.collect()
    assert small.device.memory == {}
    loaded = Loaded(folder)
    loaded.fake.create_execution_context = lambda config=None: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(BackendError, match="can't make an execution context"):
        loaded.engine.prefill([[1, 2]])


def test_an_engine_with_other_inputs(folder: Path) -> None:
    manifest = replace(read_manifest(folder), inputs=read_manifest(folder).inputs[:-1])
    backend, device = fake_backend(), FakeDevice()
    with pytest.raises(UsageError, match="differ from the manifest's"):
        TensorRTSession(backend, FakeEngine(folder / "model.onnx", device, backend.messages), manifest, device)


def test_compiled_kernels_are_kept(folder: Path, tmp_path: Path) -> None:
    cache = RuntimeCache(tmp_path / "a" / "kernels")
    loaded = Loaded(folder, cache)
    loaded.engine.prefill([[1, 2]])
    assert cache.path.read_bytes() == b"kernels"
    assert loaded.fake.kernels.read == b""
    again = Loaded(folder, cache)
    again.engine.prefill([[1, 2]])
    assert again.fake.kernels.read == b"kernels"
    (tmp_path / "file").write_text("")
    RuntimeCache(tmp_path / "file" / "kernels").write(b"x")  # a place that can't be written to is no error
    assert RuntimeCache(tmp_path / "nothing").read() == b""


@pytest.mark.parametrize("values", [[0.0, 1.0, -2.5, 3e38, np.inf, -np.inf]])
def test_bfloat16_results(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    narrow = host_array((len(values),), "bfloat16")
    narrow[...] = exact.view(np.uint32) >> 16
    found = to_float32(narrow, "bfloat16")
    np.testing.assert_allclose(found, exact, rtol=2**-7)
    assert to_float32(np.array([1.5], np.float16), "float16").dtype == np.float32


# --- opening ---


def test_opening_needs_a_gpu(folder: Path) -> None:
    if missing_gpu() is None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match=r"runs on an NVIDIA GPU, and there is no NVIDIA driver|the NVIDIA driver"):
        load_engine(folder)
    with pytest.raises(BackendError, match="GPU"):
        CudaDevice()


def test_opening_takes_no_options_of_onnx_runtime(folder: Path) -> None:
    with pytest.raises(UsageError, match="this is an export for TensorRT"):
        load_engine(folder, threads=2)
    with pytest.raises(UsageError, match="this is an export for TensorRT"):
        load_engine(folder, use_library=False)


def _runtime(engine: Any, said: str = "") -> Any:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            if said:
                backend.messages.errors.append(said)
            return engine

    backend = fake_backend(trt=SimpleNamespace(Runtime=Runtime))
    return backend


def _open(monkeypatch: pytest.MonkeyPatch, folder: Path, backend: Any, capability: str = "8.9") -> Any:
    monkeypatch.setattr(module, "missing_gpu", lambda: None)
    monkeypatch.setattr(module, "gpu_capability", lambda: capability)
    monkeypatch.setattr(module, "load_backend", lambda name: backend)
    return open_engine(folder, read_manifest(folder))


def test_opening_checks_the_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = object()
    assert _open(monkeypatch, folder, _runtime(engine))[1] is engine
    with pytest.raises(BackendError, match=r"pip install tensorrt-rtx-cu13==1\.7\.1\.116"):
        _open(monkeypatch, folder, replace(_runtime(engine), version="1.8.0.2"))
    assert _open(monkeypatch, folder, replace(_runtime(engine), version="1.7.1.2"))[1] is engine


class FakeRegistry:
    """A plugin registry that notes what it is given to load, and what was in it."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, bytes]] = []
        self.all_creators: list[Any] = []

    def load_library(self, path: str) -> object:
        self.loaded.append((path, Path(path).read_bytes()))
        return object()

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if self.loaded else None


def _with_plugin(tmp_path: Path, embedded: bool) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    library = ort_library_path().read_bytes()
    (out / "libclada_trt.so").write_bytes(library)
    plugin = {
        "name": "SparseFFN",
        "version": "1",
        "namespace": "com.clada",
        "file": "libclada_trt.so",
        "embedded": embedded,
        "layers": 2,
    }
    return write_export(out, target="trt", engine={**RECORD, "plugin": plugin}, library="libclada_trt.so")


def test_the_plugin_is_loaded_from_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _with_plugin(tmp_path, embedded=False)
    manifest, library = read_manifest(folder), folder / "libclada_trt.so"
    checked = library.read_bytes()
    registry, backend = FakeRegistry(), _runtime(object())
    backend.trt.Runtime.get_plugin_registry = lambda self: registry

    def swap(content: bytes, name: Path) -> Path:
        library.write_bytes(bytes(len(content)))
        return check_content(content, name)

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_content", swap)
        _open(monkeypatch, folder, backend)
    ((path, loaded),) = registry.loaded
    assert not path.startswith(str(folder)) and loaded == checked
    # The swapped one is refused before it is loaded.
    registry.loaded.clear()
    with pytest.raises(UsageError, match=r"libclada_trt\.so: changed after the export"):
        open_engine(folder, manifest)
    assert registry.loaded == []
    # A library of the user's, and one that was not to be checked, are loaded as they are.
    open_engine(folder, manifest, ort_library_path())
    assert registry.loaded[0][0] == str(ort_library_path())
    registry.loaded.clear()
    open_engine(folder, manifest, checked=False)
    assert registry.loaded[0][0] == str(library)


def test_an_engine_with_its_plugin_in_it_is_a_library_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _with_plugin(tmp_path, embedded=True)
    manifest = read_manifest(folder)
    engine = object()
    assert _open(monkeypatch, folder, _runtime(engine))[1] is engine
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(bytes(len(content)))
    with pytest.raises(UsageError, match=r"model\.onnx: changed after the export"):
        open_engine(folder, manifest)
    assert open_engine(folder, manifest, checked=False)[1] is engine


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "token_type_ids"}, "input 'token_type_ids' (int64) is none that this program feeds"),
        ({"dtype": "int32"}, "input 'input_ids' (int32)"),
        ({"dtype": "no type at all"}, "input 'input_ids' (no type at all)"),
    ],
)
def test_inputs_that_nobody_feeds(folder: Path, changes: dict[str, str], said: str) -> None:
    manifest = read_manifest(folder)
    manifest = replace(manifest, inputs=(replace(manifest.inputs[0], **changes), *manifest.inputs[1:]))
    backend, device = fake_backend(), FakeDevice()
    fake = FakeEngine(folder / "model.onnx", device, backend.messages)
    if "name" in changes:
        fake.inputs[changes["name"]] = fake.inputs.pop("input_ids")
    with pytest.raises(UsageError, match=re.escape(said)):
        TensorRTSession(backend, fake, manifest, device)


def test_results_of_another_type(folder: Path) -> None:
    manifest = read_manifest(folder)
    outputs = tuple(replace(spec, dtype="float64") if spec.name == "logits" else spec for spec in manifest.outputs)
    backend, device = fake_backend(), FakeDevice()
    with pytest.raises(UsageError, match=r"output 'logits' is float64; float32 or float16 or bfloat16 is wanted"):
        TensorRTSession(
            backend, FakeEngine(folder / "model.onnx", device, backend.messages), replace(manifest, outputs=outputs), device
        )


def test_an_engine_for_another_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _runtime(None, "the engine was built for another device")
    with pytest.raises(BackendError, match=r"compute capability 9\.0 \(it is for 8\.6, 8\.9\): .*another device"):
        _open(monkeypatch, folder, backend, "9.0")


def test_the_file_for_a_gpu() -> None:
    one = {"files": [{"file": "a", "compute_capabilities": ["8.0", "8.9"]}]}
    assert engine_for(one, "12.1")["file"] == "a"
    two = {"files": [{"file": name, "compute_capabilities": [name]} for name in ("8.6", "8.9")]}
    assert engine_for(two, "8.9")["file"] == "8.9"
    with pytest.raises(BackendError, match=r"capability 12\.0, and the export has engines for 8\.6, 8\.9; .*12\.0"):
        engine_for(two, "12.0")


# --- profiles ---


def test_profiles_fit_the_model() -> None:
    decode, prompt = make_profiles(1, None, None, 512)
    assert (decode.sequence, decode.past) == ((1, 1, 1), (0, 255, 511))
    assert (prompt.sequence, prompt.past) == ((1, 256, 512), (0, 0, 511))
    assert make_profiles(4, None, None, None)[0].past[2] == 2048
    assert make_profiles(1, None, None, 2)[0].past == (0, 0, 1)
    with pytest.raises(UsageError, match="--max-sequence 600 is more than the model takes: 512"):
        make_profiles(1, 600, None, 512)
    with pytest.raises(UsageError, match="--max-past 512 leaves no place"):
        make_profiles(1, None, 512, 512)


def test_profiles_as_shapes_and_back() -> None:
    profile = Profile("prompt", (1, 2, 4), (1, 8, 16), (0, 0, 32))
    spec = TensorSpec("past_key_values.0.key", "float32", ("batch_size", 3, "past_sequence_length", 64))
    assert profile.shapes(spec) == ((1, 3, 0, 64), (2, 3, 0, 64), (4, 3, 32, 64))
    mask = TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length"))
    assert profile.shapes(mask) == ((1, 1), (2, 8), (4, 48))
    assert Profile.from_dict(profile.to_dict()) == profile
    with pytest.raises(UsageError, match="axis 'heads'"):
        profile.shapes(TensorSpec("x", "float32", ("heads",)))


@pytest.mark.parametrize(("sizes", "said"), [((1, 9, 0), "--max-sequence 9"), ((1, 1, 99), "--max-past 99")])
def test_no_profile_says_which_option(sizes: tuple[int, int, int], said: str) -> None:
    profiles = make_profiles(2, 8, 16, None)
    assert choose_profile(profiles, 2, 1, 16) == 0
    assert choose_profile(profiles, 2, 8, 16) == 1
    with pytest.raises(UsageError, match=said):
        choose_profile(profiles, *sizes)
