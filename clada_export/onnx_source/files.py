"""Read ONNX models that others wrote: which file, whether it is whole, and whether its weights are where they may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx_ir as ir

from clada_export.errors import UsageError
from clada_export.weight_files import SAFETENSORS, has_weights

SUFFIX = ".onnx"
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

    Raises:
        UsageError: the file is damaged or is no ONNX model, or weights are missing, too short, or outside the model's folder.
    """
    try:
        # The directory part is where external data are looked for; an empty one would be the current folder all the same.
        model = ir.load(path)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror or error}") from error
    # The protobuf library and onnx-ir raise many kinds of errors on bytes that are no model.
    except Exception as error:
        raise UsageError(f"{path} is damaged, or is no ONNX model: {_first_line(error)}") from error
    if model.graph.num_nodes() == 0 or not model.graph.outputs:
        raise UsageError(f"{path} is damaged, or is no ONNX model: it has no nodes or no outputs")
    folder = path.parent
    for tensor in _external(model):
        _check_external(path, folder, tensor)
    return model


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    graphs = (model.graph, *model.graph.subgraphs(), *(function.graph for function in model.functions.values()))
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    nodes = (*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes()))
    for node in nodes:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                yield attribute.value


def _check_external(path: Path, folder: Path, tensor: ir.ExternalTensor) -> None:
    """Raise UsageError unless the tensor's bytes lie in a plain file in the model's folder.

    A model is data from somewhere: it must not make us read, and write into an engine, a file of its choice.
    """
    location, name = str(tensor.location), tensor.name
    where = f"{path}: weight {name!r} lies in {location!r}"
    pure = PurePosixPath(location)
    if not location or pure.is_absolute() or PureWindowsPath(location).drive or ".." in (*pure.parts, *location.split("\\")):
        raise UsageError(f"{where}, which is not a path inside the model's folder")
    file = folder
    for part in pure.parts:
        file = file / part
        if file.is_symlink():
            raise UsageError(f"{where}, and {file.name!r} is a symbolic link; put the file itself there")
    if not file.is_file():
        raise UsageError(f"{where}, and there is no such file in {folder}")
    size, start, length = file.stat().st_size, tensor.offset or 0, tensor.length
    if length is not None and length != tensor.nbytes:
        raise UsageError(f"{where} with {length} bytes; its shape and type need {tensor.nbytes}")
    if start < 0 or start + tensor.nbytes > size:
        raise UsageError(f"{where} at bytes {start} to {start + tensor.nbytes}, and the file has {size}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
