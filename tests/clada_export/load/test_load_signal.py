"""The formulas of the load signal say the same of PyTorch tensors and of NumPy arrays, and in each the numbers that they have
always said."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from clada_export.calibration.load_response import LOAD_SLOPE, multiplier_of
from clada_export.load.signal import LoadSignal
from clada_export.load.surprisal import surprisal_entropy
from clada_export.load.tracker import LoadTracker
from clada_export.runtime import LoadMeter

SIGNAL = LoadSignal(3.0, 2.0, 4.0, 1.5, 0.4, -0.2)


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 20))
def test_twins_agree(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 50, generator=generator) * scale
    tokens = torch.randint(0, 50, (3,), generator=generator)
    surprisal, entropy = surprisal_entropy(logits, tokens)
    other_surprisal, other_entropy = surprisal_entropy(logits.numpy(), tokens.numpy())
    np.testing.assert_allclose(surprisal, other_surprisal, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy, other_entropy, rtol=1e-4, atol=1e-4)
    load = SIGNAL.exponential_load(surprisal, entropy)
    np.testing.assert_allclose(load, LoadMeter(SIGNAL).update(logits.numpy(), tokens.numpy()), rtol=1e-3, atol=1e-3)
    assert bool((load.abs() <= 4).all())


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    surprisal, entropy = surprisal_entropy(torch.zeros(1, 64), torch.tensor([5]))
    np.testing.assert_allclose([surprisal.item(), entropy.item()], [np.log(64)] * 2, rtol=1e-6)


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 20))
def test_tensors_have_the_bits_of_operators_of_torch(seed: int, scale: float) -> None:
    """Plans are calibrated on these: another order of sums would be another plan."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 300, generator=generator) * scale
    tokens = torch.randint(0, 300, (7,), generator=generator)
    surprisal, entropy = surprisal_entropy(logits, tokens)
    total = logits.logsumexp(-1)
    assert torch.equal(surprisal, total - logits.gather(-1, tokens[:, None])[:, 0])
    assert torch.equal(entropy, (total - (logits.softmax(-1) * logits).sum(-1)).clamp(min=0))
    drive = 0.4 * ((surprisal - 3.0) / 2.0) + -0.2 * ((entropy - 4.0) / 1.5)
    assert torch.equal(SIGNAL.exponential_load(surprisal, entropy), drive.clamp(-4, 4))
    multiplier = multiplier_of(SIGNAL, torch.stack((surprisal, entropy))[None], 8)
    assert torch.equal(multiplier[0, 1:], torch.exp(-LOAD_SLOPE * drive.clamp(-4, 4)).clamp(np.exp(-1.0), np.exp(1.0)))
    assert float(multiplier[0, 0]) == 1.0


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 20))
def test_arrays_have_the_bits_of_float64(seed: int, scale: float) -> None:
    """An engine decodes by these."""
    rng = np.random.default_rng(seed)
    logits, tokens = (rng.normal(size=(5, 300)) * scale).astype(np.float32), rng.integers(0, 300, 5)
    surprisal, entropy = surprisal_entropy(logits, tokens)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    np.testing.assert_array_equal(surprisal, np.log(total) - shifted[np.arange(5), tokens])
    mean = np.einsum("bv,bv->b", weights, shifted) / total
    np.testing.assert_array_equal(entropy, np.maximum(np.log(total) - mean, 0))
    load = LoadTracker(SIGNAL).step(surprisal, entropy)
    wanted = np.stack(((surprisal - 3.0) / 2.0, (entropy - 4.0) / 1.5), axis=-1) @ np.array([0.4, -0.2])
    np.testing.assert_array_equal(load, np.clip(wanted, -4, 4).astype(np.float32))
