"""Find the feed-forward layers of an eager model by what they compute, whatever its modules are called.

The model runs twice on a few tokens. In the first pass each projection is a possible down projection, and what went into it is
held against what came out of the projections before it: act(u), or act(g) * u. In the second pass the results of the gate and
up projections that were found so are replaced by numbers that cover the range of an activation, and what goes into the down
projection then has to be the op's function of them, to rounding. So an FFN that the op would not reproduce (a norm inside, a
clamp, a learned activation) is not taken for one, and no list of module names is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clada_export.decoder.ffn.layer import PACKINGS, EagerFFN, EagerFFNs, SkippedFFN, plain_ffns, unpack, weight_rows
from clada_export.decoder.ffn.probe import TOKENS, Record, probe
from clada_export.decoder.model_config import text_config
from clada_export.op.reference import activate
from graph_passes.op import ACTIVATIONS

NEAR = 1e-3
"""Of the largest hidden value: what the first pass lets pass. Small numbers do not tell activations apart; the second does."""
EXACT = 2e-6
"""Of the largest possible product: what rounding may differ by in the second pass, in float32 (16 units in the last place)."""
NARROW = 4.0
"""Units in the last place for types of 16 bits: the values are computed in the same type, and the closest form is taken.

Exports search in float32. In 16 bits gelu and gelu_tanh, which differ by less than rounding, may be taken for each other.
"""
RANGE = 12.0
"""Numbers of the second pass are within it; clamps of published models (7, 10) are too."""
SAMPLE = 64
"""Columns that refuse a form before all are computed."""
FEW = 3
"""A module with more projections than an FFN has is attention, or another mixer."""


@dataclass(frozen=True)
class _Sources:
    """Projections whose results may be the gate and up values of a down projection."""

    records: tuple[Record, ...]
    packed: bool

    @property
    def gated(self) -> bool:
        return self.packed or len(self.records) == 2

    @property
    def values(self) -> list[Tensor]:
        return [item.y for item in self.records]


@dataclass(frozen=True)
class _Likely:
    """A down projection, and what may feed it: the first pass can take a dead layer's zeros for many things."""

    down: Record
    sources: tuple[_Sources, ...]


@dataclass(frozen=True)
class _Form:
    """One way in which gate and up become hidden values; `order` says which record is the gate."""

    activation: str
    packing: str | None = None
    swapped: bool = False


def find_eager_ffns(model: nn.Module) -> EagerFFNs:
    """Find every dense FFN of `model`.

    Returns:
        The FFNs in the order in which they run, and those that stay dense with the reason: routed experts, hidden values that
        the op does not compute.

    Raises:
        UnsupportedModelError: the model does not run on token ids alone.
    """
    moe = list(_moe_parents(model))
    skipped = [SkippedFFN(path, "mixture of experts: routed experts are left dense") for path in moe]
    with plain_ffns(model):
        records = probe(model)
        outside = [item for item in records.values() if not any(item.path.startswith(f"{path}.experts.") for path in moe)]
        likely: list[_Likely] = []
        for down in outside:
            found_here = tuple(item for item in _sources(down, outside) if _forms(item, item.values, down, NEAR))
            why = _not_an_ffn(down, found_here[0], _width(model)) if found_here else _looks_like_an_ffn(down, outside)
            if found_here and why is None:
                likely.append(_Likely(down, found_here))
            elif why:
                skipped.append(SkippedFFN(down.path, why))
        found, odd = _proven(model, likely)
    return EagerFFNs(tuple(found), (*skipped, *odd))


def _sources(down: Record, records: Sequence[Record]) -> Iterator[_Sources]:
    """What may feed a down projection, nearest first: projections of one x, of its width, that ran before it."""
    width, hidden_size = down.x.shape[1], down.y.shape[1]
    before = [item for item in records if item.order < down.order and item.x.shape[1] == hidden_size and item.rows == down.rows]
    before.sort(key=lambda item: (_common(item.path, down.path), item.order), reverse=True)
    for index, item in enumerate(before):
        if item.y.shape[1] == 2 * width:
            yield _Sources((item,), packed=True)
        if item.y.shape[1] != width:
            continue
        yield _Sources((item,), packed=False)
        for other in before[index + 1 :]:
            if other.y.shape[1] == width and _same(item.given, other.given):
                yield _Sources((other, item) if other.order < item.order else (item, other), packed=False)


def _common(one: str, other: str) -> int:
    """How many names two paths begin with alike."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def _forms(sources: _Sources, values: Sequence[Tensor], down: Record, tolerance: float) -> list[_Form]:
    """The ways in which the values give what went into `down`, closest first; `tolerance` is relative to the largest of what
    they give."""
    found: list[tuple[float, _Form]] = []
    h, dtype = down.x, down.given.dtype
    if dtype.itemsize < torch.float32.itemsize:
        tolerance = max(tolerance, NARROW * torch.finfo(dtype).eps)
    sample = slice(None, None, max(1, h.shape[1] // SAMPLE))
    h_sample, largest = h[:, sample], float(torch.where(h.isfinite(), h.abs(), 0.0).max())
    for form, gate, up in _candidates(sources, [each.to(dtype) for each in values]):
        if up.shape != h.shape:
            continue
        # What is as near as that is no larger than this, so a few columns refuse most: in a model of many layers, nearly all.
        few = _hidden(form, None if gate is None else gate[:, sample], up[:, sample]).float()
        if _difference(few, h_sample)[0] > tolerance * largest / (1.0 - tolerance):
            continue
        difference, size = _difference(_hidden(form, gate, up).float(), h)
        if difference <= tolerance * size:
            found.append((difference, form))
    return [form for _, form in sorted(found, key=lambda item: item[0])]


def _difference(hidden: Tensor, h: Tensor) -> tuple[float, float]:
    """The largest distance, and the largest hidden value."""
    # What is not finite can't be compared; the second pass puts finite numbers in its place.
    usable = hidden.isfinite() & h.isfinite()
    difference, size = (float(torch.where(usable, values.abs(), 0.0).max()) for values in (hidden - h, hidden))
    return difference, size


def _hidden(form: _Form, gate: Tensor | None, up: Tensor) -> Tensor:
    return activate(form.activation, up) if gate is None else activate(form.activation, gate) * up


def _candidates(sources: _Sources, values: Sequence[Tensor]) -> Iterator[tuple[_Form, Tensor | None, Tensor]]:
    """Every form, with its gate, if it has one, and up."""
    if not sources.gated:
        # Two projections in a row without an activation are one that was factorised.
        for name in ACTIVATIONS:
            if name != "identity":
                yield _Form(name), None, values[0]
        return
    for name in ACTIVATIONS:
        if sources.packed:
            for packing in PACKINGS:
                yield _Form(name, packing), *unpack(values[0], packing, -1)
        else:
            yield _Form(name), values[0], values[1]
            yield _Form(name, swapped=True), values[1], values[0]


def _not_an_ffn(down: Record, sources: _Sources, width: int | None) -> str | None:
    """Why projections with an activation between them are no FFN that a plan can hold; "" where nobody would call it one."""
    hidden_size, intermediate_size = down.y.shape[1], down.x.shape[1]
    if width is not None and hidden_size != width:
        return ""
    # A gated one may be narrow (a shared expert of a mixture); a plain one is an adapter, or a router's network.
    if not sources.gated and intermediate_size <= hidden_size:
        return ""
    if down.rows != TOKENS:
        what = "mixture of experts: it sees only the tokens that are routed to it"
        return (
            what if down.rows < TOKENS else f"it sees {down.rows} rows for {TOKENS} tokens, and the load has one number a token"
        )
    return None


def _width(model: nn.Module) -> int | None:
    """The width of the residual stream, if the model's configuration says it."""
    found = getattr(text_config(model), "hidden_size", None)
    return found if isinstance(found, int) else None


def _proven(model: nn.Module, likely: Sequence[_Likely]) -> tuple[list[EagerFFN], list[SkippedFFN]]:
    """Those whose hidden values are the op's function of whatever the gate and up projections give."""
    generator = torch.Generator().manual_seed(1)
    values: dict[int, Tensor] = {}
    for record in (record for item in likely for sources in item.sources for record in sources.records):
        if id(record.module) not in values:
            values[id(record.module)] = (torch.rand(record.y.shape, generator=generator) * 2.0 - 1.0) * RANGE

    def put(number: int, y: Tensor) -> Tensor:
        return values[number].reshape(y.shape).to(y.dtype)

    inject: dict[int, Callable[[Tensor], Tensor]] = {number: partial(put, number) for number in values}
    records = probe(model, inject) if likely else {}
    found, skipped = [], []
    for item in likely:
        down = records[item.down.path]
        for sources in item.sources:
            forms = _forms(sources, [values[id(record.module)] for record in sources.records], down, EXACT)
            if forms:
                found.append(_ffn(item.down, sources, forms[0]))
                break
        else:
            skipped.append(SkippedFFN(item.down.path, _UNKNOWN))
    return found, skipped


def _ffn(down: Record, sources: _Sources, form: _Form) -> EagerFFN:
    inputs = tuple(item.module for item in sources.records)
    d, f = weight_rows(down.module).shape
    ordered = tuple(reversed(inputs)) if form.swapped else inputs
    return EagerFFN(down.path, ordered, down.module, form.activation, sources.gated, d, f, form.packing)


_UNKNOWN = (
    "what goes into its down projection is neither act(up) nor act(gate) * up of projections before it, with act one of "
    + ", ".join(ACTIVATIONS)
)


def _looks_like_an_ffn(down: Record, records: Sequence[Record]) -> str | None:
    """Why a projection is no down projection of the op, where its module has the shapes of an FFN; else None."""
    width, hidden_size = down.x.shape[1], down.y.shape[1]
    parent = down.path.rpartition(".")[0]
    beside = [item for item in records if item.path.rpartition(".")[0] == parent and item is not down]
    wide = [item for item in beside if item.y.shape[1] in (width, 2 * width) and item.x.shape[1] == hidden_size]
    if not wide or len(beside) >= FEW or width <= hidden_size or down.order < min(item.order for item in wide):
        return None
    return _UNKNOWN


def _moe_parents(model: nn.Module) -> Iterator[str]:
    """The paths of modules that route tokens to experts."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            yield path
