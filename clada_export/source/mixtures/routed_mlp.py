"""`RoutedMLP`: a mixture of experts in the shape of one gated FFN, its experts side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clada_export.decoder.ffn import ScoredFFN
from clada_export.op.router import RouterModule
from graph_passes.op import ContractError
from graph_passes.router import Router


class RoutedMLP(ScoredFFN):
    """y = sum over experts e of score_e(x) * down_e(act(gate_e x) * up_e x), the scores of all but k experts being 0.

    The experts' neurons are concatenated in order, so that expert e is granule e of the op, and a model that holds this module
    is *the model*: its eager numbers are the checkpoint's. Eager it computes every expert; `plain_ffns` leaves the scores out.

    The router's weights are buffers: they belong to the model's digest, and are not rounded with the FFN's weights, as the
    engine keeps routers in float32.

    Args:
        gate: [E * size, d], like `up`; `down` is [d, E * size].
        act_fn: of the gate.
        router: gives E scores; its rows that run dense keep theirs (`dense_rows` = scores).
        layout: the name of the checkpoint's.

    Raises:
        ContractError: shapes that do not belong together.
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        act_fn: Callable[[Tensor], Tensor],
        router: Router,
        layout: str,
    ) -> None:
        super().__init__()
        neurons, width = gate.shape
        if up.shape != gate.shape or down.shape != (width, neurons):
            shapes = [list(tensor.shape) for tensor in (gate, up, down)]
            raise ContractError(f"RoutedMLP: gate, up and down have shapes {shapes}; wanted [f, d], [f, d] and [d, f]")
        if router.hidden_size != width or neurons % router.granules or router.dense_rows != "scores":
            raise ContractError(
                f"RoutedMLP: {neurons} neurons of {width} inputs, and a router of {router.granules} scores of "
                f"{router.hidden_size} inputs whose dense rows are {router.dense_rows!r}"
            )
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn
        self.layout = layout
        self._scores = RouterModule(router)
        for index, (weight, bias) in enumerate(zip(router.weights, router.biases, strict=True)):
            self.register_buffer(f"router_weight_{index}", torch.from_numpy(weight))
            if bias is not None:
                self.register_buffer(f"router_bias_{index}", torch.from_numpy(bias))

    @property
    def router(self) -> Router:
        """What scores the experts."""
        return self._scores.router

    @property
    def expert_size(self) -> int:
        """Neurons of an expert: the op's granule."""
        return self.gate_proj.out_features // self.router.granules

    def logits(self, x: Tensor) -> Tensor:
        """The router's logits, float32 [.., E]."""
        return self._scores.logits(x)

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] to [.., d]."""
        hidden: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if not self.plain:
            scores = self._scores(x).repeat_interleave(self.expert_size, dim=-1)
            hidden = hidden * scores.to(hidden.dtype)
        result: Tensor = self.down_proj(hidden)
        return result


def routed_mlps(model: nn.Module) -> dict[str, RoutedMLP]:
    """The imported mixtures of a model, by the path of their down projection (the FFN's name)."""
    return {f"{path}.down_proj": module for path, module in model.named_modules() if isinstance(module, RoutedMLP)}


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
