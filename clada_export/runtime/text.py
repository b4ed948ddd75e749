"""Text to tokens and back, from the tokenizer files of an export, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError, UsageError
from clada_export.plan import read_json

TOKENIZER_FILE = "tokenizer.json"


class TextTokenizer:
    """The tokenizer of an export folder.

    Args:
        folder: holds `tokenizer.json`, and `chat_template.jinja` or `tokenizer_config.json` if there is a chat template.

    Raises:
        UsageError: `tokenizer.json` can't be read.
        BackendError: the package `tokenizers` is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackendError("text prompts need the package 'tokenizers'; install it with: pip install tokenizers") from error
        self._folder = folder
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # tokenizers raises plain Exception
            raise UsageError(f"{folder / TOKENIZER_FILE}: not a tokenizer that can be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `special_tokens`, those that the model expects around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self._tokenizer)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the assistant answers.

        Args:
            messages: dicts with `role` and `content`.

        Raises:
            UsageError: the export has no chat template, or the template refuses the messages.
            BackendError: the package `jinja2` is missing.
        """
        template, tokens = self._chat_template()
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise BackendError("chat templates need the package 'jinja2'; install it with: pip install jinja2") from error

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(template).render(messages=list(messages), add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise UsageError(f"{self._folder}: the chat template can't be applied: {error}") from error
        return self.encode(text, special_tokens=False)

    def _chat_template(self) -> tuple[str, dict[str, str]]:
        path = self._folder / "tokenizer_config.json"
        config: Any = read_json(path) if path.is_file() else {}
        template = config.get("chat_template")
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        if isinstance(template, list):  # several named templates
            template = next((item["template"] for item in template if item.get("name") == "default"), None)
        if not isinstance(template, str):
            raise UsageError(f"{self._folder}: this model has no chat template; give a plain prompt")
        tokens = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            tokens[name] = value.get("content", "") if isinstance(value, dict) else value or ""
        return template, tokens


class TextStream:
    """Decodes tokens one by one; a piece of text comes out when its bytes are complete."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes, or an empty string."""
        return str(self._stream.step(self._tokenizer, token) or "")
