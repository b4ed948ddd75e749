"""A router: the small network that scores an FFN's granules before the op runs (score `external`).

`Router` is plain data, also for programs without ONNX tools. `graph_passes.router_nodes` writes it as standard ONNX nodes;
`clada_export.op.router` evaluates it in PyTorch, and the two give the same numbers. Predictors (arXiv 2310.17157) and experts'
routers (arXiv 2110.01786, 2402.06126, 2310.04361) are all of this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graph_passes.op import ContractError

HIDDEN_ACTIVATIONS = ("identity", "relu", "tanh")
OUTPUTS = ("sigmoid", "softmax", "abs", "relu", "topk_softmax")
DENSE_ROWS = ("ones", "scores")


@dataclass(frozen=True)
class Router:
    """score = scale * output(W_k(.. hidden(W_1 x + b_1) ..) + b_k), one number a granule, never negative.

    Attributes:
        weights: float32 [out, in] of every linear layer; the first takes d values, the last gives E.
        biases: float32 [out] of every linear layer, or None.
        hidden: between the linear layers: identity, relu or tanh.
        output: of the last: sigmoid, softmax (over the granules), abs, relu, or topk_softmax: a softmax over the k largest,
            and 0 for the others; ties go to the lowest index. This is how mixtures of experts are gated (LLaMA-MoE's released
            code; GraniteMoe in transformers).
        normalise: divide x by its L2 norm first (arXiv 2110.01786).
        scale: multiplies the result.
        k: of topk_softmax, 1 to E; None with any other output.
        dense_rows: what a row that runs dense scores. `ones`: 1 everywhere, so that `combine = weighted` leaves the sum of a
            model without experts alone. `scores`: as any row, where the weighted sum is the model.

    Raises:
        ContractError: an unknown function, layers that do not fit together, or a k out of range; says which.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray | None, ...]
    hidden: str = "identity"
    output: str = "sigmoid"
    normalise: bool = False
    scale: float = 1.0
    k: int | None = None
    dense_rows: str = "ones"

    def __post_init__(self) -> None:
        if self.hidden not in HIDDEN_ACTIVATIONS or self.output not in OUTPUTS:
            raise ContractError(
                f"router: hidden is {self.hidden!r} and output is {self.output!r}; allowed: {', '.join(HIDDEN_ACTIVATIONS)} "
                f"and {', '.join(OUTPUTS)}"
            )
        if self.dense_rows not in DENSE_ROWS:
            raise ContractError(f"router: dense_rows is {self.dense_rows!r}; allowed: {', '.join(DENSE_ROWS)}")
        if not 0.0 < self.scale < float("inf"):
            raise ContractError(f"router: scale is {self.scale}; it must be a finite number above 0")
        if not self.weights or len(self.weights) != len(self.biases):
            raise ContractError(
                f"router: {len(self.weights)} weights and {len(self.biases)} biases; one of each a layer is wanted"
            )
        if self.weights[0].ndim != 2:
            raise ContractError(f"router: weight 0 has shape {list(self.weights[0].shape)}; wanted [.., hidden_size]")
        width = self.hidden_size
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if weight.ndim != 2 or weight.shape[1] != width:
                raise ContractError(f"router: weight {index} has shape {list(weight.shape)}; wanted [.., {width}]")
            width = weight.shape[0]
            if bias is not None and bias.shape != (width,):
                raise ContractError(f"router: bias {index} has shape {list(bias.shape)}; wanted [{width}]")
            if not (np.isfinite(weight).all() and (bias is None or np.isfinite(bias).all())):
                raise ContractError(f"router: layer {index} has a value that is not finite")
        if self.output != "topk_softmax":
            if self.k is not None:
                raise ContractError(f"router: k is {self.k}, and output {self.output!r} has none")
        elif self.k is None or not 1 <= self.k <= self.granules:
            raise ContractError(f"router: k is {self.k}; output 'topk_softmax' wants 1 to {self.granules}, the granules")

    @property
    def hidden_size(self) -> int:
        """d, the width of x."""
        return int(self.weights[0].shape[1])

    @property
    def granules(self) -> int:
        """E, how many scores it gives."""
        return int(self.weights[-1].shape[0])

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(weight.size for weight in self.weights) + sum(bias.size for bias in self.biases if bias is not None)
