"""Models that count padding as text: found out, exported, and kept from batches of rows of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_decoders import tiny_decoder
from clada_export import export, load_engine
from clada_export.artifact.manifest import read_manifest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.verify.cases import make_cases
from tests.tiny_models import KINDS, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_positions_that_follow_the_mask(kind: str) -> None:
    assert TorchDecoder(tiny_model(kind)).padding == "left"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bart", id="positions from the first token, padding or not"),
        pytest.param("roformer", id="a mask that only lowers the scores of padding"),
        pytest.param("git", id="a mask that is wrong after a cache"),
    ],
)
def test_a_model_that_does_not_take_padding(kind: str) -> None:
    assert TorchDecoder(tiny_decoder(kind)).padding == "none"


def test_such_a_model_is_exported_for_rows_of_one_length(tmp_path: Path) -> None:
    model = tiny_decoder("bart")
    model.save_pretrained(tmp_path / "bart")  # type: ignore[operator]
    result = export(tmp_path / "bart", tmp_path / "out", sparsity=0.3, calibration_context=32, calibration_cache=None)
    assert result.verification is not None and result.verification.passed
    assert any(check.name.endswith("batch 2)") for check in result.verification.checks)
    assert read_manifest(tmp_path / "out").padding == "none"
    assert any("one length" in warning for warning in result.manifest.warnings)
    engine = load_engine(tmp_path / "out")
    for call in (engine.prefill, engine.logits, lambda rows: engine.generate(rows, 2)):
        with pytest.raises(UsageError, match="prompts of 2 to 3 tokens in one batch"):
            call([[5, 6, 7], [8, 9]])
    found = engine.logits([[5, 6, 7], [8, 9, 10]], load="dense")
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]])).logits.numpy()
    np.testing.assert_allclose(np.stack(found), wanted, atol=1e-4)


@pytest.mark.parametrize("ragged", [True, False])
def test_cases_of_verification(ragged: bool) -> None:
    noise: Callable[[], np.ndarray] = lambda: np.random.default_rng(0).integers(0, 99, (3, 80))  # noqa: E731
    pairs = [case for case in make_cases(noise(), 99, None, ragged=ragged) if len(case.rows) == 2]
    assert len(pairs) == 2
    assert all((len({len(row) for row in case.rows}) == 2) == ragged for case in pairs)
    assert all(case.name.endswith("ragged") == ragged for case in pairs)
