"""FFNs are found by what they compute: whatever the modules are called, and nothing that only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clada_export.decoder.ffn import EagerFFN, EagerFFNs, find_eager_ffns
from clada_export.decoder.ffn.layer import PACKINGS
from clada_export.decoder.ffn.probe import TOKENS
from clada_export.decoder.ffn.projections import hidden, projections
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UnsupportedModelError
from clada_export.op.reference import activate, sparse_ffn
from clada_export.op.scorer import layer_attributes, layer_tensors
from graph_passes.op import ACTIVATIONS
from tests.tiny_models import tiny_model
from tests.token_models import Attention, Block, TokenModel

WIDTH, NEURONS = 16, 40


def wide(count: int = 1, bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, NEURONS * count, bias=bias)


def narrow(bias: bool = True) -> nn.Linear:
    return nn.Linear(NEURONS, WIDTH, bias=bias)


def search(*blocks: nn.Module) -> EagerFFNs:
    return find_eager_ffns(TokenModel(*blocks, width=WIDTH).eval())


def computes(ffn: EagerFFN, block: nn.Module) -> None:
    """The op with the FFN's weights gives the block's numbers."""
    x = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(5)) * 4
    with torch.no_grad():
        found = sparse_ffn(
            x,
            torch.full((1, 9), float("inf")),
            layer_tensors(ffn, "gate", torch.zeros(1)),
            layer_attributes(ffn, "gate", "threshold"),
        )
        torch.testing.assert_close(found.y, block(x), rtol=1e-5, atol=1e-5)
        # Pruning reads and writes the same weights by other means.
        parts = projections(ffn)
        torch.testing.assert_close(
            hidden(ffn, x) @ parts[-1].weight.t() + (0 if parts[-1].bias is None else parts[-1].bias), found.y
        )


def test_gpt_j_and_neox_names() -> None:
    block = Block(lambda self, x: self.fc_out(functional.gelu(self.fc_in(x))), fc_in=wide(), fc_out=narrow())
    other = Block(
        lambda self, x: self.dense_4h_to_h(torch.relu(self.dense_h_to_4h(x)) ** 2), dense_h_to_4h=wide(), dense_4h_to_h=narrow()
    )
    found = search(block, other)
    assert not found.skipped
    assert [(ffn.name, ffn.activation, ffn.gated) for ffn in found.found] == [
        ("blocks.0.fc_out", "gelu", False),
        ("blocks.1.dense_4h_to_h", "relu2", False),
    ]
    computes(found.found[0], block)
    computes(found.found[1], other)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_gate_and_up_of_any_name_and_order(
    activation: str, up_first: bool, gate_last: bool, bias: bool, down_bias: bool
) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        if up_first:
            other = self.b(x)
            gate = self.a(x)
        else:
            gate, other = self.a(x), self.b(x)
        acted = activate(activation, gate)
        result: Tensor = self.c(other * acted if gate_last else acted * other)
        return result

    block = Block(run, a=wide(bias=bias), b=wide(bias=bias), c=narrow(bias=down_bias))
    (ffn,) = search(block).found
    assert (ffn.name, ffn.activation, ffn.gated, ffn.packing) == ("blocks.0.c", activation, True, None)
    # A product of two linear parts has no gate of its own: either may be called so.
    if activation != "identity":
        assert ffn.inputs == (block.a, block.b)
    computes(ffn, block)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_packing(packing: str, activation: str, bias: bool) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        both = self.both(x)
        if packing.endswith("halves"):
            first, second = both.chunk(2, dim=-1)
        else:
            first, second = both[..., ::2], both[..., 1::2]
        gate, up = (second, first) if packing.startswith("swapped") else (first, second)
        result: Tensor = self.out(activate(activation, gate) * up)
        return result

    block = Block(run, both=wide(2, bias), out=narrow())
    (ffn,) = search(block).found
    assert (ffn.activation, ffn.gated, ffn.packing) == (activation, True, packing)
    computes(ffn, block)


def test_projections_of_other_modules_make_an_ffn() -> None:
    """BERT and T5 keep up and down in modules of their own; the activation may be a third."""
    block = Block(
        lambda self, x: self.output(self.intermediate(x)),
        intermediate=Block(lambda self, x: functional.silu(self.dense(x)), dense=wide()),
        output=Block(lambda self, x: self.dense(x), dense=narrow()),
    )
    found = search(block, block_with_a_twin())
    assert [ffn.name for ffn in found.found] == ["blocks.0.output.dense", "blocks.1.c"]
    computes(found.found[0], block)


def block_with_a_twin() -> nn.Module:
    """Two gates of the same shape on the same x, one of which is not used by the down projection."""
    return Block(
        lambda self, x: self.c(functional.silu(self.a(x)) * self.b(x)) + 0.0 * self.unused(x).mean(),
        unused=wide(),
        a=wide(),
        b=wide(),
        c=narrow(),
    )


def test_a_layer_among_parallel_ones() -> None:
    """GPT-J runs attention and FFN from one norm: both read the same x."""
    attention = Attention(WIDTH)
    block = Block(
        lambda self, x: self.attention(x) + self.down(functional.gelu(self.up(x), approximate="tanh")),
        attention=attention,
        up=wide(),
        down=narrow(),
    )
    (ffn,) = search(block).found
    assert (ffn.name, ffn.activation) == ("blocks.0.down", "gelu_tanh")


def test_a_dead_layer_is_found_for_what_it_is() -> None:
    """Its hidden values are all 0 on the tokens that are tried, as those of many other functions."""
    block = block_with_a_twin()
    with torch.no_grad():
        for name in ("a", "b"):
            getattr(block, name).weight.zero_()
            getattr(block, name).bias.zero_()
    (ffn,) = search(block).found
    assert ffn.inputs == (block.a, block.b) and ffn.activation == "silu"


# --- what is none ---


@pytest.mark.parametrize(
    "between",
    [
        lambda h: functional.rms_norm(h, (NEURONS,)),
        lambda h: h.clamp(max=7.0),
        lambda h: h * 1.01,
        lambda h: h + h.roll(1, dims=-1),
        lambda h: h.cumsum(dim=1),
        lambda h: torch.where(h > h.mean(dim=-1, keepdim=True), h, 0.0),
    ],
    ids=["norm", "clamp", "scale", "mix of neurons", "mix of tokens", "top values only"],
)
@pytest.mark.parametrize("gated", [False, True])
def test_hidden_values_that_the_op_does_not_compute(between: Callable[[Tensor], Tensor], gated: bool) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        h = functional.silu(self.a(x)) * self.b(x) if gated else functional.silu(self.a(x))
        result: Tensor = self.c(between(h))
        return result

    modules = {"a": wide(), "b": wide(), "c": narrow()} if gated else {"a": wide(), "c": narrow()}
    found = search(Block(run, **modules))
    assert not found.found
    assert [item.name for item in found.skipped] == ["blocks.0.c"]
    assert "neither act(up) nor act(gate) * up" in found.skipped[0].reason


@pytest.mark.parametrize(
    "function", [torch.tanh, functional.leaky_relu, lambda x: x * torch.sigmoid(1.702 * x), functional.mish]
)
def test_activations_that_the_op_does_not_have(function: Callable[[Tensor], Tensor]) -> None:
    found = search(Block(lambda self, x: self.c(function(self.a(x))), a=wide(), c=narrow()))
    assert not found.found and "silu, gelu, gelu_tanh, relu, relu2, identity" in found.skipped[0].reason


def test_small_weights_do_not_blur_activations() -> None:
    """Near 0 gelu and its tanh form are the same number: the second pass looks where they differ."""
    for name in ("gelu", "gelu_tanh", "silu"):
        up = wide()
        with torch.no_grad():
            up.weight.mul_(1e-3)
            up.bias.zero_()
        block = Block(lambda self, x, name=name: self.c(activate(name, self.a(x))), a=up, c=narrow())
        (ffn,) = search(block).found
        assert ffn.activation == name


def test_attention_routers_and_adapters_are_left_alone() -> None:
    adapter = Block(lambda self, x: self.up(torch.relu(self.down(x))), down=nn.Linear(WIDTH, 4), up=nn.Linear(4, WIDTH))
    router = Block(
        lambda self, x: x * self.score(functional.gelu(self.wide(self.into(x)))).mean(-1, keepdim=True),
        into=nn.Linear(WIDTH, 24),
        wide=nn.Linear(24, 48),
        score=nn.Linear(48, 24),
    )
    factorised = Block(lambda self, x: self.b(self.a(x)), a=wide(), b=narrow())
    square = Block(lambda self, x: self.b(torch.relu(self.a(x))), a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH))
    assert not search(adapter, router, square, Attention(WIDTH)).found
    assert not search(factorised).found


class Experts(nn.Module):
    """Each expert sees some of the tokens; a shared one sees all."""

    def __init__(self, listed: str) -> None:
        super().__init__()

        def expert(width: int) -> nn.Module:
            return Block(
                lambda self, x: self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)),
                gate_proj=nn.Linear(WIDTH, width),
                up_proj=nn.Linear(WIDTH, width),
                down_proj=nn.Linear(width, WIDTH),
            )

        self.listed = listed
        setattr(self, listed, nn.ModuleList(expert(NEURONS) for _ in range(3)))
        self.shared = expert(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        result = self.shared(rows)
        for number, expert in enumerate(getattr(self, self.listed)):
            chosen = torch.arange(len(rows)) % 3 == number
            result = result.index_put((chosen.nonzero().flatten(),), expert(rows[chosen]), accumulate=True)
        return result.reshape(x.shape)


@pytest.mark.parametrize("listed", ["experts", "parts"])
def test_routed_experts_are_named_and_a_shared_one_is_found(listed: str) -> None:
    found = search(Experts(listed))
    assert [ffn.name for ffn in found.found] == ["blocks.0.shared.down_proj"]
    names = ["blocks.0"] if listed == "experts" else [f"blocks.0.parts.{number}.down_proj" for number in range(3)]
    assert [item.name for item in found.skipped] == names
    assert all("mixture of experts" in item.reason for item in found.skipped)


def test_a_layer_that_runs_twice_is_one_ffn() -> None:
    block = Block(lambda self, x: self.c(torch.relu(self.a(x))), a=wide(), c=narrow())
    found = search(Block(lambda self, x: self.inner(self.inner(x)), inner=block))
    assert [ffn.name for ffn in found.found] == ["blocks.0.inner.c"]
    again = Block(lambda self, x: self.inner(torch.cat((x, x), dim=1))[:, : x.shape[1]], inner=block)
    assert f"{2 * TOKENS} rows for {TOKENS} tokens" in search(again).skipped[0].reason


@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_broken_weights_do_not_hide_a_layer(value: float) -> None:
    """That its activations are not finite is for calibration to say, with the layer's name."""
    block = block_with_a_twin()
    with torch.no_grad():
        block.b.weight[0] = value
    assert search(block, block_with_a_twin()).found[0].inputs == (block.a, block.b)


def test_models_that_need_more_than_tokens() -> None:
    class NeedsMore(TokenModel):
        def forward(self, input_ids: Tensor, use_cache: bool, pixels: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids, use_cache)

    with pytest.raises(UnsupportedModelError, match="NeedsMore does not run on token ids alone"):
        find_eager_ffns(NeedsMore(width=WIDTH))
    with pytest.raises(UnsupportedModelError, match="no feed-forward layer that could be compiled"):
        TorchDecoder(TokenModel(width=WIDTH)).require_ffns()


def test_the_search_leaves_no_hooks() -> None:
    block = Block(lambda self, x: self.c(torch.relu(self.a(x))), a=wide(), c=narrow())
    model = TokenModel(block, width=WIDTH)
    find_eager_ffns(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(torch.arange(5)[None], False).logits, model(torch.arange(5)[None], False).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3", "opt"])
def test_models_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    wanted = find_eager_ffns(tiny_model(kind)).found
    found = find_eager_ffns(tiny_model(kind).to(dtype)).found
    assert [(ffn.name, ffn.activation, ffn.gated, ffn.packing) for ffn in found] == [
        (ffn.name, ffn.activation, ffn.gated, ffn.packing) for ffn in wanted
    ]
