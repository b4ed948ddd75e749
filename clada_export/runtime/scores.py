"""How likely tokens are by a model's logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clada_export.errors import VerificationError
from clada_export.runtime.sampling import NO_FINITE_LOGIT


def log_probabilities(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """log softmax(logits [N, V]) at tokens [N], in nats; like sampling, it takes only logits that are finite for possible.

    Raises:
        VerificationError: a row has no finite logit.
    """
    values = np.where(np.isfinite(logits), logits, -np.inf).astype(np.float64)
    best = values.max(axis=1, keepdims=True)
    if np.isneginf(best).any():
        raise VerificationError(NO_FINITE_LOGIT)
    values -= best
    return values[np.arange(len(tokens)), tokens] - np.log(np.exp(values).sum(axis=1))  # type: ignore[no-any-return]
