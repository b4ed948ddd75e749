"""The weight files of a model folder: which there are, and whether they are whole. Nothing here loads a weight."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.files.json_files import read_json
from clada_export.source.config_file import Stored

SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"
_INDEX = ".index.json"
_DISTRIBUTED = ".metadata"
"""Where it lies, transformers reads pickled shards instead of the safetensors."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def check_config_file(folder: Path) -> None:
    """Look at the folder's config.json before transformers does.

    Raises:
        UsageError: no folder of a model, or a config that is no JSON object.
        UnsupportedModelError: an adapter, or weights that are quantised already.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise UsageError(f"{folder}: the folder is empty; it should hold config.json and {SAFETENSORS}")
    if "adapter_config.json" in names:
        raise UnsupportedModelError(f"{folder}: this is an adapter (adapter_config.json); merge it into its base model first")
    if "config.json" not in names:
        gguf = [name for name in names if name.endswith(".gguf")]
        hint = f"; to load the GGUF file give its path: {folder / gguf[0]}" if gguf else f"; it holds {', '.join(names[:5])}"
        raise UsageError(f"{folder}: no config.json in the folder{hint}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UsageError(f"{folder / 'config.json'}: a JSON object is wanted, and this is {type(config).__name__}")
    if (folder / _DISTRIBUTED).exists():
        raise UsageError(f"{folder}: this is a checkpoint of a distributed training run ({_DISTRIBUTED}); save the model first")
    quantised = config.get("quantization_config") or next(
        (part["quantization_config"] for part in config.values() if isinstance(part, dict) and part.get("quantization_config")),
        None,
    )
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: quantization_config: its weights are quantised ({method}); give the original"
        )


def has_weights(folder: Path, stem: str) -> bool:
    """Whether the folder has weights called `stem`, in one file or as an index of shards."""
    return (folder / stem).is_file() or (folder / (stem + _INDEX)).is_file()


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files that transformers will read, in order.

    Raises:
        UsageError: none, only pickled ones that are not allowed, or an index that names what is not there.
    """
    if has_weights(folder, SAFETENSORS):
        return _shards(folder, SAFETENSORS)
    others = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((*PICKLE_SUFFIXES, ".safetensors")))
    if has_weights(folder, _PICKLE):
        if allow_pickle:
            return _shards(folder, _PICKLE)
        found = ", ".join(others) or _PICKLE + _INDEX
        raise UsageError(
            f"{folder}: its weights are pickled ({found}), and unpickling can run code; convert them to safetensors, "
            "or allow pickled weights if you trust their author (--allow-pickle)"
        )
    found = f"; found {', '.join(others[:5])}" if others else ""
    raise UsageError(f"{folder}: no weights: neither {SAFETENSORS} nor {SAFETENSORS}{_INDEX} is there{found}")


def _shards(folder: Path, stem: str) -> list[Path]:
    if (folder / stem).is_file():
        return [folder / stem]
    index = folder / (stem + _INDEX)
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: weight_map: a JSON object of tensor names and file names is wanted")
    shards = []
    for name in sorted({str(file) for file in weight_map.values()}):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UsageError(f"{index}: weight_map: {name!r} is not a file name in this folder")
        if not (folder / name).is_file():
            raise UsageError(f"{index}: weight_map: the file {name!r} is not in the folder; download it again")
        shards.append(folder / name)
    return shards


def check_safetensors(files: list[Path]) -> tuple[str, Stored]:
    """Open every header (that checks the length of the file too).

    Returns:
        The type that most weights are stored in, and how much there is.

    Raises:
        UsageError: a damaged or empty file.
        UnsupportedModelError: a type that is not a plain float.
    """
    elements: Counter[str] = Counter()
    shapes: list[list[int]] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.offset_keys():
                    part = stream.get_slice(name)
                    shapes.append(part.get_shape())
                    elements[part.get_dtype()] += math.prod(shapes[-1])
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise UsageError(
                f"{file}: not a whole safetensors file ({size} bytes): {error}; it may be cut short or a Git LFS pointer, "
                "download it again"
            ) from error
    if not elements:
        raise UsageError(f"{files[0]}: holds no tensors")
    stored = elements.most_common(1)[0][0]
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if stored not in names:
        raise UnsupportedModelError(
            f"{files[0]}: its weights are stored as {stored}; float32, bfloat16 and float16 weights can be loaded"
        )
    return names[stored], Stored.of(shapes)
