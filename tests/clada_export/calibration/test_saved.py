"""What a backward pass saves may lie in a file: the gradients are the same, and weights stay where they are."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from clada_export.calibration import sensitivity
from clada_export.calibration.saved import SavedInFile
from clada_export.calibration.sensitivity import layer_sensitivity
from clada_export.decoder.torch_decoder import TorchDecoder
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("limit", [0, 3000])
def test_gradients_are_the_same_to_the_bit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: written.append(len(data)) or real(file, data[: 1 << 10], place))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.Dropout(0.5)).requires_grad_(False)
    x = torch.randn(16, 8, requires_grad=True)

    def gradient(limit: int) -> torch.Tensor:
        torch.manual_seed(1)
        x.grad = None
        with SavedInFile(model, limit):
            (model(x) * x.t().contiguous().t()).square().sum().backward()
        assert x.grad is not None
        return x.grad.clone()

    wanted = gradient(10**9)
    assert not written
    assert torch.equal(gradient(limit), wanted)
    # A write may take less than it is given.
    assert written and max(written) > 1 << 10


def test_sensitivity_does_not_depend_on_where_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    wanted = layer_sensitivity(TorchDecoder(tiny_model("llama", 0)), windows)
    monkeypatch.setattr(sensitivity, "SAVED_LIMIT", 0)
    assert layer_sensitivity(TorchDecoder(tiny_model("llama", 0)), windows) == wanted
