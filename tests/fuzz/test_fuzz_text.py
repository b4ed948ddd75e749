"""Tokenizers, chat templates, conversations and texts of strangers."""

from __future__ import annotations

import base64
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import strategies as st

from clada_export.errors import BackendError, UsageError
from clada_export.runtime import chat_template
from clada_export.runtime.text import TextTokenizer
from tests.fuzz.harness import JSON_VALUES, damaged, fuzz, hold, mutated
from tests.processes import start

WORDS = {f"w{index}": index for index in range(20)}
USER = {"role": "user", "content": "w4"}
BYTES = sorted({chr(33 + index) for index in range(94)} | {chr(161 + index) for index in range(12)} | {"Ġ", "Ċ"})
CHARSMAP = base64.b64encode(struct.pack("<I", 1024) + bytes(range(256)) * 4 + b"a\0b\0").decode()

MODELS: list[dict[str, Any]] = [
    {"type": "WordLevel", "vocab": WORDS, "unk_token": "w0"},
    {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
    {
        "type": "BPE",
        "dropout": None,
        "unk_token": "a",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": "</w>",
        "fuse_unk": True,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "ab": 2, "abab": 3, "</w>": 4},
        "merges": [["a", "b"], ["ab", "ab"]],
    },
    {"type": "BPE", "vocab": {letter: index for index, letter in enumerate(BYTES)}, "merges": []},
    {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -1.5], ["▁", -2.0], ["<0x61>", -3.0]],
        "byte_fallback": True,
    },
    {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
    },
]
RULES: dict[str, list[dict[str, Any]]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"},
        {"type": "Replace", "pattern": {"Regex": "(a|b)*c?"}, "content": " "},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Precompiled", "precompiled_charsmap": CHARSMAP},
        *({"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "ByteLevel")),
    ],
    "pre_tokenizer": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": "\\s?\\w+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": "b"}, "behavior": "MergedWithPrevious", "invert": True},
        {"type": "CharDelimiterSplit", "delimiter": "a"},
        {"type": "Digits", "individual_digits": True},
        {"type": "FixedLength", "length": 5},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Punctuation", "behavior": "Contiguous"},
        *({"type": name} for name in ("BertPreTokenizer", "UnicodeScripts", "Whitespace", "WhitespaceSplit")),
    ],
    "post_processor": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "BertProcessing", "sep": ["w1", 1], "cls": ["w2", 2]},
        {"type": "RobertaProcessing", "sep": ["w1", 1], "cls": ["w2", 2], "trim_offsets": True, "add_prefix_space": True},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "w1", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"w1": {"id": "w1", "ids": [1, 2], "tokens": ["w1", "w2"]}},
        },
    ],
    "decoder": [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "w3", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Strip", "content": "w", "start": 1, "stop": 1},
        {"type": "Replace", "pattern": {"String": "w"}, "content": "vv"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        *({"type": name} for name in ("ByteFallback", "Fuse")),
    ],
}
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors", "decoder": "decoders"}
TOKEN = {"id": 3, "content": "w3", "single_word": False, "lstrip": True, "rstrip": False, "normalized": True, "special": True}
WHOLE: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **dict.fromkeys(RULES)}
TEXTS = ["", "w1 w2", "ab abab a b", "a" * 3000, "\x00\u0300\u200d\ufffd", "漢字 ﷺ İ 😀", "w3w3 w3", "<|x|>", "\n\t  \r"]
TOKENS = [[], [0], [1, 2, 3, 4], [10**6], [2**32 - 1], [2**32], [-1], list(range(20)) * 20]


def _write(folder: Path, tokenizer: Any = None, template: str | None = None, config: Any = None) -> Path:
    """A folder with a tokenizer of words by default."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = {**WHOLE, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": MODELS[0]}
    data = tokenizer if isinstance(tokenizer, bytes) else json.dumps(tokenizer).encode()
    (folder / "tokenizer.json").write_bytes(data)
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _held(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    found = hold(call)
    assert type(found) is error
    for word in words:
        assert word in str(found)


# --- Templates


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{{ 1/0 }}", ("line 2", "ZeroDivisionError")),
        ("{% include 'x' %}", ("line 1", "no loader")),
        ("{% extends messages %}", ("line 1",)),
        ("{% import 'x' as y %}", ("line 1",)),
        ("{{ raise_exception('roles must alternate') }}", ("roles must alternate",)),
        ("\n\n{% for x in %}", ("line 3", "syntax error")),
        ("{{ ''.__class__.__mro__ }}", ("unsafe",)),
        ("{{ messages.append(1) }}", ("unsafe",)),
        ("{{ namespace(_a=1) }}", ("underscore",)),
        ("{{ messages[0].content.x.y }}", ("no attribute",)),
        ("{{ 'x' + 1 }}", ("TypeError",)),
        ("{{ {}|tojson(indent='a'*3, sort_keys=1, separators=1) }}", ("TypeError",)),
        ("{{ messages|map('nope')|list }}", ("nope",)),
        ("{{ range(10**9) }}", ("100000",)),
        ("{{ 10**5000 }}", ("4300",)),
        ("{{ 'a' * 10**9 }}", ("memory",)),
        ("{{ 'a'|center(10**10) }}", ("memory",)),
        ("{{ '%2000000000d' % 1 }}", ("memory",)),
        ("{{ 'ab'|replace('', 'x'*10**6)|replace('x', 'y'*10**6) }}", ("memory",)),
        ("{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}", ("memory",)),
        ("{{ 'a' * 10**7 }}", ("10000000 characters",)),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", ("nested", "calls itself")),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ("nested",)),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, ("nested",)),
        ("{{ - " + "-" * 100_000 + "1 }}", ("nested",)),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", ("it takes longer than",)),
        ("{{ 7**(10**8) == 1 }}", ("it takes longer than",)),
        ("{{ lipsum(n=10**7) }}", ("it takes longer than",)),
    ],
)
def test_templates_that_fail(tmp_path: Path, template: str, words: tuple[str, ...]) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, template=template))
    _held(lambda: tokenizer.chat([USER]), UsageError, "chat_template.jinja", "the chat template can't be applied", *words)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages|tojson }}", '[{"role": "user", "content": "w4"}]'),
        ("{{ {'b': '<é>', 'a': 1}|tojson(sort_keys=true) }}", '{"a": 1, "b": "<é>"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "w4"),
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% set n = namespace(self=3) %}{% set n.x = 4 %}{{ n.self }}{{ n.x }}", "34"),
        ("{{ dict(a=1).a }}{{ dict.fromkeys('a').a }}", "1None"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{{ bos_token }}|{{ eos_token }}|{{ cls_token is defined }}", "w9||False"),
        ("{{ strftime_now('%%') }}", "%"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ '<b>' }}{{ missing }}", "<b>"),
    ],
)
def test_templates_see_what_transformers_gives_them(tmp_path: Path, template: str, text: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = _write(tmp_path, template=template, config={"bos_token": "w9"})
    found = chat_template.ChatTemplate.read(folder, lambda name: (folder / name).is_file()).render([USER])
    wanted, _ = render_jinja_template(
        [[USER]], chat_template=template, add_generation_prompt=True, bos_token="w9", eos_token=""
    )
    assert found == wanted[0] == text


def test_a_template_may_repeat_long_messages(tmp_path: Path) -> None:
    folder = _write(tmp_path, template="{{ messages[0].content * 4 }}")
    found = chat_template.ChatTemplate.read(folder, lambda name: name.endswith("jinja")).render([{"content": "w4 " * 10**6}])
    assert len(found) == 12 * 10**6


_SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_CHAT = """
import sys
from pathlib import Path
from clada_export.runtime.text import TextTokenizer
TextTokenizer(Path(sys.argv[1])).chat([{"role": "user", "content": "w1"}])
"""


def test_ctrl_c_ends_the_template_too(tmp_path: Path) -> None:
    folder = _write(tmp_path, template=_SLOW)
    process = start([sys.executable, "-c", _CHAT, str(folder)], os.environ)
    try:
        renderers = _wait_for_children(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in errors, errors
    # Left alone it would go on for 2 s; a process that has ended may be listed until somebody asks how.
    end = time.monotonic() + 1
    while (alive := [renderer for renderer in renderers if _runs(renderer)]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for_children(pid: int) -> list[psutil.Process]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = [
            child for child in psutil.Process(pid).children() if any("render_template" in word for word in child.cmdline())
        ]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("no template is rendered")


def test_a_template_without_a_caller_ends_by_itself(tmp_path: Path) -> None:
    folder = _write(tmp_path, template=_SLOW)
    process = start([sys.executable, "-c", _CHAT, str(folder)], os.environ)
    renderers = _wait_for_children(process.pid)
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(renderers, timeout=60)
    assert gone and not alive


def test_no_process_is_left(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, template=_SLOW))
    before = set(psutil.Process().children(recursive=True))
    _held(lambda: tokenizer.chat([USER]), UsageError, "it takes longer than")
    assert set(psutil.Process().children(recursive=True)) <= before


def test_an_interpreter_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, template="x"))
    for executable, words in (("", "sys.executable"), ("/nowhere/python", "can't be run"), ("/bin/true", "no answer")):
        monkeypatch.setattr(sys, "executable", executable)
        _held(lambda: tokenizer.chat([USER]), BackendError, words)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "messages are str"),
        ({"role": "user"}, "messages are dict"),
        (None, "messages are NoneType"),
        ([USER, "hello"], "message 1 is str"),
        ([[USER]], "message 0 is list"),
        ([{"role": "user", "content": b"x"}], "message 0 holds something other"),
        ([{"role": "user", "content": {1, 2}}], "message 0 holds something other"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": float("nan")}], "content"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, messages: Any, words: str) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, template="{{ messages[0].content }}"))
    _held(lambda: tokenizer.chat(messages), UsageError, words)


def test_messages_that_hold_themselves(tmp_path: Path) -> None:
    message: dict[str, Any] = {"role": "user"}
    message["content"] = message
    tokenizer = TextTokenizer(_write(tmp_path, template="x"))
    _held(lambda: tokenizer.chat([message]), UsageError, "message 0", "Circular")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "a JSON object is wanted"),
        (3, "a JSON object is wanted"),
        ({"chat_template": 3}, "chat_template is int"),
        ({"chat_template": {"default": "x"}}, "chat_template is dict"),
        ({"chat_template": ["x"]}, "chat_template/0"),
        ({"chat_template": [{"name": "default"}]}, "chat_template/0"),
        ({"chat_template": [{"name": "default", "template": "x"}, {"name": [], "template": "x"}]}, "chat_template/1"),
        ({"chat_template": [{"name": "tools", "template": "x"}]}, "no chat template"),
        ({}, "no chat template"),
        ({"chat_template": "x", "bos_token": 7}, "bos_token is no token"),
        ({"chat_template": "x", "mask_token": {"content": []}}, "mask_token is no token"),
        ({"chat_template": "x" * (5 << 20)}, "chat_template has 5242880 characters"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, config: Any, words: str) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, config=config))
    _held(lambda: tokenizer.chat([USER]), UsageError, str(tmp_path), words)


def test_templates_that_are_no_files(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(_write(tmp_path))
    place = tmp_path / "chat_template.jinja"
    place.write_bytes(b"\xff\xfe")
    _held(lambda: tokenizer.chat([USER]), UsageError, str(place), "UTF-8")
    place.unlink()
    os.mkfifo(place)
    _held(lambda: tokenizer.chat([USER]), UsageError, str(place), "not a regular file")
    place.unlink()
    place.symlink_to("/dev/zero")
    _held(lambda: tokenizer.chat([USER]), UsageError, str(place), "not a regular file")


def test_only_listed_files_are_read(tmp_path: Path) -> None:
    _write(tmp_path, template="w1", config={"chat_template": "w2"})
    assert TextTokenizer(tmp_path).chat([USER]) == [1]
    assert TextTokenizer(tmp_path, ["tokenizer.json", "chat_template.jinja"]).chat([USER]) == [1]
    assert TextTokenizer(tmp_path, {"tokenizer.json", "tokenizer_config.json"}).chat([USER]) == [2]
    tokenizer = TextTokenizer(tmp_path, ["tokenizer.json"])
    _held(lambda: tokenizer.chat([USER]), UsageError, "no chat template")
    _held(lambda: TextTokenizer(tmp_path, ["chat_template.jinja"]), UsageError, "tokenizer.json", "does not list")


# --- Tokenizers


def _of(**parts: Any) -> dict[str, Any]:
    return {**WHOLE, "model": MODELS[0], **parts}


_ADDED = {"id": 9, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def _doubling(count: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [RULES["normalizer"][0]] * count}


def _around(ids: int, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    tokens = {"w1": {"id": "w1", "ids": [1] * ids, "tokens": ["w1"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (b"", "not a tokenizer"),
        (b"\xff" * 100, "not a tokenizer"),
        (b"[" * 10**6, "not a tokenizer"),
        ([], "not a tokenizer"),
        ({}, "not a tokenizer"),
        (_of(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}), "not a tokenizer"),
        (_of(model={"type": "Unigram", "unk_id": 9, "vocab": []}), "not a tokenizer"),
        (_of(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), "not a tokenizer"),
        (_of(normalizer=_doubling(40)), "1.1e+12 times as long"),
        (_of(normalizer=_doubling(300)), "300 rules"),
        # Reading this file runs its rules on the token that it adds, and ends the process.
        (_of(normalizer=_doubling(40), added_tokens=[{**_ADDED, "content": "a"}]), "1.1e+12 times as long"),
        (_of(normalizer={"type": "Prepend", "prepend": "a" * 2000}), "normalizer: its rules can make"),
        (_of(normalizer={"type": "Replace", "pattern": {"Regex": "a?"}, "content": "a" * 2000}), "times as long"),
        (_of(decoder={"type": "Sequence", "decoders": [RULES["decoder"][5]] * 40}), "decoder: its rules can make"),
        (_of(pre_tokenizer={"type": "Sequence", "pretokenizers": [{**RULES["pre_tokenizer"][0]}] * 40}), "pre_tokenizer"),
        (_of(post_processor=_around(1000, [{"SpecialToken": {"id": "w1", "type_id": 0}}] * 1000)), "1000000 special tokens"),
        (_of(post_processor=_around(1, [{"Sequence": {"id": "A", "type_id": 0}}] * 1000)), "1000 copies of the text"),
    ],
)
def test_tokenizers_that_are_refused(tmp_path: Path, tokenizer: Any, words: str) -> None:
    _held(lambda: TextTokenizer(_write(tmp_path, tokenizer)), UsageError, "tokenizer.json", words)


def test_a_tokenizer_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    _held(lambda: TextTokenizer(tmp_path), UsageError, "tokenizer.json", "not a regular file")


def test_a_text_with_an_unknown_word_and_no_token_for_it(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(_write(tmp_path, _of(model=MODELS[1])))
    _held(lambda: tokenizer.encode("what"), UsageError, "tokenizer.json", "fails on this text", "[UNK]")


def test_what_is_no_text_and_no_token(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(_write(tmp_path))
    _held(lambda: tokenizer.encode("a\ud800"), UsageError, "character 1", "surrogate")
    for tokens in ([-1], [2**32], ["w1"], [1.5]):
        _held(lambda tokens=tokens: tokenizer.decode(tokens), UsageError, "fails on these tokens")  # type: ignore[misc]
        _held(lambda tokens=tokens: tokenizer.stream().push(tokens[0]), UsageError, "fails on these tokens")  # type: ignore[misc]


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Sequence", "normalizers": [RULES["normalizer"][1], {"type": "NFC"}]}},
        {"post_processor": {**RULES["post_processor"][3], "special_tokens": {}}},
    ],
)
def test_a_library_that_panics(tmp_path: Path, parts: dict[str, Any]) -> None:
    """What its Rust code did not expect ends in an exception that is no `Exception`."""
    tokenizer = TextTokenizer(_write(tmp_path, _of(**parts)))
    _held(lambda: tokenizer.encode("w1 w2"), UsageError, "tokenizer.json", "fails on this text")


def test_a_tokenizer_that_panics_when_it_is_read(tmp_path: Path) -> None:
    tokenizer = _of(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    _held(lambda: TextTokenizer(_write(tmp_path, tokenizer)), UsageError, "tokenizer.json", "not a tokenizer")


@pytest.mark.parametrize("table", ["Sequence", "////fw==", "////fwAAAAA="])
def test_a_table_that_says_it_is_larger_than_it_is(table: str, tmp_path: Path) -> None:
    """The library makes memory for what it says: gigabytes, or the end of the process."""
    tokenizer = _of(normalizer={"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": table}]})
    _held(lambda: TextTokenizer(_write(tmp_path, tokenizer)), UsageError, "tokenizer.json", "normalizer", "bytes", "are there")


# --- Generated


@st.composite
def _tokenizers(draw: st.DrawFn) -> Any:
    """A tokenizer of any parts, as it is or with a few places changed."""
    whole: dict[str, Any] = dict(WHOLE)
    for part in RULES:
        drawn = [draw(_RULE[part]) for _ in range(draw(_UP_TO_THREE))]
        if drawn:
            whole[part] = drawn[0] if len(drawn) == 1 else {"type": "Sequence", INNER[part]: drawn}
    whole["model"] = draw(_MODEL)
    whole["added_tokens"] = [TOKEN] * draw(_BOOL)
    if draw(_UP_TO_THREE):
        whole = draw(mutated(whole))
    return whole if draw(_UP_TO_NINE) else draw(damaged(json.dumps(whole).encode()))


_UP_TO_THREE, _UP_TO_NINE, _BOOL = st.integers(0, 3), st.integers(0, 9), st.booleans()
_RULE = {part: st.sampled_from(rules) for part, rules in RULES.items()}
_MODEL = st.sampled_from(MODELS)
_TEXT = st.sampled_from(TEXTS) | st.text(max_size=30) | st.text(st.sampled_from("ab ▁w12Ġ\u0300漢"), max_size=60)
_IDS = st.sampled_from(TOKENS) | st.lists(st.integers(-1, 30), max_size=12)
_TEXT_CASES = st.tuples(_tokenizers(), _TEXT, _IDS)


def test_tokenizers(tmp_path: Path) -> None:
    """Any tokenizer, text and tokens."""

    def check(case: tuple[Any, str, list[int]]) -> None:
        tokenizer, text, tokens = case

        def use() -> None:
            opened = TextTokenizer(_write(tmp_path, tokenizer))
            hold_inner = (
                lambda: opened.decode(opened.encode(text)),
                lambda: opened.encode(text, special_tokens=False),
                lambda: opened.decode(tokens),
                lambda: [push(token) for push in (opened.stream().push,) for token in tokens],
            )
            for call in hold_inner:
                try:
                    call()
                except UsageError as error:
                    assert "tokenizer.json" in str(error)

        hold(use)

    assert fuzz("tokenizer", _TEXT_CASES, check) > 0


_NAME = st.sampled_from(
    ["messages", "m", "i", "ns", "bos_token", "loop", "range", "dict", "namespace", "lipsum", "self", "f", "x"]
)
_FILTERS = [
    "length", "tojson", "trim", "list", "first", "join", "upper", "sort", "unique", "reverse", "sum", "center",
    "wordwrap", "indent", "batch(3)", "slice(3)", "map('upper')", "map(attribute='role')", "selectattr('role')",
    "string", "int", "float", "replace('a','bb')", "default(1)", "items", "pprint", "format", "filesizeformat",
    "truncate(2)", "wordcount", "urlize", "striptags", "xmlattr", "random", "groupby('role')", "dictsort", "safe",
    "escape", "round", "abs", "max",
]  # fmt: skip
_LEAF = (
    _NAME
    | st.sampled_from(
        ["messages[0]", "m.content", "loop.index", "1", "0", "-1", "10**9", "1.5", "'a'", "''", "[]", "{}", "none"]
    )
    | st.sampled_from(["range(9)", "range(10**5)", "'a'*10**6", "''.join", "''.__class__", "cycler(1,2)", "f(1)", "caller()"])
)
_EXPRESSION = st.recursive(
    _LEAF,
    lambda inner: (
        st.builds("({}|{})".format, inner, st.sampled_from(_FILTERS))
        | st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "and", "or", "is"]),
            inner,
        )
        | st.builds("{}[{}]".format, inner, inner)
        | st.builds("{}({})".format, inner, inner)
        | st.builds("[{}, {}]".format, inner, inner)
        | st.builds("{{'k': {}}}".format, inner)
        | st.builds("({} if {} else {})".format, inner, inner, inner)
        | st.builds(
            "{}.{}".format, inner, st.sampled_from(["k", "items()", "format(1)", "__init__", "x", "append(1)", "split()"])
        )
    ),
    max_leaves=6,
)
_STATEMENT = st.recursive(
    st.text("ab\n{}%# ", max_size=5)
    | st.builds("{{{{ {} }}}}".format, _EXPRESSION)
    | st.builds("{{% set ns.x = {} %}}".format, _EXPRESSION)
    | st.builds("{{%- set x = {} -%}}".format, _EXPRESSION)
    | st.sampled_from(
        ["{% break %}", "{% continue %}", "{% include x %}", "{% do x %}", "{# x #}", "{% set ns = namespace(x='a') %}"]
    ),
    lambda inner: (
        st.builds("{{% for m in {} %}}{}{}{{% endfor %}}".format, _EXPRESSION, inner, inner)
        | st.builds("{{% for i in range(99999) %}}{}{{% endfor %}}".format, inner)
        | st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, _EXPRESSION, inner, inner)
        | st.builds("{{% macro f(x) %}}{}{{% endmacro %}}{}".format, inner, inner)
        | st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner)
        | st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(_FILTERS), inner)
        | st.builds("{{% block b %}}{}{{% endblock %}}".format, inner)
        | st.builds("{{% call(x) f(1) %}}{}{{% endcall %}}".format, inner)
        | st.builds("{}{}".format, inner, inner)
    ),
    max_leaves=8,
)
_MESSAGES = st.just([USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) | st.lists(
    st.just(USER) | JSON_VALUES, max_size=3
)
_CONFIG = mutated({"bos_token": "w1", "eos_token": {"content": "w2"}, "chat_template": [{"name": "default", "template": "w3"}]})
_CHATS = st.tuples(_STATEMENT | st.text(max_size=20) | st.none(), _MESSAGES, _CONFIG)


def test_templates(tmp_path: Path) -> None:
    """Any template, conversation and configuration."""
    folder = _write(tmp_path)
    place = folder / "chat_template.jinja"

    def check(case: tuple[str | None, Any, Any]) -> None:
        template, messages, config = case
        place.unlink(missing_ok=True)
        tokenizer = TextTokenizer(_write(tmp_path, template=template, config=config))
        hold(lambda: tokenizer.chat(messages))

    assert fuzz("chat template", _CHATS, check, chunk=10) > 0
