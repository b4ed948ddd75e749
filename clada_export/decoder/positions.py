"""From which number a model counts the positions of a text, where that is not 0.

RoBERTa and its kind keep the positions up to their padding token's id for padding, and count a text from the next one, unless
they are told the positions. An engine counts from 0 like any other, and its graph adds the rest (`graph_passes.positions`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.model_config import text_config_of

TOKENS = 8
SAME = 1e-4
"""Of the largest logit: positions that are off by one change logits by a tenth of it and more."""


def first_position(decoder: Decoder) -> int:
    """The position that a decoder gives the first token of a text by itself; 0 for one that does not take positions.

    Raises:
        Whatever the model raises on token ids alone.
    """
    padded = _padded_positions(decoder)
    if padded is None or not decoder.takes_positions:
        return 0
    ids = sample_tokens(decoder, TOKENS)
    with torch.inference_mode():
        wanted = decoder.run(ids).logits
        for first in (0, padded + 1):
            found = decoder.run(ids, positions=torch.arange(first, first + TOKENS)[None]).logits
            if float((found - wanted).abs().max()) <= SAME * float(wanted.abs().max()):
                return first
    # Positions of another kind: dense parity tells whether the engine's are right.
    return 0


def _padded_positions(decoder: Decoder) -> int | None:
    """The position that an embedding of positions keeps for padding; None if it keeps none, or there is no such embedding."""
    model = decoder.module
    limit = getattr(text_config_of(decoder.config), "max_position_embeddings", None)
    tokens = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens and module.num_embeddings == limit:
            return module.padding_idx
    return None


def sample_tokens(decoder: Decoder, count: int) -> Tensor:
    """Fixed random token ids, int64 [1, count], none of them padding, which a model may count as no token."""
    vocabulary, padding = decoder.vocab_size, getattr(text_config_of(decoder.config), "pad_token_id", None)
    ids = torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % vocabulary, ids)
