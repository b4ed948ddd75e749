"""The two implementations of the load signal, over PyTorch and over NumPy, say the same."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from clada_export.load.surprisal import load_from, surprisal_entropy
from clada_export.plan.plan import LoadSignal
from clada_export.runtime import LoadMeter
from clada_export.runtime import surprisal_entropy as runtime_surprisal_entropy

SIGNAL = LoadSignal(3.0, 2.0, 4.0, 1.5, 0.4, -0.2)


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 20))
def test_twins_agree(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 50, generator=generator) * scale
    tokens = torch.randint(0, 50, (3,), generator=generator)
    surprisal, entropy = surprisal_entropy(logits, tokens)
    other_surprisal, other_entropy = runtime_surprisal_entropy(logits.numpy(), tokens.numpy())
    np.testing.assert_allclose(surprisal, other_surprisal, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy, other_entropy, rtol=1e-4, atol=1e-4)
    load = load_from(SIGNAL, surprisal, entropy)
    np.testing.assert_allclose(load, LoadMeter(SIGNAL).update(logits.numpy(), tokens.numpy()), rtol=1e-3, atol=1e-3)
    assert bool((load.abs() <= 4).all())


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    surprisal, entropy = surprisal_entropy(torch.zeros(1, 64), torch.tensor([5]))
    np.testing.assert_allclose([surprisal.item(), entropy.item()], [np.log(64)] * 2, rtol=1e-6)
