"""Whether there is room for an export is asked before the work, and nothing is refused that would have worked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.files.capacity import Disk
from clada_export.pipeline import export
from clada_export.price import room
from clada_export.price.room import require_room, size_of
from clada_export.source.load import load_source
from clada_export.source.model import SourceModel

Folder = Callable[[str], Path]
PLENTY = 1 << 50


@pytest.fixture
def source(model_folder: Folder) -> SourceModel:
    return load_source(str(model_folder("llama")))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Set how much disk and memory there are."""

    def set_(free: int, memory: int) -> None:
        monkeypatch.setattr(room, "disk", lambda place: Disk(1, free))
        monkeypatch.setattr(room, "available_memory", lambda: memory)

    return set_


def test_with_room_nothing_is_said(source: SourceModel, machine: Callable[[int, int], None]) -> None:
    machine(PLENTY, PLENTY)
    assert require_room(source, Path("out"), ExportOptions(), None) is None


def test_a_disk_that_is_too_small(source: SourceModel, machine: Callable[[int, int], None]) -> None:
    weights = size_of(source).float32_bytes
    machine(weights // 2, PLENTY)
    with pytest.raises(
        UsageError, match=r"out: the engine takes .* and its disk has .* free; make room, or give another folder"
    ):
        require_room(source, Path("out"), ExportOptions(), None)
    machine(weights, PLENTY)
    told = require_room(source, Path("out"), ExportOptions(), None)
    assert told is not None and "the engine may take" in told  # with what the plan may add


def test_a_narrower_type_that_would_fit_is_named(source: SourceModel, machine: Callable[[int, int], None]) -> None:
    size = size_of(source)
    machine(size.float32_bytes - size.ffn, PLENTY)
    with pytest.raises(UsageError, match="with --dtype float16 it would take"):
        require_room(source, Path("out"), ExportOptions(), None)
    require_room(source, Path("out"), ExportOptions(dtype="float16"), None)


def test_pruning_may_make_room(source: SourceModel, machine: Callable[[int, int], None]) -> None:
    size = size_of(source)
    machine(size.float32_bytes - size.ffn * 2, PLENTY)
    for options in (ExportOptions(prune="wanda=neurons:0.5"), ExportOptions(policy="auto"), ExportOptions(policy="wanda")):
        told = require_room(source, Path("out"), options, None)
        assert told is not None and "the engine may take" in told


def test_memory_is_told_and_refuses_nothing(source: SourceModel, machine: Callable[[int, int], None]) -> None:
    machine(PLENTY, 1 << 20)
    told = require_room(source, Path("out"), ExportOptions(), None)
    assert told is not None and "of memory are needed beside the weights, and 0.00 GB are available" in told


def test_workers_without_a_place_for_their_weights(
    source: SourceModel, machine: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(PLENTY, PLENTY)
    monkeypatch.setattr(room, "spool_folder", lambda size: None)
    told = require_room(source, Path("out"), ExportOptions(calibration_workers=3), None)
    assert told is not None and told.startswith("3 workers take")


def test_a_system_that_does_not_say(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> Disk:
        raise OSError

    monkeypatch.setattr(room, "disk", refuse)
    monkeypatch.setattr(room, "available_memory", lambda: None)
    assert require_room(source, Path("out"), ExportOptions(), None) is None


def test_an_export_ends_before_calibration(
    model_folder: Folder, machine: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrated(*arguments: object) -> None:
        raise AssertionError("calibration began")

    monkeypatch.setattr("clada_export.pipeline.make_plan", calibrated)
    machine(1000, PLENTY)
    with pytest.raises(UsageError, match=r"its disk has 0\.00 GB free"):
        export(str(model_folder("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
