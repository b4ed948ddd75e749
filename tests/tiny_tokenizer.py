"""A tokenizer of 250 words, `w0` to `w249`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def save_tiny_tokenizer(folder: Path) -> None:
    """Write its files into a model folder."""
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(250)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
