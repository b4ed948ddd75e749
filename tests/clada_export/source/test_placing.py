"""Weights that are read one after the other into a spool: the same to the bit as transformers loads them all at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

import clada_export.source.causal_lm as causal_lm
import clada_export.source.gguf_blocks as gguf_blocks
from clada_export.decoder import spool as spool_module
from clada_export.decoder.spool import Spool
from clada_export.errors import UsageError
from clada_export.patches.transformers_loading import weights_placed
from clada_export.source.load import load_source
from clada_export.source.model import SourceModel
from clada_export.source.placing import placed_in
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import KINDS, MOE_KINDS, tiny_model


def require_same(source: SourceModel, wanted: PreTrainedModel) -> None:
    """Names, ties, types and bits of parameters and of all buffers; and that the weights lie in the spool."""
    model: Any = source.decoder.module
    for found, expected in (
        (model.state_dict(), wanted.state_dict()),
        (dict(model.named_buffers()), dict(wanted.named_buffers())),
    ):
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and found[name].device == tensor.device, name
            assert (
                torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
                if tensor.dim()
                else (found[name] == tensor)
            ), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in wanted.named_parameters()]
    residency = source.decoder._residency  # type: ignore[attr-defined]
    assert residency is not None and all(residency.spool.holds(weight) for weight in model.parameters())
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("kind", [*KINDS, *MOE_KINDS])
def test_a_folder_of_every_kind(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    require_same(load_source(str(tmp_path)), wanted)


def test_tied_weights_of_which_both_are_stored(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"})
    source = load_source(str(tmp_path))
    require_same(source, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def save_blocks(path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The tiny Llama with a wide FFN and a vocabulary in blocks of a type."""
    plain = save_tiny_gguf(path.with_suffix(".plain"), layers=2)
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = 256 if field.name == "llama.feed_forward_length" else field.contents()
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    rng = np.random.default_rng(1)
    for tensor in reader.tensors:
        shape = [256 if length == 24 else length for length in reversed(tensor.shape.tolist())]
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        if "ffn_down" in tensor.name or ("attn" in tensor.name and len(shape) == 2 and kind.name in ("F16", "BF16")):
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_a_gguf_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_blocks(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[name])
    wanted = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    monkeypatch.setattr(gguf_blocks, "_JOB", 512)  # so that a matrix comes in pieces
    require_same(load_source(str(path)), wanted)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    "kind",
    [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits or kind.name in ("F16", "F32")],
    ids=lambda kind: kind.name,
)
def test_blocks_of_every_type_come_in_pieces(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes: whatever gguf makes of them in one piece."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 101, max(block, 8)
    data = np.random.default_rng(0).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", data, raw_shape=data.shape, raw_dtype=kind) if block > 1 else writer.add_tensor(
        "x", data.view({4: np.float32, 2: np.float16}[size]) if kind.name != "BF16" else data, raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    monkeypatch.setattr(gguf_blocks, "_JOB", 70 * columns)  # a job of 64 rows in pieces of 32, and one of 37 rows
    monkeypatch.setattr(gguf_blocks, "_PIECE", 40 * columns)
    with gguf_blocks.block_reader(tmp_path / "a.gguf", Spool([tmp_path])) as blocks:
        found, wanted = blocks.unpack(tensor), gguf.dequantize(tensor.data, kind)
    assert found.shape == wanted.shape == (rows, columns)
    assert np.array_equal(found.numpy().view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32))


def test_each_weight_is_placed_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    tiny_model("llama").save_pretrained(tmp_path)
    events: list[str] = []
    materialize = core_model_loading._materialize_copy

    def counted(*args: Any, **options: Any) -> Any:
        events.append("read")
        return materialize(*args, **options)

    def place(model: Any, value: torch.Tensor) -> torch.Tensor:
        events.append("placed")
        return value

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counted)
    with weights_placed(place):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(events) > 20 and events == ["read", "placed"] * (len(events) // 2)


def _cutting(file: Path) -> Callable[..., None]:
    def cut(*args: Any) -> None:
        os.truncate(file, file.stat().st_size - 1000)

    return cut


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_file_that_is_cut_while_it_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "gguf":
        path = file = save_tiny_gguf(tmp_path / "tiny.gguf")
    else:
        tiny_model("llama").save_pretrained(tmp_path)
        path, file = tmp_path, tmp_path / "model.safetensors"
    monkeypatch.setattr(causal_lm, "reserve", _cutting(file))  # after all checks of its length
    with pytest.raises(UsageError, match=r"tiny\.gguf: the file became shorter while|can't build the model"):
        load_source(str(path))


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(spool_module, "folders_for_spools", lambda: (tmp_path,))
    monkeypatch.setattr(spool_module, "free_disk", lambda folder: 1 << 16)
    with pytest.raises(UsageError, match="no room"):
        load_source(str(tmp_path / "model"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_room_is_reserved_as_a_whole(tmp_path: Path) -> None:
    tiny_model("gemma3_text").save_pretrained(tmp_path)
    spool = Spool()
    with placed_in(spool, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(spool._parts) == 1
    assert spool.size == spool._parts[0].used >= sum(weight.numel() * 4 for weight in model.parameters())
