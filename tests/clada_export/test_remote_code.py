"""Python code that comes with a model runs only if the user says so, whatever stdin says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import export_tiny, tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "clada_export" / "pretrained.py"

EVIL = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = "x"
class M(LlamaForCausalLM):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}

EXPORT = """
import sys
from pathlib import Path
from clada_export.errors import CladaError
from clada_export.companions import write_companions
from clada_export.source import load_source

for place in sys.argv[1:]:
    try:
        source = load_source(place)
    except CladaError as error:
        print(f"{place}: {type(error).__name__}: {error}")
        continue
    out = Path(place).with_suffix(".written")
    out.mkdir()
    model = source.model
    write_companions(model.config, model.generation_config, source.tokenizer, out, place)
    print(f"{place}: loaded")
"""


def _add(path: Path, **entries: object) -> None:
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**value, **entries}))


def _poison(folder: Path, what: str, file: str) -> None:
    """Put code into a model's folder, and its name into a file of it."""
    (folder / "evil.py").write_text(EVIL)
    if what == "unknown":
        _add(folder / file, model_type="x", auto_map=AUTO_MAP)
    else:
        _add(folder / file, auto_map=AUTO_MAP, **({"tokenizer_class": "T"} if file == "tokenizer_config.json" else {}))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of each kind for each file that can name code."""
    root = tmp_path_factory.mktemp("poisoned")
    made = []
    graph = export_tiny("llama")
    for kind in ("folder", "gguf", "onnx"):
        for what, file in (
            ("unknown", "config.json"),
            ("known", "config.json"),
            ("known", "tokenizer_config.json"),
            ("known", "generation_config.json"),
        ):
            folder = root / f"{kind}-{what}-{file.removesuffix('.json')}"
            folder.mkdir()
            place = folder
            if kind == "folder":
                tiny_model("llama").save_pretrained(folder)
            elif kind == "gguf":
                place = save_tiny_gguf(folder / "model.gguf")
            else:
                ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
                tiny_model("llama").config.save_pretrained(folder)
            save_tiny_tokenizer(folder)
            _poison(folder, what, file)
            made.append(place)
    return made


def test_code_of_a_model_does_not_run_when_stdin_says_yes(places: list[Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *map(str, places)],
        input="y\n" * 10_000,
        env={**os.environ, "MARK": str(mark), "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), f"code of a model ran:\n{done.stdout}"
    assert "[y/N]" not in done.stdout + done.stderr
    outcomes = done.stdout.splitlines()
    assert len(outcomes) >= len(places)
    # The door is no wall: a model that transformers knows itself loads, its own code left aside.
    assert any(line.endswith("folder-known-config: loaded") for line in outcomes), done.stdout
    for place in places:
        for written in place.with_suffix(".written").rglob("*"):
            assert written.suffix != ".py", f"{written} was copied into the export"
            assert "evil" not in written.read_text(encoding="utf-8", errors="replace"), written


def test_a_model_that_needs_its_code_says_so(places: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from clada_export.cli import main_export

    assert main_export([str(places[0]), "--target", "ort", "-o", str(tmp_path / "out")]) == 3
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_loads_go_through_the_door() -> None:
    """A call that goes past it would ask on stdin again."""
    ways = {"from_pretrained", "resolve_trust_remote_code", "get_class_from_dynamic_module", "cached_file"}
    found = []
    for package in ("clada_export", "graph_passes", "samples"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == DOOR:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
                imported = [item.name for item in node.names] if isinstance(node, ast.ImportFrom) else []
                if named in ways or ways & set(imported) or {"pipeline", "AutoProcessor"} & set(imported) & _from(node):
                    found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert found == [], f"these go past {DOOR.name}"


def _from(node: ast.AST) -> set[str]:
    """What is imported, if it is from transformers."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
        return {item.name for item in node.names}
    return set()
