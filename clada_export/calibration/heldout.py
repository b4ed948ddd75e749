"""The held-out windows in one process: run as an engine runs them, the prompt dense and every later token sparse.

Windows of one length are run as one batch where their logits fit, so that a layer's weights are read once for all of them. What
a dense prompt leaves behind (the cache, the prompt statistics) is the same for every method, so it is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.precision import products
from clada_export.calibration.selector import LayerSelector, MethodSelectors, ScorerShelf, Selectors
from clada_export.calibration.soundness import bounded, require_finite
from clada_export.calibration.teacher import Teacher, chunks
from clada_export.calibration.windows import AsItIs, Desk, View
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn.projections import parameters
from clada_export.decoder.model_config import text_config_of
from clada_export.decoder.tap import FFNTap
from clada_export.errors import UnsupportedModelError
from clada_export.load.surprisal import surprisal_entropy
from clada_export.plan.method import Method

LOGITS_LIMIT, LOGITS_LEAST = 480 * 2**20, 160 * 2**20
"""Bytes of the logits of windows that are run at once: an eighth of the FFNs' weights (what a batch saves is reading
them), within these bounds."""
CACHE_LIMIT = 512 * 2**20
"""Bytes of the caches of all prompts; where they take more, prompts are run again."""
SAME = 1e-3
"""Of the largest logit: how far going on from a prompt's cache may be from running the text in one piece. Rounding is a
hundredth of it."""
CHECKED = 16
"""Tokens after the prompt on which that is looked at; all, if the model's attention does not reach over the whole text."""

METHODS = 16
"""Whose selectors are kept."""

StatKind = tuple[int, tuple[str, bytes]]
"""The index of an FFN, and `LayerSelector.stat_kind`."""


@dataclass
class _Start:
    """What the dense prompts of a group leave behind: the cache, and prompt statistics [windows, f'] as they are asked for."""

    cache: Any = None
    stats: dict[StatKind, Tensor] = field(default_factory=dict)


@dataclass
class _State:
    """What holds for one state of the weights; of the prompts, in one precision at a time."""

    starts: dict[tuple[int, bool], _Start] = field(default_factory=dict)
    selectors: dict[int, tuple[Method, MethodSelectors]] = field(default_factory=dict)
    shelf: ScorerShelf | None = None


class HeldOut:
    """Runs groups of held-out windows.

    Args:
        windows: int64 [N, context].
        prompt: tokens of every window that run dense, at least 1.
        as_given: calls with the weights that drift is measured from.
        view: says how the model is computed, apart from the dense side.
        at_once: the most windows of a group; None is as many as their logits allow.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        prompt: int,
        as_given: Callable[[Callable[[], Teacher]], Teacher] = lambda make: make(),
        at_once: int | None = None,
        view: Callable[[], View] = AsItIs,
    ) -> None:
        self._decoder, self._windows, self._prompt, self._as_given = decoder, windows, prompt, as_given
        self._view = view
        self.groups = groups_of(windows, prompt, decoder, at_once)
        self._teachers: dict[tuple[int, bool], Teacher] = {}
        self._signals: dict[int, Tensor] = {}
        self._goes_on: bool | None = None
        self._known: tuple[Any, _State] | None = None

    @classmethod
    def at(cls, desk: Desk) -> HeldOut:
        """That of a desk, made once."""
        if cls not in desk.memo:
            desk.memo[cls] = cls(desk.decoder, desk.heldout, desk.prompt, desk.as_given, desk.at_once, view=lambda: desk.view)
        found = desk.memo[cls]
        assert isinstance(found, cls)
        return found

    def teacher(self, group: int, fast: bool) -> Teacher:
        """The dense model's side of a group, computed when it is first asked for.

        Its rows are the decided ones of its windows, one window after the other, each without its last row, whose next token is
        not known.

        Raises:
            UnsupportedModelError: logits that are not finite.
        """
        if (group, fast) not in self._teachers:
            # One precision at a time: probabilities of a large vocabulary are hundreds of megabytes.
            for other in [key for key in self._teachers if key[1] != fast]:
                del self._teachers[other]
            self._teachers[group, fast] = self._as_given(lambda: self._make_teacher(group, fast))
        return self._teachers[group, fast]

    def signals(self, group: int, fast: bool) -> Tensor:
        """Surprisal and entropy of every token but the first of each window, float32 [windows, 2, context - 1]."""
        if group not in self._signals:
            self.teacher(group, fast)
        return self._signals[group]

    def selectors(self, method: Method) -> MethodSelectors:
        """Those of a method for the weights as they are now."""
        state = self._state()
        if id(method) not in state.selectors:
            if len(state.selectors) >= METHODS:
                state.selectors.clear()
            # The method is kept with them, so that no other takes its id.
            state.selectors[id(method)] = method, Selectors(self._decoder.ffns, (method,), self.shelf()).layers[0]
        return state.selectors[id(method)][1]

    def shelf(self) -> ScorerShelf:
        """The scorers for the weights as they are now."""
        state = self._state()
        state.shelf = state.shelf or ScorerShelf(self._decoder.ffns)
        return state.shelf

    def sparse(
        self, group: int, layers: Sequence[LayerSelector], levels: np.ndarray, multiplier: Tensor | None, fast: bool
    ) -> tuple[Tensor, int, int]:
        """Run a group with every token after the prompt sparse.

        Args:
            layers: one selector an FFN.
            levels: [layers].
            multiplier: m(load), float32 [N, context], or None for 1.

        Returns:
            (what `compare` gives, float32 [5, rows]; neurons that ran; neurons in all).
        """
        windows = self.groups[group]
        decided = self._windows.shape[1] - self._prompt
        teacher = self.teacher(group, fast)
        stats: Mapping[StatKind, Tensor] = {}
        goes_on = self._can_go_on(fast)
        if goes_on:
            stats = self._start(group, layers, fast).stats
        counts = [0, 0]

        def inner(index: int, x: Tensor, h: Tensor) -> Tensor:
            selector = layers[index]
            inputs, hidden = (item.reshape(len(windows), -1, item.shape[-1]) for item in (x, h))
            skipped = hidden.shape[1] - decided
            kind = index, selector.stat_kind
            rows = hidden[:, skipped:].reshape(-1, h.shape[-1])
            scorer = selector.scorer
            scores = None if scorer is None else scorer(inputs[:, skipped:].reshape(-1, x.shape[-1]), rows)
            changed: list[Tensor] = []
            for place, window in enumerate(windows):
                part = slice(place * decided, (place + 1) * decided)
                stat = None
                if selector.needs_stat:
                    stat = stats[kind][place : place + 1] if goes_on else selector.stat(hidden[place, :skipped])
                own = inputs[place, skipped:]
                selection = selector.decide(own, None if scores is None else scores[part], stat)
                level: Tensor | float = float(levels[index])
                if multiplier is not None:
                    level = selector.axis.moved(torch.tensor(level), multiplier[window, self._prompt :].unsqueeze(-1))
                remaining, keep = selector.hidden(rows[part], selection, level)
                counts[0] += int(keep.count_nonzero()) * selector.layer.granule * (decided if len(keep) == 1 else 1)
                counts[1] += selector.layer.width * decided
                changed += [hidden[place, :skipped], remaining] if skipped else [remaining]
            return torch.cat(changed).reshape(h.shape)

        with products(fast):
            logits = self._decided(group, self._decoder.tap(inner=inner), fast)
        parts = [self._compared(teacher, logits[place], group, place) for place in range(len(windows))]
        return torch.cat(parts, dim=1), counts[0], counts[1]

    def through(self, window: int, tap: FFNTap, fast: bool) -> Tensor:
        """Run a window in one piece with a tap that makes it sparse after its prompt.

        Returns:
            What `compare` gives, float32 [5, rows].
        """
        group = next(index for index, windows in enumerate(self.groups) if window in windows)
        teacher = self.teacher(group, fast)
        with products(fast), self._view().on(), tap:
            logits = self._decoder.logits(self._windows[window]).float()
        return self._compared(teacher, logits[self._prompt :], group, window - self.groups[group][0])

    def _compared(self, teacher: Teacher, logits: Tensor, group: int, place: int) -> Tensor:
        """A window's decided rows [rows, V], the last of which is left out."""
        window = self.groups[group][place]
        count = len(logits) - 1
        targets = self._windows[window, self._prompt + 1 :]
        nll, dense, kl, same = teacher.compare(logits[:-1], targets, slice(place * count, (place + 1) * count))
        return torch.stack((nll, dense, kl, same, torch.full_like(nll, float(window))))

    def _make_teacher(self, group: int, fast: bool) -> Teacher:
        windows = self._windows[self.groups[group]]
        prompt, count = self._prompt, windows.shape[1] - self._prompt - 1
        with products(fast):
            cache = None
            if self._can_go_on(fast):
                head = self._decoder.run(windows[:, :prompt], keep_cache=True)
                cache, first = head.cache, head.logits.float()
                rest = self._decoder.run(windows[:, prompt:], cache=cache, keep_cache=True).logits.float()
            else:
                logits = self._decoder.run(windows).logits.float()
                first, rest = logits[:, :prompt], logits[:, prompt:]
        for window, before, after in zip(windows, first, rest, strict=True):
            require_finite(self._decoder, window, before)
            require_finite(self._decoder, window, after)
        signals = [
            torch.cat((_signals(before, window[1 : prompt + 1]), _signals(after[:-1], window[prompt + 1 :])), dim=1)
            for window, before, after in zip(windows, first, rest, strict=True)
        ]
        self._signals[group] = torch.stack(signals)
        size = 4 * len(self._windows) * count * rest.shape[-1]
        return Teacher.of_parts([(after[:-1], window[prompt + 1 :]) for window, after in zip(windows, rest, strict=True)], size)

    def _decided(self, group: int, tap: AbstractContextManager[Any], fast: bool) -> Tensor:
        """The logits [windows, context - prompt, V] of the tokens after the prompt, under a tap."""
        windows = self._windows[self.groups[group]]
        with self._view().on(), tap:
            if not self._can_go_on(fast):
                return self._decoder.run(windows).logits[:, self._prompt :].float()
            cache = copy.deepcopy(self._start(group, (), fast).cache)
            return self._decoder.run(windows[:, self._prompt :], cache=cache, keep_cache=True).logits.float()

    def _start(self, group: int, layers: Sequence[LayerSelector], fast: bool) -> _Start:
        """What the group's dense prompts leave behind; with the statistics that these layers ask for."""
        state = self._state()
        start = state.starts.get((group, fast))
        wanted = {(index, item.stat_kind): item for index, item in enumerate(layers) if item.needs_stat}
        missing = {kind: item for kind, item in wanted.items() if start is None or kind not in start.stats}
        if start is not None and not missing:
            return start
        windows = self._windows[self.groups[group], : self._prompt]
        found: dict[StatKind, Tensor] = {}

        def inner(index: int, x: Tensor, h: Tensor) -> None:
            rows = h.reshape(len(windows), -1, h.shape[-1])
            for kind, selector in missing.items():
                if kind[0] == index:
                    found[kind] = torch.cat([selector.stat(part) for part in rows])

        with products(fast), self._view().on(), self._decoder.tap(inner=inner) if missing else nullcontext():
            cache = self._decoder.run(windows, keep_cache=True).cache
        start = start or _Start(cache)
        start.stats.update(found)
        state.starts = {key: item for key, item in state.starts.items() if key[1] == fast} | {(group, fast): start}
        return start

    def _state(self) -> _State:
        """What is known for the weights as they are now, which change in place, and for the view."""
        weights = [(id(item), item._version) for ffn in self._decoder.ffns for item in parameters(ffn)]
        now = self._view().key, weights
        if self._known is None or self._known[0] != now:
            self._known = now, _State()
        return self._known[1]

    def _can_go_on(self, fast: bool) -> bool:
        """Whether going on from a prompt's cache is the same as running the text in one piece, by a few tokens of it."""
        if self._goes_on is None:
            # Two windows, if windows are run together: kernels may take several tokens after a cache of one row only.
            text = self._windows[self.groups[0][:2]]
            if not _forgets(self._decoder, text.shape[1]):
                text = text[:, : self._prompt + CHECKED]
            with products(False):
                self._goes_on = self._same_from_cache(text)
        return self._goes_on

    def _same_from_cache(self, text: Tensor) -> bool:
        cache = self._decoder.run(text[:, : self._prompt], keep_cache=True).cache
        if not cache or _size(cache) // len(text) * len(self._windows) > CACHE_LIMIT:
            return False
        try:
            found = self._decoder.run(text[:, self._prompt :], cache=cache, keep_cache=True).logits
        except UnsupportedModelError:
            return False
        wanted = self._decoder.run(text).logits[:, self._prompt :]
        return float((found - wanted).abs().max()) <= SAME * float(wanted.abs().max())


def groups_of(windows: Tensor, prompt: int, decoder: Decoder, most: int | None = None) -> list[list[int]]:
    """The numbers of the windows that are run at once: as many as their logits and `most` allow, at least one.

    Args:
        windows: int64 [N, context].
    """
    weights = sum(4 * (3 if ffn.gated else 2) * ffn.hidden_size * ffn.intermediate_size for ffn in decoder.ffns)
    limit = min(LOGITS_LIMIT, max(LOGITS_LEAST, weights // 8))
    rows = windows.shape[1] - prompt
    size = max(1, min(most or len(windows), len(windows), limit // max(4 * rows * decoder.vocab_size, 1)))
    return [list(range(start, min(start + size, len(windows)))) for start in range(0, len(windows), size)]


def _forgets(decoder: Decoder, context: int) -> bool:
    """Whether the configuration has a window or a chunk of attention that is shorter than the text: caches of such models drop
    tokens, which a few tokens after a prompt would not show."""
    sizes = vars(text_config_of(decoder.config)).items()
    lengths = [size for name, size in sizes if isinstance(size, int) and ("window" in name or "chunk" in name)]
    return any(0 < size < context for size in lengths if not isinstance(size, bool))


def _signals(logits: Tensor, targets: Tensor) -> Tensor:
    """Surprisal and entropy, float32 [2, rows], of logits [rows, V] and the tokens that followed."""
    parts = [torch.stack(surprisal_entropy(logits[part], targets[part])) for part in chunks(logits)]
    return bounded(torch.cat(parts, dim=1))


def _size(cache: Any) -> int:
    """Bytes of the tensors in a model's cache, whatever its kind."""
    if isinstance(cache, Tensor | np.ndarray):
        return int(cache.nbytes)
    if isinstance(cache, Mapping):
        return sum(_size(item) for item in cache.values())
    if isinstance(cache, list | tuple):
        return sum(_size(item) for item in cache)
    return sum(_size(item) for item in vars(cache).values()) if hasattr(cache, "__dict__") else 0
