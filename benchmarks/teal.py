"""TEAL (arXiv 2408.14690), simulated in eager PyTorch: input channels of each FFN matrix are skipped where they are small.

A channel of the FFN input x is kept for the gate where |x_i| > tau_gate, for the up projection where |x_i| > tau_up; a neuron
is kept for the down projection where |h_j| > tau_down. Thresholds are one a matrix, from the calibration text's activations
(the paper takes them from a histogram). Only the FFN's matrices: the paper does the same for attention. The bytes are those
that its own column-major layout reads: the mean of the kept shares. The op does not carry it: `docs/decisions/0007-teal.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.op.reference import activate

ROWS = 64
"""Tokens of each calibration window that thresholds come from."""
GREEDY_ROWS = 96
"""Tokens that the greedy allocation measures the error on."""
STEP = 0.05
"""Of the greedy allocation."""
HIGHEST = 0.95
LINE = 16
"""float32 weights in a cache line of 64 bytes."""


@dataclass(frozen=True)
class TealLayer:
    """One FFN: its weights (gate if any and up [n, f, d], biases), and sorted |x| and |h| of the calibration text."""

    ffn: EagerFFN
    w_in: Tensor
    biases: tuple[Tensor | None, ...]
    x: Tensor
    h: Tensor
    sample_x: Tensor
    sample_h: Tensor

    @property
    def matrices(self) -> int:
        """Gate, up and down, or up and down: all of one size."""
        return len(self.w_in) + 1

    def threshold(self, matrix: int, share: float) -> float:
        """The value that this share of the matrix's inputs does not exceed; the last matrix is the down projection."""
        values = self.h if matrix == self.matrices - 1 else self.x
        return float(values[round(share * (len(values) - 1))]) if share > 0.0 else -1.0

    def run(self, x: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(what remains of h [rows, f], the kept share of each matrix's inputs [n + 1]).

        Args:
            x: FFN inputs [rows, d].
            shares: to skip, of each matrix.
        """
        parts, kept = [], []
        for matrix, (weight, bias) in enumerate(zip(self.w_in, self.biases, strict=True)):
            mask = x.abs() > self.threshold(matrix, shares[matrix])
            kept.append(mask.float().mean())
            parts.append(torch.nn.functional.linear(x * mask, weight, bias))
        h = activate(self.ffn.activation, parts[0])
        if len(parts) == 2:
            h = h * parts[1]
        mask = h.abs() > self.threshold(self.matrices - 1, shares[-1])
        kept.append(mask.float().mean())
        return h * mask, torch.stack(kept)


class Teal:
    """TEAL on one model: calibrated once, for any sparsity.

    Args:
        windows: int64 [N, context], the calibration text.
        prompt: tokens of a window that are its prompt; thresholds come from the others.
    """

    def __init__(
        self,
        decoder: TorchDecoder,
        windows: Tensor,
        prompt: int,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        ffns = decoder.ffns
        samples: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in ffns]
        rows = torch.linspace(prompt, windows.shape[1] - 1, min(ROWS, windows.shape[1] - prompt)).long()

        def inner(index: int, x: Tensor, h: Tensor) -> None:
            samples[index][0].append(x.reshape(-1, x.shape[-1])[rows].float())
            samples[index][1].append(h.reshape(-1, h.shape[-1])[rows].float())

        with torch.inference_mode(), decoder.tap(inner=inner):
            for window in windows:
                # One logit is enough: the FFNs run before the LM head.
                decoder.model(input_ids=window[None], use_cache=False, logits_to_keep=1)
                step()
        self.layers = [_layer(ffn, torch.cat(xs), torch.cat(hs)) for ffn, (xs, hs) in zip(ffns, samples, strict=True)]
        self._paths: list[np.ndarray] | None = None

    def uniform(self, sparsity: float) -> list[tuple[float, ...]]:
        """The same share of every matrix of every layer."""
        return [(sparsity,) * layer.matrices for layer in self.layers]

    def greedy(self, sparsity: float) -> list[tuple[float, ...]]:
        """The paper's greedy allocation within a block: raise, by one step, the share of the matrix that costs the FFN's output
        the least (L2), until the mean is reached; every layer has the same mean. The matrices are of one size here."""
        if self._paths is None:
            with torch.inference_mode():
                self._paths = [_greedy_path(layer) for layer in self.layers]
        result = []
        for path in self._paths:
            means = path.mean(axis=1)
            result.append(tuple(float(np.interp(sparsity, means, column)) for column in path.T))
        return result

    def decoder(self, shares: Sequence[Sequence[float]], prompt: int) -> TealDecoder:
        """What `HeldOut.measure` runs."""
        return TealDecoder(self.layers, shares, prompt)


class TealDecoder:
    """A `Decode`, which also counts what a neuron-major store could skip.

    `lines_skipped` is the share of 64-byte lines of x's channels (16 float32 in a row) in which all channels are skipped, mean
    over tokens, layers and the matrices that read x.
    """

    def __init__(self, layers: Sequence[TealLayer], shares: Sequence[Sequence[float]], prompt: int) -> None:
        self._layers, self._shares, self._prompt = layers, shares, prompt
        self._lines: list[float] = []

    def __call__(self, window: int, index: int, x: Tensor, h: Tensor) -> tuple[Tensor, float]:
        """See `Decode`."""
        layer, shares = self._layers[index], self._shares[index]
        x = x[self._prompt :].float()
        remaining, kept = layer.run(x, shares)
        for matrix in range(layer.matrices - 1):
            self._lines.append(lines_skipped(x.abs() > layer.threshold(matrix, shares[matrix])))
        return remaining.to(h.dtype), float(kept.mean())

    @property
    def lines_skipped(self) -> float:
        """See the class."""
        return float(np.mean(self._lines)) if self._lines else 0.0


def lines_skipped(kept: Tensor, line: int = LINE) -> float:
    """The share of lines of `line` neighbouring channels of which none is kept; `kept` bool [rows, d], whole lines only."""
    lines = kept[:, : kept.shape[1] // line * line].reshape(len(kept), -1, line)
    return float((~lines.any(-1)).float().mean())


def line_chance(sparsity: float, line: int = LINE) -> float:
    """The chance that a line is wholly skipped when channels are skipped independently: sparsity ^ line (our own count)."""
    return float(sparsity**line)


def _layer(ffn: EagerFFN, x: Tensor, h: Tensor) -> TealLayer:
    gate_bias, up_bias, _ = ffn.biases()
    biases = (gate_bias, up_bias) if ffn.gated else (up_bias,)
    spread = torch.linspace(0, len(x) - 1, min(GREEDY_ROWS, len(x))).long()
    w_in = ffn.w_in().permute(1, 0, 2).contiguous()
    return TealLayer(ffn, w_in, biases, x.abs().flatten().sort().values, h.abs().flatten().sort().values, x[spread], h[spread])


def _greedy_path(layer: TealLayer) -> np.ndarray:
    """Shares [steps, matrices] in the order in which they are raised, from none."""
    w_out = layer.ffn.w_out()
    wanted = layer.sample_h @ w_out
    shares = np.zeros(layer.matrices)
    path = [shares.copy()]
    while (shares + STEP <= HIGHEST + 1e-9).any():
        best: tuple[float, int] | None = None
        for matrix in range(layer.matrices):
            if shares[matrix] + STEP > HIGHEST + 1e-9:
                continue
            tried = shares.copy()
            tried[matrix] += STEP
            error = float((layer.run(layer.sample_x, tried.tolist())[0] @ w_out - wanted).norm())
            if best is None or error < best[0]:
                best = (error, matrix)
        assert best is not None
        shares[best[1]] += STEP
        path.append(shares.copy())
    return np.array(path)
