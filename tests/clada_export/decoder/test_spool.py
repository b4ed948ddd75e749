"""Weights in a spool: ordinary tensors, whose memory can be given back, and of which nothing stays behind."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clada_export.decoder.spool as spool_module
from clada_export.decoder.digest import pieces, weights_digest
from clada_export.decoder.ffn.projections import Snapshot, projections
from clada_export.decoder.residency import Residency
from clada_export.decoder.rounding import round_all_weights, round_ffn_weights
from clada_export.decoder.spool import PAGE, Spool, by_merit, folders_for_spools, in_memory, is_large, room
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from tests.tiny_models import tiny_model

IDS = torch.arange(3, 19)[None]


def resident(tensor: Tensor) -> int:
    """Bytes of the mapping that a tensor lies in which this process has in memory."""
    found = inside = 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(borders[1], 16) <= tensor.data_ptr() < int(borders[2], 16)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


def on_spool(kind: str = "llama", large: bool = False, **sizes: int) -> TorchDecoder:
    model, spool = tiny_model(kind, **sizes).requires_grad_(False), Spool()
    spool.reserve(room((weight.numel(), weight.element_size()) for weight in model.parameters()))
    spool.large = large
    spool.adopt(model)
    return TorchDecoder(model, residency=Residency(model, spool))


def test_tensors_are_apart_and_leave_nothing_behind(tmp_path: Path) -> None:
    spool = Spool([tmp_path])
    first, second = spool.take((3, 5), torch.float32), spool.take((7,), torch.bfloat16)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all() and (second == 2).all()
    assert first.data_ptr() % PAGE == second.data_ptr() % PAGE == 0
    assert first.untyped_storage().nbytes() == 60 and second.untyped_storage().nbytes() == 14
    assert spool.holds(first) and spool.holds(second) and not spool.holds(torch.ones(3))
    assert list(tmp_path.iterdir()) == []
    del spool
    assert (first == 1).all()
    assert Spool([tmp_path]).take((0, 4), torch.float32).shape == (0, 4)


def test_what_is_given_back_is_taken_again(tmp_path: Path) -> None:
    spool = Spool([tmp_path])
    kept, back = spool.take((5,), torch.float32), spool.take((9000,), torch.float32)
    spool.give_back(back)
    assert spool.take((3,), torch.float32).data_ptr() == back.data_ptr()
    spool.give_back(kept)  # not the last one, so it stays
    assert spool.take((3,), torch.float32).data_ptr() not in (kept.data_ptr(), back.data_ptr())


def test_memory_goes_back_and_contents_stay(tmp_path: Path) -> None:
    spool = Spool([tmp_path])
    tensor = spool.take((100, 1024), torch.float32)
    tensor.copy_(torch.arange(102400).view(100, 1024))
    assert resident(tensor) >= 102400 * 4
    spool.pages([tensor]).rest()
    assert resident(tensor) == 0
    assert torch.equal(tensor, torch.arange(102400.0).view(100, 1024))
    # Nothing but what was named: here one of two neighbours.
    other = spool.take((1024,), torch.float32).fill_(3)
    spool.pages([tensor]).rest()
    assert resident(other) >= 4096 and (other == 3).all()


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "free_disk", lambda folder: 10_000)
    with pytest.raises(UsageError, match=rf"a file of 0\.02 GB .*{re.escape(str(tmp_path))} has 0\.00 GB.* set TMPDIR"):
        Spool([tmp_path]).reserve(20_000_000)
    # What the system says after all: more than any disk has.
    monkeypatch.setattr(spool_module, "free_disk", lambda folder: 1 << 62)
    with pytest.raises(UsageError, match="no room"):
        Spool([tmp_path]).reserve(1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_folders_on_a_disk_go_before_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "in_memory", lambda folder: folder.name == "memory")
    memory, disk, full = (tmp_path / name for name in ("memory", "disk", "full"))
    monkeypatch.setattr(spool_module, "free_disk", lambda folder: 0 if folder == full else 100)
    assert by_merit([memory, full, disk], 50) == [disk, memory]
    assert by_merit([memory, disk], 101) == []
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert folders_for_spools()[0] == tmp_path
    if Path("/dev/shm").is_dir():
        assert in_memory(Path("/dev/shm")) and not in_memory(Path("/proc"))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_a_model_on_a_spool_is_the_same_model(kind: str) -> None:
    wanted, decoder = tiny_model(kind), on_spool(kind)
    spool = decoder._residency.spool if decoder._residency else None
    assert spool is not None and all(spool.holds(weight) for weight in decoder.model.parameters())
    decoder.rest()
    assert weights_digest(decoder.model) == weights_digest(wanted)
    ties = [name for name, _ in decoder.model.named_parameters(remove_duplicate=False)]
    assert len(ties) - len(list(decoder.model.parameters())) == (kind != "llama")  # the embeddings are tied in two of them
    with torch.no_grad():
        assert torch.equal(decoder.run(IDS).logits, wanted(IDS).logits)


def test_what_changes_weights_in_place_still_does() -> None:
    decoder, plain = on_spool(), TorchDecoder(tiny_model("llama").requires_grad_(False))
    before = decoder.weights_digest()
    snapshot = Snapshot(decoder.ffns)
    assert round_ffn_weights(decoder.ffns, "bfloat16") == round_ffn_weights(plain.ffns, "bfloat16")
    decoder.rest()
    assert decoder.weights_digest() == plain.weights_digest() != before
    snapshot.restore()
    decoder.rest()
    assert decoder.weights_digest() == before
    assert round_all_weights(decoder.model, "float16") == round_all_weights(tiny_model("llama"), "float16")


def test_a_copy_in_another_type_lies_in_a_spool_of_its_own() -> None:
    decoder = on_spool("gemma3_text")
    made = decoder.in_dtype("bfloat16")
    assert made._residency is not None and decoder._residency is not None
    assert all(made._residency.spool.holds(weight) for weight in made.model.parameters())
    assert not any(decoder._residency.spool.holds(weight) for weight in made.model.parameters())
    plain = TorchDecoder(tiny_model("gemma3_text")).in_dtype("bfloat16")
    assert weights_digest(made.model) == weights_digest(plain.model)
    assert {weight.dtype for weight in made.model.parameters()} == {torch.bfloat16}


def test_layers_of_a_large_model_rest_after_each_call() -> None:
    large, small = (on_spool(large=large, intermediate_size=1 << 14) for large in (True, False))
    weight = large.model.model.layers[0].mlp.up_proj.weight
    # A page that is read brings some around it along, so it is never nothing.
    little = weight.numel()
    assert resident(weight) < little
    with torch.no_grad():
        assert torch.equal(large.run(IDS).logits, small.run(IDS).logits)
    assert resident(weight) < little < resident(small.model.lm_head.weight)
    # A small model pays nothing for it.
    assert not any(module._forward_hooks for module in small.model.modules())
    # Who goes over all weights leaves none in memory.
    round_ffn_weights(large.ffns, "float16", large.used)
    large.weights_digest()
    assert resident(weight) < little
    assert torch.equal(copy.deepcopy(large.model).lm_head.weight, large.model.lm_head.weight)


def test_a_copy_of_a_large_model_is_its_own_and_rests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "available_memory", lambda: 1000)
    copied = on_spool(large=True, intermediate_size=1 << 14).in_dtype("float16")
    weight = copied.model.model.layers[0].mlp.up_proj.weight
    assert resident(weight) < weight.numel()
    with torch.no_grad():
        copied.run(IDS)
    assert resident(weight) < weight.numel()


def test_large_is_measured_by_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clada_export.decoder.spool.available_memory", lambda: 1000)
    assert is_large(251) and not is_large(250)
    spool = Spool()
    spool.reserve(400)
    assert spool.large  # a page
    monkeypatch.setattr("clada_export.decoder.spool.available_memory", lambda: None)
    assert not is_large(1 << 60)


def test_a_digest_is_kept_while_no_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, hashed = on_spool(), []

    def counted(model: torch.nn.Module, used: Callable[[Tensor], None]) -> str:
        hashed.append(model)
        return weights_digest(model, used)

    monkeypatch.setattr("clada_export.decoder.decoder.weights_digest", counted)
    first = decoder.weights_digest()
    assert decoder.weights_digest() == first and len(hashed) == 1
    changes = [
        lambda weight: weight[0, 0].add_(1),
        lambda weight: weight.t().detach()[1].zero_(),
        lambda weight: projections(decoder.ffns[0])[0].write(weight + 1),
    ]
    for index, change in enumerate(changes):
        before = decoder.weights_digest()
        with torch.inference_mode(index == 0), torch.no_grad():
            change(decoder.ffns[0].inputs[0].weight)
        assert decoder.weights_digest() != before and len(hashed) == index + 2
    decoder.ffns[0].inputs[0].weight = torch.nn.Parameter(torch.zeros_like(decoder.ffns[0].inputs[0].weight))
    assert decoder.weights_digest() != before and len(hashed) == len(changes) + 2


def test_pieces_are_views_of_all_of_a_tensor() -> None:
    tensor = torch.zeros(10, 7)
    for piece in pieces(tensor, 20):
        assert piece.numel() <= 20
        piece.add_(1)
    assert (tensor == 1).all()
    assert [piece.shape for piece in pieces(torch.zeros(()), 1)] == [()]
    assert len(list(pieces(torch.zeros(3, 100), 20))) == 3
