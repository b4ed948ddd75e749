"""Caches that grow in place: the engine computes what it does with caches that are copied, and room grows as it is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from clada_export.artifact.manifest import Manifest, _digest, file_record, read_manifest, write_manifest
from clada_export.errors import UsageError
from clada_export.load.signal import LoadSignal
from clada_export.load.values import SKIP
from clada_export.plan.plan import SparsityPlan
from clada_export.runtime import cache as cache_module
from clada_export.runtime import load_engine
from clada_export.runtime import session as session_module
from clada_export.targets.common import cache_tensors, tensor_spec
from graph_passes import AddLoadOutputs, FFNRewrite, name_interface, rewrite_ffns
from graph_passes.fuse_attention import FuseAttention
from graph_passes.kept_logits import KeepLastLogits
from graph_passes.op import SparseFFNAttributes
from graph_passes.reshapes import RemoveHeadReshapes
from tests.clada_export.runtime.test_runtime import make_manifest
from tests.tiny_models import export_tiny, ffn_names, tiny_config

PROMPTS = [np.random.default_rng(length).integers(3, 256, length).tolist() for length in (9, 1, 5, 23)]
SPARSE = SparseFFNAttributes(load_slope=0.2, load_min=0.5, load_max=2.0)


def write_export(folder: Path, kind: str, *, in_place: bool) -> None:
    """An export of a tiny model that runs the function body of its FFNs."""
    graph = export_tiny(kind, "cpu")
    name_interface(graph)
    rewrite_ffns(graph, {name: FFNRewrite(SPARSE, np.array([0.3], np.float32)) for name in ffn_names(kind)})
    RemoveHeadReshapes()(graph)
    if in_place:
        FuseAttention(512)(graph)
        KeepLastLogits()(graph)
    AddLoadOutputs()(graph)
    folder.mkdir()
    ir.save(graph, folder / "model.onnx")
    (folder / "config.json").write_text(tiny_config(kind).to_json_string())
    plan = SparsityPlan("clada", "gate", "threshold", (), LoadSignal(), {"weights_digest": "0"})
    manifest = make_manifest(
        plan=plan.to_dict(),
        load_signal=LoadSignal(surprisal_mean=3.0),
        inputs=tuple(tensor_spec(value) for value in graph.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in graph.graph.outputs),
        cache=cache_tensors(graph),
    )
    write_manifest(folder, manifest.with_files({path.name: file_record(path) for path in folder.iterdir()}))


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model with caches that grow in place, and with caches that are copied."""
    root = tmp_path_factory.mktemp("in_place")
    write_export(root / "in_place", request.param, in_place=True)
    write_export(root / "copied", request.param, in_place=False)
    return root / "in_place", root / "copied"


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room runs out every few tokens, and prompts come in small parts."""
    monkeypatch.setattr(cache_module, "ROOM", 1)
    monkeypatch.setattr(cache_module, "ROUND", 2)
    monkeypatch.setattr(session_module, "IN_PLACE_RUN", 4)


def test_it_generates_the_same(folders: tuple[Path, Path], tight: None) -> None:
    engines = [load_engine(folder, threads=1, use_library=False) for folder in folders]
    first, second = (engine.generate(PROMPTS, 40, load="auto", eos_token_id=[]) for engine in engines)
    assert first.tokens == second.tokens
    np.testing.assert_allclose(first.loads, second.loads, atol=1e-4)
    assert first.active is not None
    assert second.active is not None
    assert np.mean(first.active != second.active) < 0.01


def test_all_logits_are_there_for_who_asks(folders: tuple[Path, Path], tight: None) -> None:
    in_place, copied = (load_engine(folder, threads=1, use_library=False).logits(PROMPTS, 0.0) for folder in folders)
    for row, wanted, prompt in zip(in_place, copied, PROMPTS, strict=True):
        assert len(row) == len(prompt)
        np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-3)


def test_a_prompt_computes_the_logits_of_its_last_position(folders: tuple[Path, Path]) -> None:
    engine = load_engine(folders[0], threads=1, use_library=False)
    shapes = []
    run = engine._session.run

    def watched(feeds: dict[str, np.ndarray], state: object) -> object:
        output = run(feeds, state)
        shapes.append(output.logits.shape)
        return output

    engine._session.run = watched  # type: ignore[assignment,method-assign]
    engine.prefill(PROMPTS)
    assert [shape[:2] for shape in shapes] == [(4, 1)]
    engine.logits(PROMPTS)
    assert shapes[1][:2] == (4, 23)


def test_rows_that_rest_go_on_where_they_were(folders: tuple[Path, Path], tight: None) -> None:
    outputs = []
    for folder in folders:
        engine = load_engine(folder, threads=1, use_library=False)
        engine.prefill(PROMPTS)
        found = [engine.step([7, 8, 9, 10], [0.0, SKIP, 0.0, SKIP] if step % 2 else 0.0).logits for step in range(6)]
        outputs.append(found[-2])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-3)


def test_nothing_is_copied_at_a_step(folders: tuple[Path, Path]) -> None:
    engine = load_engine(folders[0], threads=1, use_library=False)
    engine.prefill(PROMPTS)
    assert engine._state is not None
    state = engine._state.cache
    memory = {name: buffer.ctypes.data for name, buffer in state.buffers.items()}
    assert state.room == 256
    for _ in range(5):
        engine.step([7, 8, 9, 10])
    assert {name: buffer.ctypes.data for name, buffer in state.buffers.items()} == memory
    assert state.used == 23 + 5


def test_two_batches_do_not_share_memory(folders: tuple[Path, Path]) -> None:
    engine = load_engine(folders[0], threads=1, use_library=False)
    engine.prefill(PROMPTS)
    alone = engine.step([7, 8, 9, 10]).logits
    engine.prefill(PROMPTS)
    engine.logits([[3, 4, 5]] * 2)  # another state meanwhile
    np.testing.assert_array_equal(engine.step([7, 8, 9, 10]).logits, alone)


def test_manifests_of_before_say_nothing_of_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    written = json.loads((folders[1] / "clada.json").read_text())
    assert {tensor["in_place"] for tensor in written["cache"]} == {None}
    content = {key: value for key, value in written.items() if key != "digest"}
    content["cache"] = [{key: item for key, item in tensor.items() if key != "in_place"} for tensor in content["cache"]]
    old = Manifest.from_dict({**content, "digest": _digest(content)})
    assert all(tensor.in_place is None for tensor in old.cache)


@pytest.mark.parametrize("axis", [1, 3])
def test_an_axis_that_does_not_grow_is_refused(folders: tuple[Path, Path], tmp_path: Path, axis: int) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folders[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, cache=tuple(replace(tensor, in_place=axis) for tensor in manifest.cache)))
    with pytest.raises(UsageError, match=f"on axis {axis}"):
        load_engine(copy, threads=1, use_library=False)
