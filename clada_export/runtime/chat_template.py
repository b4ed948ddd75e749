"""Chat templates: which one a model has, and what it makes of a conversation.

A template is a program from whoever made the model. Jinja's sandbox keeps it from our objects and files, and nothing of Jinja
keeps it from taking all memory or all day: it runs in a child process that the operating system bounds
(`clada_export/runtime/render_template.py`). That takes 60 ms a conversation, most of it Python's start.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError, UsageError
from clada_export.files.json_files import read_json, read_regular, require_plain
from clada_export.foreign import CHAT_TEMPLATE

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
LARGEST_TEMPLATE = 4 << 20
"""Bytes; those of today's models have 20,000 at most."""
SECONDS = 2
"""Of CPU. Rendering takes milliseconds."""
CLOCK_S = 3 * SECONDS
"""By the clock, for a machine that has other things to do."""
MEMORY = 256 << 20
"""Bytes of address space, of which Python and Jinja take 40 MB; and `_MEMORY_PER_BYTE` times what the messages have."""
_MEMORY_PER_BYTE = 32
LONGEST = 1 << 20
"""Characters that a template may write of its own; and `_TIMES` times what the messages have."""
_TIMES = 8
_SCRIPT = Path(__file__).with_name("render_template.py")
_OLDEST = (3, 1, 6)
"""Earlier versions of jinja2 have ways out of the sandbox."""
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MORE_TOKENS = ("sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a folder.

    Attributes:
        place: the file that it comes from.
        source: its text.
        tokens: special tokens by name, for its variables.
    """

    place: Path
    source: str
    tokens: dict[str, str]

    @classmethod
    def read(cls, folder: Path, has: Callable[[str], bool]) -> ChatTemplate:
        """Of `chat_template.jinja`, or else of `tokenizer_config.json`.

        Args:
            has: whether a file of that name in the folder may be read.

        Raises:
            UsageError: there is none, or a file makes no sense.
        """
        place, config = folder / CONFIG_FILE, {}
        if has(CONFIG_FILE):
            config = read_json(place)
            if not isinstance(config, dict):
                raise UsageError(f"{place}: a JSON object is wanted, and this is {type(config).__name__}")
        tokens = _special_tokens(config, place)
        if has(TEMPLATE_FILE):
            place = folder / TEMPLATE_FILE
            try:
                return cls(place, read_regular(place, LARGEST_TEMPLATE).decode("utf-8"), tokens)
            except UnicodeDecodeError as error:
                raise UsageError(f"{place}: a template is UTF-8 text, and this is not: {error}") from error
        source = _named(config.get("chat_template"), place)
        if source is None:
            raise UsageError(f"{folder}: this model has no chat template; give a plain prompt")
        if len(source) > LARGEST_TEMPLATE:
            raise UsageError(f"{place}: chat_template has {len(source)} characters; none needs {LARGEST_TEMPLATE}")
        return cls(place, source, tokens)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation, up to where the assistant answers.

        Args:
            messages: dicts with `role` and `content`.

        Raises:
            UsageError: messages that are no such dicts; a template with an error, that refuses them, or that takes too long
                or too much memory.
            BackendError: `jinja2` is missing or too old, or this program is not run by a Python interpreter.
        """
        given = _checked(messages)
        values = {"messages": given, "tools": None, "documents": None, "add_generation_prompt": True, **self.tokens}
        size = len(json.dumps(values))
        memory, longest = MEMORY + _MEMORY_PER_BYTE * size, LONGEST + _TIMES * size
        request = {"template": self.source, "values": values, "memory": memory, "seconds": SECONDS, "longest": longest}
        answer = self._answer(json.dumps(request).encode())
        text = answer.get("text")
        if isinstance(text, str):
            return text
        line = answer.get("line")
        where = str(self.place) if line is None else f"{self.place}: line {line}"
        said = " ".join(str(answer.get("error")).split())[:300]
        raise UsageError(f"{where}: {CHAT_TEMPLATE.fault}: {said}")

    def _answer(self, request: bytes) -> dict[str, Any]:
        """What the child process says."""
        command = [_interpreter(), "-I", "-S", str(_SCRIPT), *_folders()]
        try:
            # A group of its own: Ctrl-C comes to us, and we end it.
            done = subprocess.run(
                command,
                input=request,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=CLOCK_S,
                process_group=0,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"{self.place}: {CHAT_TEMPLATE.fault}: it takes longer than {CLOCK_S} s") from error
        except OSError as error:
            raise BackendError(f"chat templates are rendered by {command[0]}, and it can't be run: {error.strerror}") from error
        if done.returncode in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            raise UsageError(f"{self.place}: {CHAT_TEMPLATE.fault}: it takes longer than {SECONDS} s")
        if done.returncode < 0:
            name = signal.strsignal(-done.returncode)
            raise UsageError(f"{self.place}: {CHAT_TEMPLATE.fault}: it crashes the interpreter ({name})")
        try:
            answer = json.loads(done.stdout)
        except ValueError as error:
            raise BackendError(
                f"chat templates are rendered by {command[0]}, and it gave no answer (exit code {done.returncode}): "
                "is it a Python interpreter?"
            ) from error
        return answer if isinstance(answer, dict) else {}


def _special_tokens(config: dict[str, Any], place: Path) -> dict[str, str]:
    """Special tokens as templates see them; the usual ones are empty where the model has none."""
    tokens = dict.fromkeys(_TOKENS, "")
    for name in (*_TOKENS, *_MORE_TOKENS):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
        elif value is not None:
            raise UsageError(f"{place}: {name} is no token: wanted is a text, or an object with a text as its 'content'")
    return tokens


def _named(template: Any, place: Path) -> str | None:
    """The default of one or several templates."""
    if isinstance(template, list):
        for index, item in enumerate(template):
            if not (isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)):
                raise UsageError(f"{place}: chat_template/{index}: an object with the texts 'name' and 'template' is wanted")
        return next((item["template"] for item in template if item["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UsageError(f"{place}: chat_template is {type(template).__name__}; wanted is a text, or a list of named ones")
    return template


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, which JSON can hold."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise UsageError(f"messages are {type(messages).__name__}; wanted is a list of dicts with 'role' and 'content'")
    for index, message in enumerate(messages):
        place = f"message {index}"
        if not isinstance(message, dict):
            raise UsageError(f"{place} is {type(message).__name__}; wanted is a dict with 'role' and 'content'")
        try:
            json.dumps(message)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{place} holds something other than text, numbers, lists and dicts of them: {error}") from error
        require_plain(message, place)
    return list(messages)


def _interpreter() -> str:
    """The Python interpreter that runs this."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise BackendError(
            "chat templates are rendered by a Python interpreter in another process, and this program has none "
            "(sys.executable); apply the template yourself and give the text as a prompt"
        )
    return sys.executable


def _folders() -> list[str]:
    """Where jinja2 and what it needs are found, for an interpreter that looks nowhere itself."""
    found = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BackendError(f"chat templates need the package {name!r}; install it with: pip install jinja2")
        found.append(str(Path(spec.origin).parents[1]))
    version = importlib.metadata.version("jinja2")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise BackendError(f"chat templates need jinja2 {wanted} or later, and this is {version}; pip install -U jinja2")
    return list(dict.fromkeys(found))
