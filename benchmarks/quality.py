"""Quality of an engine on held-out text, as it is deployed: the prompt dense, every later token at the load that it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from clada_export.errors import UsageError
from clada_export.runtime import Engine, LoadMeter
from clada_export.runtime.engine import Load

PROMPT = 32
"""Tokens of each window that are the prompt. They and the token after them, which follows from them alone, are not scored."""

Logits = npt.NDArray[np.float32]


@dataclass
class Quality:
    """Teacher-forced, over all scored tokens, against the dense peer on the same tokens.

    Attributes:
        nll, dense_nll: of every token, nats.
        kl: KL(peer || engine), nats; same_top: whether both have the same best token.
        active: share of neurons that ran, [steps, layers]; empty for a dense run.
    """

    nll: list[float] = field(default_factory=list)
    dense_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    active: list[npt.NDArray[np.float64]] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def add(self, found: Logits, wanted: Logits, tokens: npt.NDArray[np.int64]) -> None:
        """Logits [n, V] of engine and peer, and the tokens [n] that follow."""
        ours, theirs = _log_softmax(found), _log_softmax(wanted)
        rows = np.arange(len(tokens))
        self.nll += (-ours[rows, tokens]).tolist()
        self.dense_nll += (-theirs[rows, tokens]).tolist()
        self.kl += np.maximum((np.exp(theirs) * (theirs - ours)).sum(-1), 0.0).tolist()
        self.same_top += (ours.argmax(-1) == theirs.argmax(-1)).tolist()

    def extend(self, other: Quality) -> None:
        """Add the tokens of another text."""
        for name in ("nll", "dense_nll", "kl", "same_top", "active", "loads"):
            getattr(self, name).extend(getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """Means; `ppl_increase_error` is one standard error of the mean paired difference of log likelihoods."""
        difference = np.array(self.nll) - np.array(self.dense_nll)
        layers = 1.0 - np.mean(self.active, axis=0) if self.active else None
        return {
            "tokens": len(difference),
            "dense_ppl": math.exp(float(np.mean(self.dense_nll))),
            "ppl": math.exp(float(np.mean(self.nll))),
            "ppl_increase": math.expm1(float(difference.mean())),
            "ppl_increase_error": float(difference.std(ddof=1)) / math.sqrt(len(difference)),
            "kl": float(np.mean(self.kl)),
            "top1": float(np.mean(self.same_top)),
            "sparsity": float(layers.mean()) if layers is not None else 0.0,
            "layer_sparsity": layers.tolist() if layers is not None else [],
            "mean_load": float(np.mean(self.loads)) if self.loads else None,
        }


@dataclass(frozen=True)
class Windows:
    """Token windows of one held-out text."""

    name: str
    digest: str
    rows: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """What a result says about the text; the tokens stay out."""
        return {key: value for key, value in asdict(self).items() if key != "rows"} | {
            "windows": len(self.rows),
            "window_tokens": len(self.rows[0]),
        }


def cut(name: str, digest: str, ids: Sequence[int], count: int, length: int) -> Windows:
    """`count` windows spread evenly over a text.

    Raises:
        UsageError: the text is too short, or the windows are.
    """
    if length < PROMPT + 2:
        raise UsageError(f"windows of {length} tokens are too short: {PROMPT} are the prompt")
    if len(ids) < count * length:
        raise UsageError(f"{name}: {len(ids)} tokens; {count} windows of {length} are wanted")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return Windows(name, digest, [list(ids[start : start + length]) for start in starts])


def measure(
    engine: Engine,
    peer: Engine,
    windows: Windows,
    load: Load,
    batch: int = 4,
    progress: Callable[[int, int], None] = lambda done, wanted: None,
) -> Quality:
    """Score the windows.

    Args:
        load: `dense` takes one pass a window; anything else decodes token by token, `batch` windows side by side.
        progress: called with windows done and wanted.
    """
    result = Quality()
    for start in range(0, len(windows.rows), batch):
        rows = windows.rows[start : start + batch]
        wanted = [peer.logits([row])[0] for row in rows]
        if load == "dense":
            for row, logits in zip(rows, wanted, strict=True):
                found = engine.logits([row])[0]
                result.add(found[PROMPT:-1], logits[PROMPT:-1], np.array(row[PROMPT + 1 :]))
        else:
            _decode(engine, rows, wanted, load, result)
        progress(start + len(rows), len(windows.rows))
    return result


def _decode(engine: Engine, rows: list[list[int]], wanted: list[Logits], load: Load, result: Quality) -> None:
    """As `Engine.generate`, with the text's own tokens."""
    meter = LoadMeter(engine.manifest.load_signal)
    widths = np.array([layer["intermediate_size"] for layer in engine.manifest.plan["layers"]])
    tokens = np.array(rows)
    output = engine.prefill([row[:PROMPT] for row in rows])
    for place in range(PROMPT, tokens.shape[1]):
        column = tokens[:, place]
        # The first of them follows from the prompt alone, which is dense.
        if place > PROMPT:
            result.add(output.logits, np.stack([logits[place - 1] for logits in wanted]), column)
        if place + 1 == tokens.shape[1]:
            break
        if load == "auto":
            loads = meter.update(output.logits, column, log_sum_exp=output.log_sum_exp, entropy=output.entropy)
        else:
            loads = np.full(len(rows), load, np.float32)
        result.loads += loads.tolist()
        output = engine.step(column, loads)
        if output.active is not None:
            result.active += list(output.active / widths)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    shifted: npt.NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return shifted
