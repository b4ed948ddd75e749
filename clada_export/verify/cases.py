"""The token sequences that verification runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROMPT = 40
DECODE = 16


@dataclass(frozen=True)
class Case:
    """A batch: each row's tokens, of which the last `DECODE` are decoded step by step and the rest are the prompt."""

    name: str
    rows: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> list[list[int]]:
        """The rows without the part that is decoded."""
        return [list(row[: len(row) - DECODE]) for row in self.rows]


def make_cases(
    text: np.ndarray | None, vocab_size: int, limit: int | None, seed: int = 0, *, ragged: bool = True
) -> tuple[Case, ...]:
    """Real text and random tokens, batch 1 and 2; the rows of a batch of 2 differ in length, if `ragged`.

    Args:
        text: int64 [windows, context] of real text, or None if there is none.
        limit: the longest sequence that the model takes.
    """
    rng = np.random.default_rng(seed)
    prompt = PROMPT if limit is None else max(2, min(PROMPT, limit - DECODE))
    length, short = prompt + DECODE, (max(1, prompt // 2) if ragged else prompt) + DECODE
    pair = "batch 2, ragged" if ragged else "batch 2"
    noise = rng.integers(0, vocab_size, (2, length))
    cases = []
    if text is not None and text.shape[1] >= length:
        last = len(text) - 1
        cases.append(Case("text, batch 1", (_row(text[0], length),)))
        cases.append(Case(f"text, {pair}", (_row(text[last], length), _row(text[0], short))))
    cases.append(Case("random, batch 1", (_row(noise[0], length),)))
    cases.append(Case(f"random, {pair}", (_row(noise[0], short), _row(noise[1], length))))
    return tuple(cases)


def _row(values: np.ndarray, length: int) -> tuple[int, ...]:
    return tuple(int(value) for value in values[:length])
