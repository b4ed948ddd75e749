"""The meaning of `com.clada::SparseFFN`: an eager PyTorch implementation that every other shell is compared with.

Written for clarity: it computes every neuron and masks. Notation as in `docs/sparse-ffn-op.md`: T rows, d `hidden_size`,
f `intermediate_size`, g `granule`, E = f / g granules, n = 2 (gate, up) or 1 (up).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clada_export.op.ffn_quant_reference import product_out, products_in
from graph_passes.op import FORMAT_BITS, GROUP, SHADOW_BLOCK, ContractError, SparseFFNAttributes, input_shapes, x_types


@dataclass(frozen=True)
class SparseFFNTensors:
    """The constant inputs of one op.

    Shapes: `w_in` [f, n, d], `w_out` [f, d] (float32, float16 or bfloat16); `threshold` float32 [1] or [E];
    `neuron_scale` float32 [f]; `shadow` int8 [f, n, d/2] with `shadow_scale` float16 [f, n, d/32, 2]; biases [f], [f], [d].
    Quantised, `w_in` is uint8 [n f/32, d/32, R] and `w_out` uint8 [f/32, d R/32] (`graph_passes.quant.ffn_layout`).
    """

    w_in: Tensor
    w_out: Tensor
    threshold: Tensor
    neuron_scale: Tensor | None = None
    shadow: Tensor | None = None
    shadow_scale: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class SparseFFNResult:
    """`y` as x; `stat` float32 [B, f]; `active` int32, one count a row; `mask` bool [..., f]: the neurons that ran."""

    y: Tensor
    stat: Tensor | None
    active: Tensor
    mask: Tensor


def activate(name: str, value: Tensor) -> Tensor:
    """The activation `name` of the contract, elementwise.

    Raises:
        ContractError: an unknown name.
    """
    functional = torch.nn.functional
    match name:
        case "silu":
            return functional.silu(value)
        case "gelu":
            return functional.gelu(value)
        case "gelu_tanh":
            return functional.gelu(value, approximate="tanh")
        case "relu":
            return functional.relu(value)
        case "relu2":
            return functional.relu(value).square()
        case "identity":
            return value
    raise ContractError(f"SparseFFN: unknown activation {name!r}")


def quantize_shadow(w_in: Tensor) -> tuple[Tensor, Tensor]:
    """Make the 4-bit copy that score `shadow` reads.

    Every block of 32 weights of a row becomes `offset + scale * q` with q in 0..15, offset the block's minimum, scale its
    range / 15, both rounded to float16 first so that q is the nearest level of the numbers that are stored. Weights that lie on
    such a grid already (GGUF Q4_1) are kept exactly.

    Args:
        w_in: [f, n, d], any float type, d divisible by 32.

    Returns:
        `shadow` int8 [f, n, d/2]: byte i of a block of 16 has weight i in its low and weight i + 16 in its high four bits;
        `shadow_scale` float16 [f, n, d/32, 2]: (scale, offset).

    Raises:
        ContractError: d is not divisible by 32, or a weight is not finite.
    """
    f, n, d = w_in.shape
    if d % SHADOW_BLOCK:
        raise ContractError(f"SparseFFN: score 'shadow' needs hidden_size divisible by {SHADOW_BLOCK}; it is {d}")
    blocks = w_in.float().reshape(f, n, d // SHADOW_BLOCK, SHADOW_BLOCK)
    if not bool(torch.isfinite(blocks).all()):
        raise ContractError("SparseFFN: w_in has a value that is not finite")
    low, high = blocks.amin(-1), blocks.amax(-1)
    limit = torch.finfo(torch.float16).max
    scale = ((high - low) / 15).clamp(max=limit).half()
    offset = low.clamp(-limit, limit).half()
    step = scale.float().unsqueeze(-1)
    levels = torch.where(step > 0, (blocks - offset.float().unsqueeze(-1)) / step, 0.0)
    q = levels.round_().clamp_(0, 15).to(torch.uint8)
    half = SHADOW_BLOCK // 2
    packed = q[..., :half] | (q[..., half:] << 4)
    return packed.reshape(f, n, d // 2).view(torch.int8), torch.stack((scale, offset), dim=-1)


def dequantize_shadow(shadow: Tensor, shadow_scale: Tensor) -> Tensor:
    """The float32 weights [f, n, d] that the 4-bit copy stands for."""
    f, n, half_d = shadow.shape
    packed = shadow.view(torch.uint8).reshape(f, n, half_d // (SHADOW_BLOCK // 2), SHADOW_BLOCK // 2)
    q = torch.cat((packed & 15, packed >> 4), dim=-1).float()
    scale, offset = shadow_scale.float().unbind(-1)
    return (offset.unsqueeze(-1) + scale.unsqueeze(-1) * q).reshape(f, n, half_d * 2)


def load_multiplier(load: Tensor, attributes: SparseFFNAttributes) -> Tensor:
    """m(load) = clip(exp(-load_slope * load), load_min, load_max), float32; meaningless where load is not finite."""
    slope = attributes.load_slope
    # 0 * inf is NaN: a slope of zero means no response whatever the load is.
    factor = torch.exp(-slope * load.float()) if slope != 0.0 else torch.ones_like(load, dtype=torch.float32)
    return factor.clamp(attributes.load_min, attributes.load_max)


def neuron_outputs(
    x: Tensor, w_in: Tensor, tensors: SparseFFNTensors, attributes: SparseFFNAttributes
) -> tuple[Tensor, Tensor]:
    """(h, a): the hidden activation and the activated gate (plain FFN: h itself), each float32 [..., f]."""
    if attributes.weight_format == "plain":
        weight = w_in.float()
        first, *others = (torch.nn.functional.linear(x.float(), weight[:, i]) for i in range(weight.shape[1]))
        second = others[0] if others else None
    else:
        first, second = products_in(x, w_in, attributes)
    if not attributes.gated:
        if tensors.up_bias is not None:
            first = first + tensors.up_bias.float()
        hidden = activate(attributes.activation, first)
        return hidden, hidden
    if tensors.gate_bias is not None:
        first = first + tensors.gate_bias.float()
    assert second is not None
    if tensors.up_bias is not None:
        second = second + tensors.up_bias.float()
    gate = activate(attributes.activation, first)
    return gate * second, gate


def neuron_scores(
    x: Tensor,
    hidden: Tensor,
    gate: Tensor,
    tensors: SparseFFNTensors,
    attributes: SparseFFNAttributes,
    past_stat: Tensor | None,
    shadow_weight: Tensor | None,
) -> Tensor:
    """The score of every neuron, float32 [..., f]; not for score `external`, which comes with the input."""
    match attributes.score:
        case "gate":
            return gate.abs()
        case "exact":
            assert tensors.neuron_scale is not None
            return hidden.abs() * tensors.neuron_scale.float()
        case "shadow":
            assert tensors.neuron_scale is not None
            if shadow_weight is None:
                assert tensors.shadow is not None and tensors.shadow_scale is not None
                shadow_weight = dequantize_shadow(tensors.shadow, tensors.shadow_scale)
            estimate, _ = neuron_outputs(x, shadow_weight, tensors, attributes)
            return estimate.abs() * tensors.neuron_scale.float()
        case "prefix":
            assert past_stat is not None
            return past_stat.float().sqrt().unsqueeze(1).expand_as(hidden)
    raise ContractError(f"SparseFFN: score {attributes.score!r} is not computed from x")


def per_granule(value: Tensor, granule: int) -> Tensor:
    """The sum over the neurons of each granule: [..., f] to [..., E]."""
    return value if granule == 1 else value.reshape(*value.shape[:-1], value.shape[-1] // granule, granule).sum(-1)


def prompt_shares(hidden: Tensor, attributes: SparseFFNAttributes) -> Tensor:
    """What each row would add to the prompt statistic: h^2 / norm(h)^2, float32 [..., f]; a row of zeros adds nothing.

    With `stat_norm` none it is h^2 itself (TDA, arXiv 2408.11393; the formula is our own derivation).
    """
    energy = hidden.float().square()
    if attributes.stat_norm == "none":
        return energy
    total = energy.sum(-1, keepdim=True)
    return torch.where(total > 0, energy / total, torch.zeros(()))


def granule_prior(past_stat: Tensor, granule: int) -> Tensor:
    """r [B, 1, E]: a granule's mean of s_j / mean(s), s = sqrt(past_stat); 1 while no prompt has been seen."""
    s = past_stat.float().sqrt()
    mean = s.mean(-1, keepdim=True)
    ratio = torch.where(mean > 0, s / mean, torch.ones_like(s))
    return (per_granule(ratio, granule) / granule).unsqueeze(1)


def select_granules(
    score: Tensor, threshold: Tensor, multiplier: Tensor, attributes: SparseFFNAttributes, prior: Tensor | None
) -> Tensor:
    """The rule: which granules run, for rows whose load is finite.

    Args:
        score: float32 [..., E], one a granule.
        threshold: float32 [1] or [E].
        multiplier: float32 [...], m(load) of each row.
        prior: float32, broadcastable to score, or None.

    Returns:
        bool [..., E]. A NaN score counts as active.
    """
    nan = score.isnan()
    m = multiplier.unsqueeze(-1)
    eligible = torch.ones_like(nan) if prior is None else (prior >= attributes.backbone_min).expand_as(score)
    level = threshold.float() * m
    if prior is not None and attributes.prior_gamma > 0.0:
        level = level * prior.pow(-attributes.prior_gamma)
    match attributes.rule:
        case "threshold":
            # The negated comparison keeps NaN scores.
            return ~(score < level) & eligible
        case "relative":
            floor = torch.full_like(score, float("-inf"))
            best = torch.where(nan | ~eligible, floor, score).amax(-1, keepdim=True)
            best = torch.where(best.isinf() & (best < 0), torch.zeros_like(best), best)
            return ~(score < level * best) & eligible
        case "topk":
            granules = score.shape[-1]
            # In float64, which holds every count of granules; float32 does up to 2^24.
            k = torch.round(threshold.float() / m).double().clamp(1, granules).to(torch.int64)
            rank_by = torch.where(nan, torch.full_like(score, float("inf")), score)
            rank_by = torch.where(eligible, rank_by, torch.full_like(score, float("-inf")))
            # A stable sort gives ties to the lowest index.
            order = rank_by.argsort(dim=-1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(
                -1, order, torch.arange(granules, device=score.device).expand_as(order).contiguous()
            )
            return (rank < k) & eligible
    raise ContractError(f"SparseFFN: unknown rule {attributes.rule!r}")


def sparse_ffn(
    x: Tensor,
    load: Tensor,
    tensors: SparseFFNTensors,
    attributes: SparseFFNAttributes,
    *,
    score: Tensor | None = None,
    past_stat: Tensor | None = None,
    shadow_weight: Tensor | None = None,
) -> SparseFFNResult:
    """One call of the op, computed in float32; y is rounded to x's type at the end.

    Args:
        x: [..., d], float32 or the weights' type; [B, S, d] when `use_stat` or `emit_stat` is 1.
        load: float32 [...], x's shape without its last axis. +inf or NaN: every neuron; -inf: a padding row.
        score: float32 [..., E] or [B, E], with score `external` only.
        past_stat: float32 [B, f], with `use_stat` only.
        shadow_weight: the dequantised shadow [f, n, d], if the caller keeps it; made from the tensors otherwise.

    Raises:
        ContractError: shapes or types that do not belong together.
    """
    check_inputs(x, load, tensors, attributes, score=score, past_stat=past_stat)
    granule = attributes.granule
    load = load.float()
    hidden, gate = neuron_outputs(x, tensors.w_in, tensors, attributes)
    padding = load == float("-inf")
    dense = load.isnan() | (load == float("inf"))

    if attributes.score == "external":
        assert score is not None
        granule_score = score.float()
        if granule_score.dim() < x.dim():
            granule_score = granule_score.unsqueeze(1)
        granule_score = granule_score.expand(*x.shape[:-1], hidden.shape[-1] // granule)
    else:
        granule_score = per_granule(neuron_scores(x, hidden, gate, tensors, attributes, past_stat, shadow_weight), granule)
    prior = granule_prior(past_stat, granule) if past_stat is not None else None
    active = select_granules(granule_score, tensors.threshold, load_multiplier(load, attributes), attributes, prior)
    active = (active | dense.unsqueeze(-1)) & ~padding.unsqueeze(-1)
    mask = active.repeat_interleave(granule, dim=-1) if granule > 1 else active

    contribution = hidden
    if attributes.combine == "weighted":
        contribution = hidden * granule_score.repeat_interleave(granule, dim=-1)
    # `where`, not a product: an infinite activation of a masked neuron is removed too.
    contribution = torch.where(mask, contribution, torch.zeros_like(contribution))
    if attributes.weight_format == "plain":
        y = contribution @ tensors.w_out.float()
    else:
        y = product_out(contribution, tensors.w_out, attributes)
    if tensors.down_bias is not None:
        y = y + tensors.down_bias.float()
    y = torch.where(padding.unsqueeze(-1), torch.zeros_like(y), y)

    stat = None
    if attributes.emit_stat:
        prompt = (load == float("inf")).unsqueeze(-1)
        stat = torch.where(prompt, prompt_shares(hidden, attributes), torch.zeros(())).sum(1)
        if past_stat is not None:
            stat = past_stat.float() + stat
    return SparseFFNResult(y=y.to(x.dtype), stat=stat, active=mask.sum(-1, dtype=torch.int32), mask=mask)


def check_inputs(
    x: Tensor,
    load: Tensor,
    tensors: SparseFFNTensors,
    attributes: SparseFFNAttributes,
    *,
    score: Tensor | None = None,
    past_stat: Tensor | None = None,
) -> None:
    """Refuse inputs that do not belong together.

    Raises:
        ContractError: names the input, the shape or type found and the one wanted.
    """

    def want(name: str, found: Tensor | None, *shapes: tuple[int, ...]) -> None:
        if found is None:
            raise ContractError(f"SparseFFN: input {name!r} is missing; attributes ask for it")
        if tuple(found.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ContractError(f"SparseFFN: input {name!r} has shape {list(found.shape)}; wanted {wanted}")

    f, d = _sizes(tensors.w_in, attributes)
    if x.dim() < 1 or x.shape[-1] != d:
        raise ContractError(f"SparseFFN: input 'x' has shape {list(x.shape)}; its last axis must be {d}, the width of w_in")
    if attributes.granule > f or f % attributes.granule:
        raise ContractError(f"SparseFFN: {f} neurons are not divisible by granule {attributes.granule}")
    types = [str(tensor.dtype).removeprefix("torch.") for tensor in (x, tensors.w_in, tensors.w_out)]
    for name, found, allowed in (
        ("x", types[0], x_types(types[1], attributes.weight_format)),
        ("w_out", types[2], (types[1],)),
    ):
        if found not in allowed:
            raise ContractError(f"SparseFFN: input {name!r} has type {found}; wanted {' or '.join(allowed)}")
    if (attributes.use_stat or attributes.emit_stat) and x.dim() != 3:
        raise ContractError(f"SparseFFN: input 'x' has shape {list(x.shape)}; the prompt statistic needs [B, S, d]")
    given = {**vars(tensors), "x": x, "load": load, "score": score, "past_stat": past_stat}
    for name, shapes in input_shapes(attributes, tuple(x.shape[:-1]), d, f).items():
        want(name, given[name], *shapes)
    if not bool((tensors.threshold >= 0).all()):
        raise ContractError("SparseFFN: input 'threshold' has a negative or NaN value; thresholds are at least 0")


def _sizes(w_in: Tensor, attributes: SparseFFNAttributes) -> tuple[int, int]:
    """f and d."""
    n, shape = 2 if attributes.gated else 1, list(w_in.shape)
    if attributes.weight_format != "plain":
        record = GROUP * (4 * FORMAT_BITS[attributes.weight_format] + 2)
        if len(shape) != 3 or shape[0] % n or shape[0] * shape[1] == 0 or shape[2] != record:
            wanted = f"[{n} f / {GROUP}, d / {GROUP}, {record}]"
            raise ContractError(f"SparseFFN: input 'w_in' has shape {shape}; wanted {wanted}, f and d divisible by {GROUP}")
        return shape[0] // n * GROUP, shape[1] * GROUP
    if len(shape) != 3 or shape[1] != n:
        raise ContractError(f"SparseFFN: input 'w_in' has shape {shape}; wanted [f, {n}, d]")
    f, _, d = shape
    if f < 1 or d < 1:
        raise ContractError(f"SparseFFN: input 'w_in' has shape {shape}; f and d must be at least 1")
    return f, d
