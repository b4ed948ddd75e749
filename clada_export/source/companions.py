"""What is written beside an engine about its model: config.json, generation_config.json and the tokenizer's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clada_export.decoder.decoder import Decoder
from clada_export.foreign import CONFIG, GENERATION_CONFIG, TOKENIZER, reading
from clada_export.source.pretrained import CONFIG_FILE, GENERATION_FILE, quiet


def write_companions(decoder: Decoder, tokenizer: Any, folder: Path, origin: str) -> None:
    """Write them as transformers does.

    Args:
        decoder: has the configuration, and may have defaults for generation.
        tokenizer: its tokenizer, or None.
        folder: exists already.
        origin: the model, for messages.

    Raises:
        UsageError: transformers can't write what it has read; says which.
    """
    with reading(CONFIG, f"{origin}: {CONFIG_FILE}"), quiet():
        decoder.config.save_pretrained(folder)
    if decoder.generation_config is not None:
        with reading(GENERATION_CONFIG, f"{origin}: {GENERATION_FILE}"), quiet():
            decoder.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        with reading(TOKENIZER, origin), quiet():
            tokenizer.save_pretrained(folder)
