"""The texts of the experiment: written ones, cut into documents, and ones that the model itself writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.calibration.text import read_text
from clada_export.decoder.decoder import Decoder
from clada_export.errors import UsageError


@dataclass(frozen=True)
class Documents:
    """One text: `tokens` int64 [documents, context]."""

    name: str
    tokens: Tensor


def cut(name: str, ids: Sequence[int], count: int, context: int) -> Documents:
    """`count` documents that do not overlap, spread evenly over a text.

    Raises:
        UsageError: the text is too short.
    """
    whole = len(ids) // context
    if whole < count:
        raise UsageError(
            f"{name}: {len(ids)} tokens are {whole} documents of {context}, and {count} are wanted; give a longer text, or a "
            "smaller --documents or --context"
        )
    rows = np.asarray(ids[: whole * context], dtype=np.int64).reshape(whole, context)
    return Documents(name, torch.from_numpy(rows[np.linspace(0, whole - 1, count).round().astype(int)].copy()))


def from_file(path: Path, tokenizer: Any | None, count: int, context: int) -> Documents:
    """The documents of a UTF-8 text file.

    Raises:
        UsageError: the file can't be read, is too short, or the model has no tokenizer.
    """
    if tokenizer is None:
        raise UsageError(f"{path}: the model has no tokenizer, so a text can't be used; leave --text out")
    ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    return cut(path.stem, ids, count, context)


def generate(
    decoder: Decoder,
    prompts: Tensor,
    context: int,
    *,
    temperature: float,
    seed: int = 0,
    forbidden: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Let the dense decoder go on from prompts, all as one batch.

    Args:
        prompts: int64 [N, prompt].
        context: tokens of a document, its prompt included.
        temperature: 0 is greedy.
        forbidden: tokens that are not chosen, so that no document ends early.
        progress: called with (tokens done, tokens in all).

    Returns:
        int64 [N, context].
    """
    generator = torch.Generator().manual_seed(seed)
    never = torch.tensor(sorted(forbidden), dtype=torch.long)
    rows = [prompts]
    wanted = context - prompts.shape[1]
    with torch.inference_mode():
        output = decoder.run(prompts, keep_cache=True)
        for step in range(wanted):
            logits = output.logits[:, -1].float()
            logits[:, never] = float("-inf")
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                chosen = logits.argmax(-1, keepdim=True)
            rows.append(chosen)
            progress(step + 1, wanted)
            if step + 1 < wanted:
                output = decoder.run(chosen, cache=output.cache, keep_cache=True)
    return torch.cat(rows, dim=1)


def ending_tokens(decoder: Decoder) -> frozenset[int]:
    """The tokens that end a text."""
    found: set[int] = set()
    for config in (decoder.config, decoder.generation_config):
        end = getattr(config, "eos_token_id", None)
        found |= {item for item in (end if isinstance(end, list) else [end]) if isinstance(item, int)}
    return frozenset(found)
