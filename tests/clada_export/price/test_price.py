"""What an export costs, before it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from safetensors import safe_open

from clada_export.cli import main
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.export_options import ExportOptions
from clada_export.plan.weights_form import FORMS
from clada_export.price import Machine, ModelSize, Work, measure_machine, price, work_of
from clada_export.price.outline import Outline, outline
from clada_export.price.told import told
from clada_export.source.load import load_source, source_request
from tests.tiny_models import KINDS, MOE_KINDS, export_tiny, tiny_model

Folder = Callable[[str], Path]
GB = 10**9
SIZE = ModelSize(
    parameters=GB,
    used=900_000_000,
    largest=200_000_000,
    ffn=600_000_000,
    widest=30_000_000,
    layers=20,
    vocabulary=50_000,
    stored=2 * GB,
)
MACHINE = Machine(gflops=250.0, disk_gb_s=1.0, threads=2, memory=64 * GB, disk=100 * GB, temporary=100 * GB, same_disk=True)


def _outline(folder: Path) -> Outline:
    found = outline(source_request(str(folder)))
    assert found is not None
    return found


def _described(decoder: TorchDecoder) -> list[tuple[Any, ...]]:
    return [(ffn.name, ffn.activation, ffn.gated, ffn.packing, ffn.hidden_size, ffn.intermediate_size) for ffn in decoder.ffns]


@pytest.mark.parametrize("kind", [*KINDS, *MOE_KINDS])
def test_ffns_are_those_of_the_loaded_model(kind: str, model_folder: Folder) -> None:
    found, real = _outline(model_folder(kind)), TorchDecoder(tiny_model(kind))
    decoder = found.decoder()
    assert _described(decoder) == _described(real)
    assert decoder.skipped == real.skipped
    assert ModelSize.of_model(found.model, decoder.ffns, 1) == ModelSize.of_model(real.module, real.ffns, 1)


def test_no_weight_is_read(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("llama")
    file = next(folder.glob("*.safetensors"))
    with safe_open(file, framework="pt") as stream:
        stored = sum(stream.get_tensor(name).nbytes for name in stream.offset_keys())
    # What is after the header is gone: the file is as long as before, and a hole.
    length = file.stat().st_size
    head = file.read_bytes()[: length - stored]
    hollow = folder.parent / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_text((folder / "config.json").read_text())
    with (hollow / file.name).open("wb") as stream:
        stream.write(head)
        stream.truncate(length)
    assert _described(_outline(hollow).decoder()) == _described(TorchDecoder(tiny_model("llama")))


def test_a_tied_head_counts_once_and_is_used(model_folder: Folder) -> None:
    tied = tiny_model("gemma")
    size = ModelSize.of_model(tied, TorchDecoder(tied).ffns, 0)
    assert size.used == size.parameters == sum(weight.numel() for weight in tied.parameters())
    untied = tiny_model("llama")
    size = ModelSize.of_model(untied, TorchDecoder(untied).ffns, 0)
    assert size.parameters - size.used == untied.get_input_embeddings().weight.numel()  # type: ignore[operator]
    assert size.ffn == 2 * 3 * 64 * 96 and size.widest == 3 * 64 * 96 and size.vocabulary == 256


def test_a_graph_has_the_size_of_its_model() -> None:
    from clada_export.source.onnx.graph import compilable_ffns
    from graph_passes.search import find_ffns

    graph, model = export_tiny("phi3", None), tiny_model("phi3")
    size = ModelSize.of_graph(graph, compilable_ffns(find_ffns(graph)).matches)
    eager = ModelSize.of_model(model, TorchDecoder(model).ffns, size.stored)
    assert (size.ffn, size.widest, size.layers, size.vocabulary) == (eager.ffn, eager.widest, eager.layers, eager.vocabulary)
    assert size.parameters == pytest.approx(eager.parameters, rel=0.01) and size.graph
    assert all(isinstance(value.const_value, ir.Tensor | None) for value in graph.graph.initializers.values())


@pytest.mark.parametrize(
    ("field", "factor"),
    [("gflops", 0.5), ("disk_gb_s", 0.5)],
)
def test_a_slower_machine_takes_longer(field: str, factor: float) -> None:
    slower = replace(MACHINE, **{field: getattr(MACHINE, field) * factor})
    assert price(SIZE, slower, Work()).seconds > price(SIZE, MACHINE, Work()).seconds


def test_more_work_costs_more() -> None:
    base = price(SIZE, MACHINE, Work())
    assert price(SIZE, MACHINE, Work(planned=True, verified=False)).seconds < base.seconds
    assert price(SIZE, MACHINE, Work(measured=6)).seconds > base.seconds
    assert price(SIZE, MACHINE, Work(trained=1)).seconds > base.seconds
    assert price(SIZE, MACHINE, Work(dtype="bfloat16")).output == base.output - SIZE.ffn * 2
    assert {stage.stage for stage in base.stages} == {"source", "calibrate", "trace", "rewrite and write", "verify", "finish"}


def test_quantised_weights_make_small_engines() -> None:
    sizes = [price(SIZE, MACHINE, Work(weights=name)).output for name in FORMS]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < price(SIZE, MACHINE, Work()).output / 3
    asked = work_of(ExportOptions(weights="auto").settled())
    assert price(SIZE, MACHINE, asked).output == sizes[0], "as the widest, that may be taken"
    # Codes wait in a file of their own: of each form that is tried.
    codes = price(SIZE, MACHINE, Work(weights="int4")).temporary - SIZE.float32_bytes
    assert SIZE.parameters < codes < 1.2 * SIZE.parameters
    assert price(SIZE, MACHINE, asked).temporary - SIZE.float32_bytes == len(FORMS) * codes


def test_weights_are_mapped_and_not_needed() -> None:
    deep = replace(SIZE, parameters=8 * SIZE.parameters, ffn=8 * SIZE.ffn, layers=8 * SIZE.layers)
    tight = replace(MACHINE, memory=8 * GB)
    more, base = price(deep, tight, Work()), price(SIZE, tight, Work())
    assert more.needed == base.needed  # it does not grow with depth
    assert more.temporary == deep.float32_bytes


def test_an_engine_is_packed_where_it_is_small_beside_the_memory() -> None:
    size, work = replace(SIZE, largest=1000, widest=1000), Work(context=8)
    tight = replace(MACHINE, memory=price(size, MACHINE, work).output)
    packed, mapped = (price(size, machine, work).needed for machine in (MACHINE, tight))
    assert packed - mapped == pytest.approx((SIZE.used - SIZE.ffn) * 4, rel=0.01)


def test_all_policies_that_train_nothing_take_part_in_a_choice() -> None:
    from clada_export.methods import POLICIES

    untrained = sum(not policy.trained for policy in POLICIES.values())
    assert work_of(ExportOptions(policy="auto")).measured == untrained > 1
    assert work_of(ExportOptions(policy="auto", train=True)).trained == len(POLICIES) - untrained
    assert work_of(ExportOptions()) == Work()
    workers = ExportOptions(calibration_workers=2)
    assert price(SIZE, MACHINE, work_of(workers)).temporary == 3 * SIZE.float32_bytes
    assert work_of(replace(workers, ray_address="a:1")).workers == 0
    assert not work_of(ExportOptions(policy="griffin")).shadow


def test_what_is_short_is_told() -> None:
    short = replace(MACHINE, memory=GB // 2, disk=GB)
    lines = "\n".join(told(price(SIZE, short, Work()), short))
    assert "0.50 GB of memory are available" in lines and "1.00 GB are free on this disk, and 8.26 GB are needed" in lines
    apart = replace(MACHINE, temporary=GB, same_disk=False)
    assert "1.00 GB are free for temporary files, 4.00 GB are needed" in "\n".join(told(price(SIZE, apart, Work()), apart))
    assert "short" not in "\n".join(told(price(SIZE, MACHINE, Work()), MACHINE))


def test_a_machine_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    machine = measure_machine(tmp_path / "not" / "there")
    assert machine.gflops > 0 and machine.disk_gb_s is not None and machine.disk_gb_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_has_no_speed() -> None:
    assert measure_machine(Path("/proc/sys")).disk_gb_s is None


def test_the_command_says_the_price(model_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(model_folder("llama"))
    assert main(["inspect", folder, "--policy", "auto", "--dtype", "float16"]) == 0
    assert "export    about" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["price"]["output"] > found["size"]["parameters"] * 4
    assert found["price"]["stages"][0]["stage"] == "source" and found["machine"]["threads"] >= 1


def test_a_model_without_ffns_has_no_price(model_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_folder("mixtral")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["price"] is None


def test_unknown_settings_of_a_price_are_refused(model_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_folder("llama")), "--dtype", "int3"]) == 2
    assert "int3" in capsys.readouterr().err


def test_a_configuration_that_asks_for_more_than_is_stored(model_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for file in model_folder("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 60_000}))
    with pytest.raises(UsageError, match=r"it asks for .* parameters, and the weights hold"):
        _outline(folder)


def test_loading_agrees(model_folder: Folder) -> None:
    from clada_export.price.room import size_of

    folder = model_folder("qwen2")
    found = _outline(folder)
    expected = ModelSize.of_model(found.model, found.decoder().ffns, found.stored)
    assert replace(size_of(load_source(str(folder))), stored=found.stored) == expected
