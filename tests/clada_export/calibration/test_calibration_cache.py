"""The calibration cache: what is found again, what is made again, and what is never trusted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from clada_export.calibration import Budget, CalibrationOptions, CalibrationResult, calibrate, load_calibration_data
from clada_export.calibration.cache import (
    CalibrationCache,
    Piece,
    PieceStore,
    default_cache_folder,
    parse_cache_folder,
)
from clada_export.calibration.heldout import HeldOut
from clada_export.calibration.windows import Runner
from clada_export.decoder.ffn import EagerFFN, find_eager_ffns
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.methods import MethodPolicy, PolicyContext, PolicySettings, get_policy
from clada_export.methods.clada import GAMMAS
from clada_export.plan.layer import RouterForm
from clada_export.plan.method import Method, draft_layers
from clada_export.plan.tensors import LayerTensors
from graph_passes.router import Router
from tests.tiny_models import tiny_model

DATA = load_calibration_data(None, 256, context=32)
OPTIONS = CalibrationOptions(sparsity=0.4, load_response=False)
KEY = "0" * 64
# The package's attribute of this name is the function.
stage = importlib.import_module("clada_export.calibration.calibrate")


@dataclass(frozen=True, kw_only=True)
class RandomRouterPolicy(MethodPolicy):
    """Trains nothing, but says that it does, and counts."""

    calls: list[str] = field(default_factory=list)
    name: str = "random"
    trained: bool = True
    scores: tuple[str, ...] = ("external",)

    def check(self, ffns: Sequence[EagerFFN]) -> None:
        """Any FFN will do."""

    def methods(self, context: PolicyContext) -> tuple[Method, ...]:
        self.calls.append(self.name)
        rng = np.random.default_rng(0)
        layers, arrays = [], {}
        for layer in draft_layers(context.ffns, granule=8, reordered=True):
            shape = (layer.width // 8, layer.hidden_size)
            router = Router((rng.normal(size=shape).astype(np.float32),), (np.zeros(shape[0], np.float32),))
            arrays[layer.name] = LayerTensors(router, rng.permutation(layer.width))
            layers.append(replace(layer, router=RouterForm.of(router)))
        return (Method("random", "external", "topk", tuple(layers), arrays, ("sparsity",), {"trained on": {"rows": 3}}),)


class Passes:
    """Counts the passes over the text."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        for module, name in ((stage, "run_sensitivity"), (stage, "run_statistics")):
            patch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.made.append(name)
            return real(*args, **kwargs)

        return counted

    def taken(self) -> list[str]:
        made, self.made = sorted(self.made), []
        return made


BOTH = ["run_sensitivity", "run_statistics"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def run(
    folder: Path | None,
    *,
    model: nn.Module | None = None,
    policy: MethodPolicy | None = None,
    seed: int = 0,
    options: CalibrationOptions = OPTIONS,
    context: int = 32,
    said: list[str] | None = None,
) -> CalibrationResult:
    decoder = TorchDecoder(tiny_model("llama", 0) if model is None else model)
    data = DATA if context == 32 else load_calibration_data(None, 256, context=context)
    cache = CalibrationCache.of(folder, decoder, data.calibration, seed, [].append if said is None else said.append)
    options = replace(options, seed=seed)
    return calibrate(decoder, policy or get_policy("cats"), data, {"weights_digest": "0"}, options, cache=cache)


def test_a_second_run_makes_no_pass_and_gives_the_same_plan(tmp_path: Path, passes: Passes) -> None:
    without = run(None)
    assert passes.taken() == BOTH
    first = run(tmp_path)
    assert passes.taken() == BOTH
    second = run(tmp_path)
    assert passes.taken() == []
    texts = {json.dumps(result.plan.to_dict()) + json.dumps(result.details) for result in (without, first, second)}
    assert len(texts) == 1


def test_another_policy_needs_its_own_tables_only(tmp_path: Path, passes: Passes) -> None:
    run(tmp_path)
    passes.taken()
    run(tmp_path, policy=get_policy("tt"))
    assert passes.taken() == ["run_statistics"]


def test_missing_variants_alone_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, policy=get_policy("clada", PolicySettings(prior=False)))
    asked: list[list[str]] = []
    real = stage.run_statistics

    def collect(runner: Runner, methods: Sequence[Method], **rest: Any) -> object:
        asked.append([method.label for method in methods])
        return real(runner, methods, **rest)

    monkeypatch.setattr(stage, "run_statistics", collect)
    cached = run(tmp_path, policy=get_policy("clada"))
    assert asked == [[f"prior {gamma:g}" for gamma in GAMMAS]]
    assert cached.plan.to_dict() == run(None, policy=get_policy("clada")).plan.to_dict()


def test_what_changes_the_numbers_changes_the_key(tmp_path: Path, passes: Passes) -> None:
    run(tmp_path)
    passes.taken()
    changed = tiny_model("llama", 0)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1.0
    rounded = tiny_model("llama", 0)
    with torch.no_grad():
        for ffn in find_eager_ffns(rounded).found:
            ffn.down.weight.copy_(ffn.down.weight.half().float())
    other_config = tiny_model("llama", 0)
    other_config.config.rms_norm_eps = 0.1
    for model in (changed, rounded, other_config):
        run(tmp_path, model=model)
        assert passes.taken() == BOTH
    run(tmp_path, seed=1)
    assert passes.taken() == BOTH
    run(tmp_path, context=40)
    assert passes.taken() == BOTH
    run(tmp_path)
    assert passes.taken() == []


def test_trained_routers_are_found_again(tmp_path: Path) -> None:
    policy = RandomRouterPolicy()
    first, second = run(tmp_path, policy=policy), run(tmp_path, policy=policy)
    assert len(policy.calls) == 1
    assert first.plan.to_dict() == second.plan.to_dict()
    assert second.plan.calibration.details["trained on"] == {"rows": 3}
    for name, tensors in first.plan.arrays.items():
        found = second.plan.arrays[name]
        assert tensors.router is not None and found.router is not None
        np.testing.assert_array_equal(tensors.router.weights[0], found.router.weights[0])
        np.testing.assert_array_equal(tensors.neurons, found.neurons)  # type: ignore[arg-type]
    run(tmp_path, policy=policy, options=replace(OPTIONS, sparsity=0.6))
    run(tmp_path, policy=replace(policy, settings=PolicySettings(rows=100)))
    assert len(policy.calls) == 3


def test_an_interrupted_run_goes_on(tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage.DriftMeter, "measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert passes.taken() == BOTH
    run(tmp_path)
    assert passes.taken() == []


def test_what_was_measured_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    real = HeldOut.sparse

    def sparse(self: HeldOut, group: int, *rest: Any) -> Any:
        ran.append(group)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return real(self, group, *rest)

    monkeypatch.setattr(HeldOut, "sparse", sparse)
    options = CalibrationOptions(budget=Budget.parse("kl=0.002"), load_response=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=options)
    first = run(tmp_path, options=options)
    # Three measurements were kept; one group holds all windows here.
    searched = len(ran)
    assert ran and first.plan.to_dict() == run(None, options=options).plan.to_dict()
    without = len(ran) - searched
    assert searched - 4 == without - 3
    again = run(tmp_path, options=options)
    assert len(ran) == searched + without and again.plan.to_dict() == first.plan.to_dict()
    np.testing.assert_array_equal(again.drift.kl, first.drift.kl)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def _foreign(path: Path) -> None:
    save_file({"x": np.zeros(3)}, path)


def _renamed(path: Path) -> None:
    save_file(load_file(path), path, {"format": "clada-export calibration cache 1", "key": KEY, "digest": "", "value": "null"})


@pytest.mark.parametrize("harm", [_truncate, _flip, _foreign, _renamed, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_made_again_with_a_warning(tmp_path: Path, passes: Passes, harm: Callable[[Path], None]) -> None:
    clean = run(tmp_path)
    passes.taken()
    said: list[str] = []
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"sensitivity", "statistics", "signals", "drift"}
    for path in files:
        harm(path)
    again = run(tmp_path, said=said)
    assert again.plan.to_dict() == clean.plan.to_dict()
    assert passes.taken() == BOTH
    assert len(said) == len(files) and all("can't be used" in text and "it is made again" in text for text in said)
    said.clear()
    run(tmp_path, said=said)
    assert passes.taken() == [] and said == []


def test_a_piece_with_a_right_digest_and_wrong_content_is_made_again(tmp_path: Path, passes: Passes) -> None:
    run(tmp_path)
    passes.taken()
    said: list[str] = []
    store = PieceStore(tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    for path in files:
        store.put(path.parent.name, path.stem, Piece({"other": np.zeros(2)}, {"surprise": 1}))
    run(tmp_path, said=said)
    assert passes.taken() == BOTH and len(said) == len(files)


def test_nothing_but_whole_files_is_left(tmp_path: Path) -> None:
    run(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    result = run(tmp_path / "file" / "cache", said=said)
    assert result.plan.expected_sparsity > 0
    assert len(said) == 1 and "can't be written" in said[0]


@given(
    st.dictionaries(st.text("ab.0", min_size=1, max_size=4), st.lists(st.integers(-5, 5), max_size=4), max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
    ),
)
def test_pieces_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, list[int]], value: object
) -> None:
    said: list[str] = []
    store = PieceStore(tmp_path_factory.mktemp("cache"), said.append)
    piece = Piece({name: np.array(items, dtype=np.int64) for name, items in arrays.items()}, value)
    store.put("kind", KEY, piece)
    found = store.get("kind", KEY)
    assert found is not None and found.value == value and said == []
    assert {name: array.tolist() for name, array in found.arrays.items()} == arrays


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "clada-export" == parse_cache_folder(None)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == Path.home() / ".cache" / "clada-export"
    assert parse_cache_folder("none") is None
    assert parse_cache_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="it is a file"):
        parse_cache_folder(str(tmp_path / "file"))


def test_without_a_folder_nothing_is_hashed_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TorchDecoder, "weights_digest", lambda self: pytest.fail("hashed"))
    run(None)
    assert list(tmp_path.iterdir()) == []
