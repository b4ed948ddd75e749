"""A rotated model is the same function with other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import rotate as rotate_module
from benchmarks.rotate import orthogonal, rotate, write_rotated
from clada_export.errors import UnsupportedModelError, UsageError, VerificationError
from clada_export.source.load import load_source
from tests.benchmarks.tiny import write_tiny_llama
from tests.tiny_models import tiny_model

TOKENS = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
    ],
)
def test_the_function_stays_and_the_weights_do_not(kind: str, options: dict[str, bool]) -> None:
    model = tiny_model(kind, **options)
    tokens = TOKENS[:, ::3]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        old = model.model.layers[1].mlp.up_proj.weight.clone()
        check = rotate(model, TOKENS, seed=3)
        after = model(input_ids=tokens).logits
    assert check.ppl_error < 3e-6
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert (model.model.layers[1].mlp.up_proj.weight - old).abs().max() > 0.1
    assert (model.model.norm.weight == 1).all()
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_the_matrix_is_orthogonal_and_depends_on_the_seed_only() -> None:
    turn = orthogonal(48, 1)
    torch.testing.assert_close(turn @ turn.T, torch.eye(48, dtype=torch.float64))
    assert torch.equal(turn, orthogonal(48, 1))
    assert not torch.equal(turn, orthogonal(48, 2))


def test_a_wrong_rotation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_module, "orthogonal", lambda size, seed: 1.01 * orthogonal(size, seed))
    with pytest.raises(VerificationError, match="another function"):
        rotate(tiny_model("llama"), TOKENS)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Gemma3"):
        rotate(tiny_model("gemma3_text"), TOKENS)


def test_the_folder_loads_as_the_same_model(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    check = write_rotated(str(tmp_path / "model"), tmp_path / "rotated")
    assert check.ppl_error < 3e-6
    found, wanted = load_source(str(tmp_path / "rotated")), load_source(str(tmp_path / "model"))
    assert found.tokenizer("Hello")["input_ids"] == wanted.tokenizer("Hello")["input_ids"]
    with torch.no_grad():
        logits = [source.decoder.module(input_ids=TOKENS).logits for source in (found, wanted)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="exists"):
        write_rotated(str(tmp_path / "model"), tmp_path / "rotated")
