"""Models of strangers: configurations, weights, tokenizers, model cards, through loading and what an export writes of them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from clada_export.calibration.text import load_calibration_data
from clada_export.cli.inspection import inspect_model
from clada_export.source.companions import write_companions
from clada_export.source.config_file import Stored, check_counts, check_size
from clada_export.source.load import load_source
from clada_export.source.pretrained import load_config, model_without_memory
from tests.fuzz.harness import JSON_VALUES, NUMBERS, damaged, fuzz, hold, mutated
from tests.moe_checkpoints import write_llama_moe
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import tiny_config
from tests.tiny_tokenizer import save_tiny_tokenizer

_SMALL = {"vocab_size": 250, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4}
_CARD = "---\nlicense: mit\ntags: [a, b]\nmodel-index:\n- name: x\n---\n# A model\n"
_TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 " * 8

Files = dict[str, bytes]


@functools.cache
def _folder_files() -> Files:
    """A Llama of one layer with everything that lies beside one."""
    return _made(lambda folder: _save_llama(folder))


def _save_llama(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", **_SMALL))
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2], pad_token_id=0).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"unk_token": {"content": "w0", "lstrip": false}, "eos_token": "w2"}')
    (folder / "added_tokens.json").write_text('{"w249": 249}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text(_CARD)


@functools.cache
def _mixture_files() -> Files:
    return _made(lambda folder: write_llama_moe(folder))


@functools.cache
def _gguf_files() -> Files:
    return _made(lambda folder: save_tiny_gguf(folder / "model.gguf"))


def _made(save: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as name:
        save(Path(name))
        return {file.name: file.read_bytes() for file in sorted(Path(name).iterdir())}


def _put(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def _use(place: Path, out: Path) -> None:
    """Load a model, tokenise calibration text, and write what an export has of it."""
    source = load_source(str(place))
    text = out.with_suffix(".txt")
    text.write_text(_TEXT)
    if source.tokenizer is not None:
        load_calibration_data(source.tokenizer, 250, text_file=text, context=8)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_companions(source.decoder, source.tokenizer, out, source.name)
    assert not list(out.glob("*.py"))


# --- What was found


def _json(files: Files, name: str, **changes: Any) -> Files:
    value = json.loads(files[name]) if name in files else {}
    return {**files, name: json.dumps({**value, **changes}).encode()}


@pytest.mark.parametrize(
    ("name", "changes", "code", "said"),
    [
        ("config.json", {"num_hidden_layers": 1_000_000}, 2, r"num_hidden_layers is 1000000; at most"),
        ("config.json", {"num_hidden_layers": 1_000}, 2, r"num_hidden_layers is 1000, and the weights hold 12 tensors"),
        ("config.json", {"vocab_size": 10**8}, 2, r"vocab_size is 100000000, and the weights hold"),
        ("config.json", {"hidden_size": 10**9}, 2, r"hidden_size is 1000000000, and the weights hold"),
        ("config.json", {"intermediate_size": 10**12}, 2, r"intermediate_size is 1000000000000, and"),
        ("config.json", {"num_attention_heads": 10**9}, 2, r"config\.json: .*attention heads \(1000000000\)"),
        ("config.json", {"num_key_value_heads": 10**400}, 2, r"num_key_value_heads: .*309|not valid JSON"),
        ("config.json", {"head_dim": 10**15}, 2, r"head_dim is 1000000000000000, and"),
        ("config.json", {"num_labels": 10**9}, 2, r"num_labels is 1000000000; at most"),
        ("config.json", {"id2label": {str(index): "" for index in range(100_001)}}, 2, r"id2label has 100001 items"),
        ("config.json", {"layer_types": ["full_attention"] * 100_001}, 2, r"layer_types has 100001 items"),
        ("config.json", {"model_type": []}, 2, r"model_type: '\[\]' is no name of an architecture"),
        ("config.json", {"model_type": "git", "num_image_with_embedding": 10**9}, 2, r"git|modules"),
        ("config.json", {"pad_token_id": 1_000_000}, 2, r"can't build the model: .*[Pp]adding_idx"),
        ("config.json", {"dtype": "load"}, 2, r"dtype: 'load' is no type of PyTorch"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "x"}}}, 3, r"already|quantised \(x\)"),
        (
            "generation_config.json",
            {"cache_implementation": "x"},
            2,
            r"generation_config\.json: not a generation configuration",
        ),
        ("generation_config.json", {"max_new_tokens": -1}, 2, r"generation_config\.json: not a generation configuration"),
        ("generation_config.json", {"to_dict": 1}, 2, r"generation_config\.json: 'to_dict' is no setting"),
        ("generation_config.json", {"num_beams": 10**30}, 2, r"generation_config\.json: num_beams is a number of 31 digits"),
    ],
)
def test_what_a_file_asks_for_is_held_to_the_weights(
    tmp_path: Path, name: str, changes: dict[str, Any], code: int, said: str
) -> None:
    place = _put(tmp_path / "model", _json(_folder_files(), name, **changes))
    error = hold(lambda: load_source(str(place)))
    assert error is not None
    assert error.exit_code == code
    assert re.search(said, str(error)), str(error)
    assert str(place) in str(error)


def test_a_card_that_is_no_yaml_stops_nothing(tmp_path: Path) -> None:
    for card in (
        b"---\nlicense: [\n---\n",
        b"---\n- 1\n---\n",
        b"\xff\xfe",
        b"---\nlicense: {a: 1}\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
    ):
        source = load_source(str(_put(tmp_path / "model", {**_folder_files(), "README.md": card})))
        assert source.license is None
        assert len(source.warnings) == (0 if b"{a" in card else 1), (card[:20], source.warnings)
        assert all("README.md" in warning for warning in source.warnings)
    assert load_source(str(_put(tmp_path / "model", _folder_files()))).license == "mit"


def test_a_tokenizer_that_makes_no_sense_is_left_out(tmp_path: Path) -> None:
    for files in (
        {**_folder_files(), "tokenizer.json": b'{"version": "1.0"}'},
        _json(_folder_files(), "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 2**32}, "unk_token": "a"}),
        _json(_folder_files(), "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}),
        _json(_folder_files(), "tokenizer.json", normalizer=_TWICE_FORTY_TIMES),
        {**_folder_files(), "tokenizer_config.json": b"[]"},
        {**_folder_files(), "added_tokens.json": b"[" * 100_000},
        _json(_folder_files(), "tokenizer_config.json", tokenizer_class=["x"]),
        _json(_folder_files(), "tokenizer_config.json", save_pretrained=1),
    ):
        source = load_source(str(_put(tmp_path / "model", files)))
        assert source.tokenizer is None
        assert "the tokenizer can't be loaded" in source.warnings[0]


def test_what_lies_around_is_not_opened(tmp_path: Path) -> None:
    place = _put(tmp_path / "model", _folder_files())
    for name in ("README.md", "generation_config.json", "chat_template.jinja", "added_tokens.json"):
        (place / name).unlink()
        os.mkfifo(place / name)
    (place / "special_tokens_map.json").unlink()
    (place / "special_tokens_map.json").mkdir()
    (place / "more").symlink_to(place / "more")
    assert load_source(str(place)).tokenizer is not None
    for name in ("config.json", "model.safetensors"):
        (place / name).unlink()
        os.mkfifo(place / name)
        assert hold(lambda: load_source(str(place))) is not None
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("pipe.gguf", "pipe.onnx", "model/more", "x" * 300, "a\0b"):
        assert hold(lambda name=name: load_source(str(tmp_path / name))) is not None  # type: ignore[misc]
    assert hold(lambda: load_source("~nobody-of-that-name/model")) is not None


# --- Generated


_TWICE_FORTY_TIMES = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "w"}, "content": "ww"} for _ in range(40)],
}
_CONFIGS = {
    "llama": tiny_config("llama", **_SMALL).to_diff_dict(),
    **{kind: tiny_config(kind).to_diff_dict() for kind in ("gemma3_text", "gpt2", "mixtral", "opt", "phi3")},
}
_METHODS = ("to_dict", "get_text_config", "sub_configs", "attribute_map", "_auto_class", "auto_map", "attn_implementation")


@st.composite
def _configs(draw: st.DrawFn, value: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a few of its own settings changed, or others added."""
    result = dict(value)
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.sampled_from(["number", "number", "any", "mutated", "method", "part"])):
            case "number":
                result[draw(st.sampled_from(sorted(result)))] = draw(st.sampled_from(NUMBERS))
            case "any":
                result[draw(st.sampled_from(sorted(result)))] = draw(JSON_VALUES)
            case "method":
                result[draw(st.sampled_from(_METHODS))] = draw(JSON_VALUES)
            case "part":
                result[draw(st.sampled_from(["text_config", "rope_scaling", "rope_parameters"]))] = draw(mutated(value))
            case _:
                changed = draw(mutated(result))
                result = changed if isinstance(changed, dict) else result
    return result


def test_configurations(tmp_path: Path) -> None:
    """Any config.json, up to the model without memory: the part that is quick."""

    def check(value: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(value))

        def build() -> None:
            config = load_config(tmp_path)
            check_counts(config, stored, "config.json")
            loader = AutoModelForCausalLM
            check_size(model_without_memory(loader, config, place="config.json", most=stored.most_parts), stored, "config.json")

        hold(build)

    stored = Stored(tensors=300, elements=10**6, longest=250)
    cases = st.sampled_from(sorted(_CONFIGS)).flatmap(lambda kind: _configs(_CONFIGS[kind])) | JSON_VALUES
    assert fuzz("configuration", cases, check) > 0


def _parsed(name: str, files: Callable[[], Files] = _folder_files) -> st.SearchStrategy[Files]:
    """The files with one of JSON changed by its values, or by its bytes."""
    data = files()[name]
    values = mutated(json.loads(data)).map(lambda value: json.dumps(value).encode())
    return (values | values | damaged(data)).map(lambda changed: {**files(), name: changed})


def _weights(data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with its header changed, as JSON or by its bytes."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]

    def whole(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return struct.pack("<Q", len(text)) + text + rest

    return mutated(header).map(whole) | damaged(data[: 8 + size]).map(lambda changed: changed + rest) | damaged(data)


def _cards() -> st.SearchStrategy[Files]:
    text = st.text(max_size=30).map(lambda inner: f"---\n{inner}\n---\n".encode())
    return (damaged(_CARD.encode()) | text).map(lambda changed: {**_folder_files(), "README.md": changed})


def _folders() -> st.SearchStrategy[Files]:
    weights = _folder_files()["model.safetensors"]
    config = json.loads(_folder_files()["config.json"])
    mixture = _mixture_files()
    return st.one_of(
        _configs(config).map(lambda value: {**_folder_files(), "config.json": json.dumps(value).encode()}),
        _parsed("config.json"),
        _parsed("generation_config.json"),
        _parsed("tokenizer.json"),
        _parsed("tokenizer.json"),
        _parsed("tokenizer_config.json"),
        _parsed("special_tokens_map.json"),
        _parsed("added_tokens.json"),
        _cards(),
        _weights(weights).map(lambda changed: {**_folder_files(), "model.safetensors": changed}),
        _parsed("config.json", _mixture_files),
        _weights(mixture["model.safetensors"]).map(lambda changed: {**mixture, "model.safetensors": changed}),
    )


def test_folders(tmp_path: Path) -> None:
    """A model's folder with one of its files changed."""

    def check(files: Files) -> None:
        place = _put(tmp_path / "model", files)
        error = hold(lambda: _use(place, tmp_path / "out"))
        assert error is None or "model" in str(error) or "out.txt" in str(error)
        hold(lambda: inspect_model(str(place)))

    assert fuzz("model folder", _folders(), check, chunk=20) > 0


def test_gguf_files(tmp_path: Path) -> None:
    """A GGUF file with its header changed."""
    whole = _gguf_files()["model.gguf"]
    header = whole.index(b"token_embd.weight") + 1000

    def check(data: bytes) -> None:
        (tmp_path / "model.gguf").write_bytes(data)
        error = hold(lambda: _use(tmp_path / "model.gguf", tmp_path / "out"))
        assert error is None or "model" in str(error)
        hold(lambda: inspect_model(str(tmp_path / "model.gguf")))

    cases = damaged(whole[:header]).map(lambda changed: changed + whole[header:]) | damaged(whole)
    assert fuzz("GGUF file", cases, check, chunk=20) > 0
