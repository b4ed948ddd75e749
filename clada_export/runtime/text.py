"""Text to tokens and back, from the tokenizer files of an export, without transformers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError, UsageError
from clada_export.files.json_files import read_regular
from clada_export.files.tokenizer_file import LARGEST, check_tokenizer
from clada_export.files.tokenizer_growth import check_growth
from clada_export.foreign import TEXT, TOKENIZER, TOKENS, reading
from clada_export.runtime.chat_template import ChatTemplate

TOKENIZER_FILE = "tokenizer.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """The tokenizer of an export folder.

    Args:
        folder: holds `tokenizer.json`, and `chat_template.jinja` or `tokenizer_config.json` if there is a chat template.
        listed: the names of the files in it that may be read; None for any.

    Raises:
        UsageError: `tokenizer.json` can't be read, or makes a text out of all bounds long.
        BackendError: the package `tokenizers` is missing.
    """

    def __init__(self, folder: Path, listed: Collection[str] | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackendError("text prompts need the package 'tokenizers'; install it with: pip install tokenizers") from error
        self._folder = folder
        self._listed = listed
        self._place = folder / TOKENIZER_FILE
        if listed is not None and TOKENIZER_FILE not in listed:
            raise UsageError(f"{self._place}: the export does not list this file, so it is not used")
        data = read_regular(self._place, LARGEST)
        check_tokenizer(data, self._place)
        with reading(TOKENIZER, self._place):
            self._tokenizer = Tokenizer.from_buffer(data)
        with reading(TOKENIZER, self._place):
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        check_growth(self._tokenizer, self._place)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `special_tokens`, those that the model expects around it.

        Raises:
            UsageError: the tokenizer has no tokens for this text, or it is none: half of a surrogate pair is in it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"character {error.start} of the text is {text[error.start]!a}"
            raise UsageError(f"{found}, half of a surrogate pair, which no tokenizer takes") from error
        with reading(TEXT, self._place):
            ids = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return list(ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens.

        Raises:
            UsageError: the tokenizer can't make text of these.
        """
        with reading(TOKENS, self._place):
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self._tokenizer, self._place)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the assistant answers.

        Args:
            messages: dicts with `role` and `content`.

        Raises:
            UsageError: the export has no chat template, or the template is broken, refuses the messages, or takes too long or
                too much memory.
            BackendError: the package `jinja2` is missing or too old, or no Python interpreter runs this.
        """
        text = ChatTemplate.read(self._folder, self._has).render(messages)
        return self.encode(text, special_tokens=False)

    def _has(self, name: str) -> bool:
        """Whether the folder has a file of this name that may be read."""
        return (self._listed is None or name in self._listed) and (self._folder / name).exists()


class TextStream:
    """Decodes tokens one by one; a piece of text comes out when its characters are whole.

    A token's text may depend on the ones before it, never on all of them: what is decoded at a time are the tokens of the last
    piece and those after it. The pieces and `flush` together are what `TextTokenizer.decode` makes of all tokens, save where a
    byte that never becomes a character stands right behind one that did: there the character stays.

    Args:
        tokenizer: of the package `tokenizers`.
        place: its file, for messages.
    """

    def __init__(self, tokenizer: Any, place: Path) -> None:
        self._tokenizer = tokenizer
        self._place = place
        self._all: list[int] = []
        self._text = ""
        self._begin = self._end = 0  # of the last piece's tokens, in `_all`
        self._known = ""  # their text, decoded alone, and what later tokens have given of theirs

    def push(self, token: int) -> str:
        """The text that this token completes, or an empty string.

        Raises:
            UsageError: the tokenizer can't make text of it.
        """
        self._all.append(token)
        text = self._decode(self._all[self._begin :])
        whole = text.rstrip(_REPLACEMENT)
        if whole == text:
            return self._taken(self._later(text))
        # The rest may be the beginning of a character, whose other bytes come with later tokens.
        if not whole.startswith(self._known):
            return ""
        piece = whole[len(self._known) :]
        self._text += piece
        self._known = whole
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that became no character, as replacement characters.

        Raises:
            UsageError: as `push`.
        """
        whole = self._decode(self._all)
        if whole.startswith(self._text):
            return self._taken(whole[len(self._text) :])
        return self._taken(self._later(self._decode(self._all[self._begin :])))

    def _later(self, text: str) -> str:
        """What a window's text has beyond the last piece's."""
        if text.startswith(self._known):
            return text[len(self._known) :]
        return self._decode(self._all[self._end :])

    def _taken(self, piece: str) -> str:
        if piece:
            self._text += piece
            self._begin, self._end = self._end, len(self._all)
            self._known = self._decode(self._all[self._begin :])
        return piece

    def _decode(self, tokens: list[int]) -> str:
        with reading(TOKENS, self._place):
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
