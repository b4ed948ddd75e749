"""The rows that routers are trained on: FFN inputs of sampled tokens, and the hidden activations that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.errors import UsageError
from clada_export.op.reference import SparseFFNTensors, neuron_outputs
from graph_passes.op import SparseFFNAttributes


@dataclass(frozen=True)
class LayerSamples:
    """One FFN's samples, float32: `x` [N, d] goes in, `h` [N, f] is the input of the down projection, `w_in` [f, n, d]."""

    ffn: EagerFFN
    x: Tensor
    h: Tensor
    w_in: Tensor


@dataclass(frozen=True)
class FFNSamples:
    """The inputs of every FFN, float32 [N, d] each, for the same N tokens.

    Only inputs are kept (4 N d bytes a layer): `layer` computes a layer's hidden activations from the weights when asked.
    """

    ffns: tuple[EagerFFN, ...]
    inputs: tuple[Tensor, ...]

    def layer(self, index: int) -> LayerSamples:
        """The samples of FFN `index`.

        Raises:
            UsageError: a hidden activation is NaN or infinite; names the layer.
        """
        ffn, x = self.ffns[index], self.inputs[index]
        w_in = ffn.w_in()
        gate_bias, up_bias, _ = ffn.biases()
        tensors = SparseFFNTensors(
            w_in=w_in, w_out=torch.empty(0), threshold=torch.zeros(1), gate_bias=gate_bias, up_bias=up_bias
        )
        attributes = SparseFFNAttributes(activation=ffn.activation, gated=ffn.gated, has_bias=ffn.has_bias)
        with torch.no_grad():
            h, _ = neuron_outputs(x, w_in, tensors, attributes)
        _require_finite(ffn, h, "activations")
        return LayerSamples(ffn, x, h, w_in)

    def __iter__(self) -> Iterator[LayerSamples]:
        return (self.layer(index) for index in range(len(self.ffns)))


def collect_samples(
    decoder: Decoder,
    windows: Tensor,
    rows: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FFNSamples:
    """Run the dense model over the windows once and keep the FFN inputs of randomly chosen tokens.

    A window's first token is never chosen: decode never computes position 0, and its activations are often far larger than all
    others, so that it alone would decide what a regression learns.

    Args:
        windows: int64 [W, context].
        rows: how many tokens; all of them if the windows have fewer.
        seed: of the choice.
        progress: called with (windows done, windows in all).

    Raises:
        UsageError: no token to choose, or an FFN input is NaN or infinite; names the layer.
    """
    count, context = windows.shape
    available = count * (context - 1)
    if rows < 1 or available < 1:
        raise UsageError(
            f"router training: {rows} rows wanted from {count} windows of {context} tokens; at least one row and one window "
            "of two tokens are needed"
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    ffns = decoder.ffns
    inputs = [torch.empty(len(chosen), ffn.hidden_size) for ffn in ffns]
    filled = 0
    positions = torch.empty(0, dtype=torch.int64)

    def inner(index: int, x: Tensor, h: Tensor) -> None:
        taken = x.reshape(-1, x.shape[-1])[positions].float()
        _require_finite(ffns[index], taken, "inputs")
        inputs[index][filled : filled + len(positions)] = taken

    # Not inference mode: its tensors could not take part in training.
    with torch.no_grad(), decoder.tap(inner=inner):
        for done, window in enumerate(windows):
            positions = chosen[chosen // (context - 1) == done] % (context - 1) + 1
            if len(positions):
                decoder.logits(window)
                filled += len(positions)
            progress(done + 1, count)
    return FFNSamples(ffns, tuple(inputs))


def _require_finite(ffn: EagerFFN, value: Tensor, what: str) -> None:
    if not bool(torch.isfinite(value).all()):
        raise UsageError(f"{ffn.name}: its {what} are not finite on the calibration text; the model is broken in float32")
