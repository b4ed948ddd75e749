"""Whether a model gives a row the same result when it is padded on the left, as a batch of rows of different lengths is."""

from __future__ import annotations

import torch
from torch import Tensor

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.padding_kinds import LEFT, NONE
from clada_export.decoder.positions import sample_tokens

SAME = 1e-3
"""Of the largest logit. Rounding is a hundredth of it. A model that counts padding as positions is off by as much as 1; one
whose mask only lowers the scores of padding is off by little, and still by more than an engine may be."""
_TOKENS, _PADDING = 8, 3


def padding_of(decoder: Decoder, *, cached: bool) -> str:
    """`left` or `none`, by one row alone and padded.

    Args:
        decoder: is told positions if it takes them.
        cached: look at a step that goes on from a cache too: a mask can be right for a whole sequence and wrong there.
    """
    ids = sample_tokens(decoder, _TOKENS)
    padded = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), ids), 1)
    mask = torch.cat((torch.zeros((1, _PADDING), dtype=torch.int64), torch.ones_like(ids)), 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + decoder.first_position if decoder.takes_positions else None
    with torch.inference_mode():
        wanted = decoder.run(ids).logits
        found = decoder.run(padded, mask=mask, positions=positions).logits[:, _PADDING:]
        if cached:
            later = _after_a_cache(decoder, padded, mask, positions)
            found = torch.cat((found[:, : -later.shape[1]], later), 1)
    return LEFT if float((wanted - found).abs().max()) <= SAME * float(wanted.abs().max()) else NONE


def _after_a_cache(decoder: Decoder, ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Logits of the second half of the tokens, run after the first half."""
    middle = _PADDING + _TOKENS // 2
    before, after = (None, None) if positions is None else (positions[:, :middle], positions[:, middle:])
    past = decoder.run(ids[:, :middle], mask=mask[:, :middle], positions=before, keep_cache=True).cache
    # The mask is of the cache and what comes after it; all else is of what comes after it.
    return decoder.run(ids[:, middle:], mask=mask, positions=after, cache=past, keep_cache=True).logits
