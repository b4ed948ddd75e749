"""The Python code that comes with a model runs if the user says so, and in no other case."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from clada_export.source.companions import write_companions
from clada_export.source.load import load_source
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import export_tiny, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]
_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "evil"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""
_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Words", "evil.Words"],
}
_CHILD = """
import json, sys
from clada_export.errors import CladaError
from clada_export.source.load import load_source
codes = {}
for name, place in json.loads(sys.argv[1]).items():
    try:
        load_source(place)
        codes[name] = 0
    except CladaError as error:
        codes[name] = error.exit_code
with open(sys.argv[2], "w") as stream:
    json.dump(codes, stream)
"""


def _run_saying_yes(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], input="y\n" * 10_000, capture_output=True, text=True, check=False)


def _edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**value, **changes}))


def _safetensors(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


def _gguf(folder: Path) -> Path:
    folder.mkdir()
    return save_tiny_gguf(folder / "model.gguf")


def _onnx(folder: Path) -> Path:
    folder.mkdir()
    ir.save(export_tiny("llama", None), folder / "model.onnx")
    tiny_model("llama").config.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


_KINDS: dict[str, Callable[[Path], Path]] = {"folder": _safetensors, "gguf": _gguf, "onnx": _onnx}
_PLANTS: dict[str, Callable[[Path], None]] = {
    "unknown-type": lambda folder: _edit(folder / "config.json", model_type="evil", auto_map=_MAP, architectures=["Model"]),
    "known-type": lambda folder: _edit(folder / "config.json", auto_map=_MAP, _auto_class="AutoConfig"),
    "tokenizer": lambda folder: _edit(folder / "tokenizer_config.json", auto_map=_MAP, tokenizer_class="Words"),
    "old-tokenizer": lambda folder: _edit(folder / "tokenizer_config.json", auto_map=_MAP["AutoTokenizer"]),
    "generation": lambda folder: _edit(folder / "generation_config.json", custom_generate="evil", auto_map=_MAP),
    "processor": lambda folder: _edit(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.Words"}),
    "kernel": lambda folder: _edit(folder / "config.json", attn_implementation="evil/a", _attn_implementation="evil/b"),
}
_CASES = [f"{kind}-{plant}" for kind in _KINDS for plant in _PLANTS]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Models of every kind with code planted in every place: what to load, and the file that the code would make."""
    made = {}
    for kind, save in _KINDS.items():
        for plant, edit in _PLANTS.items():
            folder = tmp_path_factory.mktemp("planted") / f"{kind}-{plant}"
            place, marker = save(folder), folder.parent / "ran"
            (folder / "evil.py").write_text(_CODE.format(marker=str(marker)))
            edit(folder)
            made[folder.name] = place, marker
    return made


@pytest.fixture(scope="module")
def codes(planted: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Exit codes of loading all of them in a process whose stdin says yes to everything."""
    out = tmp_path_factory.mktemp("codes") / "codes.json"
    places = json.dumps({name: str(place) for name, (place, _) in planted.items()})
    child = _run_saying_yes("-c", _CHILD, places, str(out))
    assert child.returncode == 0, child.stderr
    assert "[y/N]" not in child.stdout + child.stderr
    found: dict[str, int] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", _CASES)
def test_code_of_a_model_does_not_run_when_stdin_says_yes(
    case: str, planted: dict[str, tuple[Path, Path]], codes: dict[str, int]
) -> None:
    assert not planted[case][1].exists()
    # Of an unknown type there is no model without its code. A GGUF file is read alone, and an ONNX graph runs as it is.
    refused = {"folder-unknown-type": 3, "onnx-unknown-type": 2}
    assert codes[case] == refused.get(case, 0)


@pytest.mark.parametrize("case", ["folder-unknown-type", "onnx-unknown-type"])
def test_the_command_line_does_not_ask(case: str, planted: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    place, marker = planted[case]
    code = "import sys; from clada_export.cli import main_export; sys.exit(main_export())"
    child = _run_saying_yes("-c", code, str(place), "--target", "ort", "-o", str(tmp_path / "out"))
    assert child.returncode in (2, 3)
    assert str(place if place.is_dir() else place.parent) in child.stderr
    assert "[y/N]" not in child.stdout + child.stderr
    assert not marker.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", [case for case in _CASES if "unknown" not in case])
def test_what_is_written_of_a_model_names_no_code(case: str, planted: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source = load_source(str(planted[case][0]))
    write_companions(source.decoder, source.tokenizer, tmp_path, source.name)
    written = sorted(tmp_path.rglob("*"))
    assert "config.json" in {file.name for file in written}
    assert not [file for file in written if file.suffix == ".py"]
    for file in written:
        assert "auto_map" not in file.read_text(encoding="utf-8")
        assert "evil" not in file.read_text(encoding="utf-8")


def test_a_tokenizer_with_code_is_left_out_with_a_reason(planted: dict[str, tuple[Path, Path]]) -> None:
    for kind in ("folder", "onnx"):
        source = load_source(str(planted[f"{kind}-tokenizer"][0]))
        assert source.tokenizer is None
        assert "the tokenizer comes with Python code" in source.warnings[0]
        assert "--trust-remote-code" in source.warnings[0]


def test_code_runs_where_the_user_says_so(tmp_path: Path) -> None:
    folder = _safetensors(tmp_path / "model")
    (folder / "evil.py").write_text(_CODE.format(marker=str(tmp_path / "ran")))
    _PLANTS["unknown-type"](folder)
    source = load_source(str(folder), trust_remote_code=True)
    assert type(source.decoder.module).__name__ == "Model"
    assert (tmp_path / "ran").exists()


# --- The door

_DOOR = "clada_export/source/pretrained.py"
_LOADERS = {"from_pretrained", "from_config", "_from_config", "get_class_from_dynamic_module", "cached_file", "pipeline"}
_ALLOWED = {
    # Models of settings that the file has itself, on the way to no stranger's.
    ("benchmarks/tiny_decoders.py", "from_config"),
    ("benchmarks/passes.py", "from_config"),
    ("benchmarks/passes.py", "AutoConfig"),
    # As keys of the door: which class loads a model, never a call.
    ("clada_export/source/causal_lm.py", "AutoModelForCausalLM"),
    ("clada_export/price/outline.py", "AutoModelForCausalLM"),
    ("benchmarks/tiny_decoders.py", "AutoModelForCausalLM"),
    ("benchmarks/passes.py", "AutoModelForCausalLM"),
}


def _uses(tree: ast.Module) -> Iterator[str]:
    """What of transformers can load a model, tokenizer or configuration in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _loads(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in _LOADERS - {"pipeline"}:
            yield str(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            yield from (alias.name for alias in node.names if _loads(alias.name))


def _loads(name: str) -> bool:
    return name in _LOADERS or (name.startswith("Auto") and name[4:5].isupper())


def test_every_load_goes_through_the_door() -> None:
    files = [file for part in ("clada_export", "graph_passes", "samples", "benchmarks") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    found = {
        (file.relative_to(ROOT).as_posix(), use) for file in files for use in _uses(ast.parse(file.read_text(encoding="utf-8")))
    }
    inside = {use for file, use in found if file == _DOOR}
    assert {"from_pretrained", "AutoConfig", "AutoTokenizer"} <= inside
    assert {(file, use) for file, use in found if file != _DOOR} <= _ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import AutoModel\n",
        "import transformers\ntransformers.AutoTokenizer\n",
        "from transformers import pipeline as p\np('text-generation')\n",
        "from transformers import LlamaConfig\nLlamaConfig.from_pretrained('x')\n",
        "getattr(kind, 'from_pretrained')('x')\n",
        "loader.from_config(config)\n",
    ],
)
def test_a_load_beside_the_door_is_seen(code: str) -> None:
    assert list(_uses(ast.parse(code)))


def test_the_door_always_says_whether_to_trust() -> None:
    tree = ast.parse((ROOT / _DOOR).read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOADERS
    ]
    assert len(calls) == 5
    for call in calls:
        names = {keyword.arg for keyword in call.keywords}
        owner = ast.unparse(call.func)
        # A generation configuration has no code of its own, and transformers no argument for it.
        assert "trust_remote_code" in names or owner == "GenerationConfig.from_pretrained", owner
        assert "local_files_only" in names or owner.endswith("from_config"), owner
