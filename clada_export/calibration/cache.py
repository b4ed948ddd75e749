"""What calibration computes once for a model and a text, kept on disk and found again.

Kept are the sensitivity of the layers, each method's tables with the statistics of the load, and the methods of policies that
train routers. A piece is written as soon as it is computed, so that an export that was interrupted goes on from there.

A piece's key is a sha256 over everything that it depends on: the format of this cache, the package's code, PyTorch's version,
the model's weights *as they are when calibration begins* (so that rounded or pruned weights have their own), its
configuration, the calibration windows, the seed and what the piece is of. Weights are hashed whole and not only those of the
FFNs: the activations of an FFN depend on every layer before it.

A piece is one safetensors file, written under another name and renamed. It says its key, and the sha256 of what it holds; a
file that is damaged, or is something else, is named in a warning and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

import clada_export
import graph_passes
from clada_export import __version__
from clada_export.calibration.context import MethodMaker, PolicyContext
from clada_export.calibration.selector import Selectors
from clada_export.calibration.statistics import CalibrationStatistics, LayerTable
from clada_export.decoder.decoder import Decoder
from clada_export.errors import CladaError, UsageError
from clada_export.files.stamps import cache_home
from clada_export.load.signal import LoadSignal
from clada_export.plan.layer import LayerPlan
from clada_export.plan.method import Method
from clada_export.plan.tensors import arrays_digest, named_arrays, tensors_digest, tensors_of_layers

FORMAT = "clada-export calibration cache 1"
OFF = "none"
"""What `--calibration-cache` takes for no cache."""

Warn = Callable[[str], None]
T = TypeVar("T")


def default_cache_folder() -> Path:
    """`cache_home`; a user without a home has to name a folder, or `none`.

    Raises:
        UsageError: there is no home.
    """
    home = cache_home()
    if home is None:
        raise UsageError("there is no home folder to keep a cache in; give --calibration-cache DIR, or none for no cache")
    return home


def parse_cache_folder(text: str | None) -> Path | None:
    """What `--calibration-cache` means: a folder, `none` for no cache, nothing for the default.

    Raises:
        UsageError: it is a file.
    """
    if text is None:
        return default_cache_folder()
    if text == OFF:
        return None
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--calibration-cache {text}: it is a file; give a folder, or none for no cache")
    return folder


@dataclass(frozen=True)
class Piece:
    """What one file holds: arrays by name, and a JSON value."""

    arrays: dict[str, np.ndarray]
    value: Any = None

    @property
    def digest(self) -> str:
        """The sha256 of all of it."""
        return hashlib.sha256(f"{arrays_digest(self.arrays)} {_canonical(self.value)}".encode()).hexdigest()


class PieceStore:
    """Pieces in a folder, by key.

    Args:
        folder: made when the first piece is written; None keeps nothing.
        warn: told about files that can't be used or written; the default is Python's `warnings.warn`.
    """

    def __init__(self, folder: Path | None, warn: Warn = warnings.warn) -> None:
        self.folder, self._warn = folder, warn
        self._writes = True

    def path(self, kind: str, key: str) -> Path:
        """The file of a piece."""
        assert self.folder is not None
        return self.folder / kind / f"{key}.safetensors"

    def get(self, kind: str, key: str) -> Piece | None:
        """The piece, or None if it is not there or can't be trusted."""
        if self.folder is None or not self.path(kind, key).is_file():
            return None
        try:
            return _read(self.path(kind, key), key)
        except (OSError, ValueError, SafetensorError) as error:
            self.reject(kind, key, str(error))
            return None

    def reject(self, kind: str, key: str, why: str) -> None:
        """Say that a piece is made again."""
        self._warn(f"calibration cache: {self.path(kind, key)} can't be used ({why}); it is made again")

    def put(self, kind: str, key: str, piece: Piece) -> None:
        """Write a piece; a folder that can't be written is named in a warning, once."""
        if self.folder is None or not self._writes:
            return
        path = self.path(kind, key)
        # Machines that share a folder may have the same process ids.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        metadata = {"format": FORMAT, "key": key, "digest": piece.digest, "value": _canonical(piece.value)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({name: np.ascontiguousarray(array) for name, array in piece.arrays.items()}, temporary, metadata)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self._writes = False
            self._warn(f"calibration cache: {path} can't be written ({error}); nothing more is kept in this run")


def _read(path: Path, key: str) -> Piece:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("key") != key:
            raise ValueError("it holds another piece than its name says")
        piece = Piece({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata.get("value", "")))  # noqa: SIM118
    if piece.digest != metadata.get("digest"):
        raise ValueError("its content does not have the digest that it was written with")
    return piece


@dataclass(frozen=True)
class CalibrationCache:
    """The pieces of one model and one text.

    `base` holds what all their keys share.
    """

    store: PieceStore = field(default_factory=lambda: PieceStore(None))
    base: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path | None, decoder: Decoder, windows: Tensor, seed: int, warn: Warn = warnings.warn
    ) -> CalibrationCache:
        """The cache for a decoder with the weights that it has now.

        Args:
            windows: int64 [N, context], the calibration text.
            seed: of everything random.
        """
        if folder is None:
            return cls()
        base = {
            "format": FORMAT,
            "code": code_digest(),
            "torch": torch.__version__,
            "weights": decoder.weights_digest(),
            "config": decoder.config.to_dict(),
            "text": arrays_digest({"windows": windows.numpy()}),
            "seed": seed,
        }
        return cls(PieceStore(folder, warn), base)

    def sensitivity(self, make: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """The sensitivity of every layer."""

        def unpack(piece: Piece) -> tuple[float, ...]:
            return tuple(piece.arrays["sensitivity"].tolist())

        def pack(value: tuple[float, ...]) -> Piece:
            return Piece({"sensitivity": np.array(value, dtype=np.float64)})

        return self._kept("sensitivity", {}, unpack, pack, make)

    def statistics(
        self, selectors: Selectors, prompt: int, collect: Callable[[Selectors], CalibrationStatistics]
    ) -> CalibrationStatistics:
        """The tables of every method, and the statistics of the load.

        Args:
            prompt: tokens of a window that are its prompt.
            collect: makes those that are missing, in one pass over the text.
        """
        keys = [self._key("statistics", {"prompt": prompt, **what_selects(method)}) for method in selectors.methods]
        known = [self._find("statistics", key, _unpack_statistics) for key in keys]
        missing = [index for index, item in enumerate(known) if item is None]
        if missing:
            wanted = tuple(selectors.methods[index] for index in missing)
            made = collect(selectors if len(missing) == len(known) else Selectors(selectors.ffns, wanted))
            for index, tables in zip(missing, made.tables, strict=True):
                known[index] = CalibrationStatistics((tables,), made.load)
                self.store.put("statistics", keys[index], _pack_statistics(tables, made.load))
        found = [item for item in known if item is not None]
        return CalibrationStatistics(tuple(item.tables[0] for item in found), found[0].load)

    def methods(self, maker: MethodMaker, context: PolicyContext) -> tuple[Method, ...]:
        """The methods of a policy; only those that train routers are kept, others cost nothing to make."""
        if not maker.trained:
            return maker.methods(context)
        what = {**maker.made_with, "sparsity": context.sparsity, "prompt": context.prompt, "seed": context.seed}
        return self._kept("routers", what, _unpack_methods, _pack_methods, lambda: maker.methods(context))

    def of_weights(self, decoder: Decoder) -> CalibrationCache:
        """The same for a decoder whose weights have changed since."""
        return self if self.store.folder is None else replace(self, base={**self.base, "weights": decoder.weights_digest()})

    def arrays(self, kind: str, what: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
        """Arrays of these shapes that were kept under these JSON values, or None."""

        def unpack(piece: Piece) -> dict[str, np.ndarray]:
            for name, shape in shapes.items():
                if piece.arrays[name].shape != shape:
                    raise ValueError(f"{name!r} has shape {piece.arrays[name].shape}, not {shape}")
            return piece.arrays

        return None if self.store.folder is None else self._find(kind, self._key(kind, what), unpack)

    def keep_arrays(self, kind: str, what: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under JSON values, which with what all keys share say all that the arrays depend on."""
        if self.store.folder is not None:
            self.store.put(kind, self._key(kind, what), Piece(dict(arrays)))

    def _key(self, kind: str, what: Mapping[str, Any]) -> str:
        return hashlib.sha256(_canonical({**self.base, "kind": kind, "what": what}, default=str).encode()).hexdigest()

    def _find(self, kind: str, key: str, unpack: Callable[[Piece], T]) -> T | None:
        piece = self.store.get(kind, key)
        if piece is None:
            return None
        try:
            return unpack(piece)
        except (KeyError, TypeError, ValueError, CladaError) as error:
            self.store.reject(kind, key, f"{type(error).__name__}: {error}")
            return None

    def _kept(
        self,
        kind: str,
        what: Mapping[str, Any],
        unpack: Callable[[Piece], T],
        pack: Callable[[T], Piece],
        make: Callable[[], T],
    ) -> T:
        key = self._key(kind, what)
        found = self._find(kind, key, unpack)
        if found is not None:
            return found
        made = make()
        self.store.put(kind, key, pack(made))
        return made


@lru_cache(maxsize=1)
def code_digest() -> str:
    """The sha256 of this package's Python files: what other code computed is not taken for what this code would."""
    digest = hashlib.sha256(__version__.encode())
    for package in (Path(clada_export.__file__).parent, Path(graph_passes.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _canonical(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    return json.dumps(value, sort_keys=True, default=default)


def what_selects(method: Method) -> dict[str, Any]:
    """Of a method what its tables depend on; its label and how it was trained do not matter."""
    return {
        "score": method.score,
        "rule": method.rule,
        "layers": [asdict(layer) for layer in method.layers],
        "arrays": tensors_digest(method.arrays),
    }


_TABLE = tuple(item.name for item in fields(LayerTable))


def _pack_statistics(tables: Sequence[LayerTable], load: LoadSignal) -> Piece:
    return Piece({name: np.stack([getattr(table, name) for table in tables]) for name in _TABLE}, asdict(load))


def _unpack_statistics(piece: Piece) -> CalibrationStatistics:
    columns = [piece.arrays[name] for name in _TABLE]
    return CalibrationStatistics((tuple(LayerTable(*rows) for rows in zip(*columns, strict=True)),), LoadSignal(**piece.value))


def _pack_methods(methods: Sequence[Method]) -> Piece:
    # Variants of a policy often share their routers, which are the large part.
    digests = [tensors_digest(method.arrays) for method in methods]
    sources = [digests.index(digest) for digest in digests]
    arrays = {f"{index}.{name}": array for index in set(sources) for name, array in named_arrays(methods[index].arrays).items()}
    described = [asdict(replace(method, arrays={})) for method in methods]
    return Piece(arrays, [{"method": item, "arrays": source} for item, source in zip(described, sources, strict=True)])


def _unpack_methods(piece: Piece) -> tuple[Method, ...]:
    return tuple(_unpack_method(piece, value["method"], value["arrays"]) for value in piece.value)


def _unpack_method(piece: Piece, value: Mapping[str, Any], source: int) -> Method:
    prefix = f"{source}."
    named = {name.removeprefix(prefix): array for name, array in piece.arrays.items() if name.startswith(prefix)}
    layers = tuple(LayerPlan.from_dict(layer) for layer in value["layers"])
    arrays = tensors_of_layers("calibration cache", layers, named)
    return Method(**{**value, "layers": layers, "arrays": arrays, "allocations": tuple(value["allocations"])})
