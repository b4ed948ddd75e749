"""Rounding the model that an engine in 16 bits stands for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from clada_export.decoder.rounding import TORCH_TYPES, in_dtype, round_all_weights


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_parameters_and_scalar_buffers_are_rounded(dtype: str) -> None:
    """The scale of Gemma's embeddings is used in the type; rotary frequencies never are."""
    model = tiny_model("gemma3_text", hidden_size=160)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    round_all_weights(model, dtype)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weight.to(TORCH_TYPES[dtype]).float()), name
    buffers = dict(model.named_buffers())
    (scale,) = [name for name in buffers if name.endswith("embed_scale")]
    assert buffers[scale] == torch.tensor(160.0).sqrt().to(TORCH_TYPES[dtype]).float()
    assert buffers[scale] != before[scale]
    frequencies = [name for name in buffers if name.endswith("inv_freq")]
    assert frequencies
    for name in frequencies:
        assert torch.equal(buffers[name], before[name])


def test_the_rounded_model_stands_for_the_one_in_16_bits() -> None:
    """What is left between them is the arithmetic: the first layer's input is the same in both."""
    model = tiny_model("gemma3_text", hidden_size=160)
    round_all_weights(model, "bfloat16")
    ids = torch.arange(8)[None]
    wide, narrow = model.model.embed_tokens(ids), in_dtype(model, "bfloat16").model.embed_tokens(ids)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(wide.to(torch.bfloat16), narrow)
