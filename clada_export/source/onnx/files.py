"""Read ONNX models that others wrote: which file, whether it is whole, and whether its weights are where they may be."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import set_base_dir

from clada_export.errors import UsageError
from clada_export.foreign import ONNX, reading
from clada_export.source.onnx.check import check_model
from clada_export.source.onnx.message import read_message
from clada_export.source.weight_files import SAFETENSORS, has_weights

SUFFIX = ".onnx"
STORED = "clada.stored"
_INNER = "onnx"
"""Where repositories of the Hub that have other formats too keep their ONNX models."""
_DESCRIBE = ("config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json")


def is_onnx(place: str | Path) -> bool:
    """Whether a place is an `.onnx` file, or a folder that holds one and no safetensors beside it."""
    path = Path(place)
    if not path.is_dir():
        return path.suffix == SUFFIX
    return bool(_models(path)) and not has_weights(path, SAFETENSORS)


def companions(path: Path) -> Path:
    """The folder of a model file's configuration and tokenizer: its own or, where that is the Hub's `onnx/`, the one above."""
    folder = path.parent
    described = any((folder / name).is_file() for name in _DESCRIBE)
    above = folder.name == _INNER and not described and (folder.parent / _DESCRIBE[0]).is_file()
    return folder.parent if above else folder


def _models(folder: Path) -> list[Path]:
    """The model files of a folder or, if it has none, of `onnx/` in it."""
    return sorted(folder.glob(f"*{SUFFIX}")) or sorted((folder / _INNER).glob(f"*{SUFFIX}"))


def locate_onnx(place: str | Path) -> Path:
    """The model file of a place.

    Raises:
        UsageError: there is none, or a folder holds several.
    """
    path = Path(place)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{path} is neither a file nor a folder")
    found = _models(path)
    if not found:
        raise UsageError(f"{path} has no {SUFFIX} file")
    if len(found) > 1:
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise UsageError(f"{path} has {len(found)} ONNX models ({names}); name the one that you mean, like {found[0]}")
    return found[0]


def read_onnx(path: Path) -> ir.Model:
    """Read a model and check that it is whole. Weights in other files are looked for, and not read.

    Its `meta` has, as `STORED`, how many numbers its tensors hold: what sizes are held against.

    Raises:
        UsageError: the file is damaged or is no ONNX model, or weights are missing, too short, or outside the model's folder.
        UnsupportedModelError: it has sparse tensors, or functions that come to very many nodes.
    """
    message = read_message(path)
    stored = check_model(message, path)
    with reading(ONNX, path):
        model = ir.from_proto(message)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        # An empty one would be the current folder all the same.
        set_base_dir(graph, path.parent)
    model.meta[STORED] = stored
    return model
