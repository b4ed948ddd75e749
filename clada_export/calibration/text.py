"""Calibration text: where it comes from and how it becomes token windows."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clada_export.errors import UsageError
from clada_export.files.json_files import read_regular
from clada_export.foreign import TEXT, TOKEN_FILE, reading

LARGEST_FILE = 256 << 20
"""Bytes. A calibration looks at a few windows, and a text takes many times its size while it is tokenised."""


@dataclass(frozen=True)
class CalibrationData:
    """Token windows, int64 [N, context] and [M, context]; no window is in both.

    `origin` says where they come from, `digest` is the sha256 of all token ids, `warnings` go into the manifest.
    """

    calibration: Tensor
    heldout: Tensor
    origin: str
    digest: str
    warnings: tuple[str, ...] = ()


def default_text() -> str:
    """English technical prose of the standard library (`pydoc_data.topics`, the Python language reference, 460 kB)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        UsageError: the file can't be read, is none (a folder, a pipe), has more than `LARGEST_FILE` bytes, is not text, or is
            empty.
    """
    what = f"calibration text {path}"
    try:
        text = read_regular(path, LARGEST_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what}: not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise UsageError(f"{what}: it is empty")
    return text


def read_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Read token ids from a `.npy` file: one integer array of any shape, read as one long text.

    Raises:
        UsageError: not such a file (pickled arrays are refused), more than `LARGEST_FILE` bytes of it, or an id outside
            0..vocab_size-1.
    """
    what = f"calibration tokens {path}"
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise UsageError(f"{what}: can't be read: it is no regular file of at most {LARGEST_FILE >> 20} MB")
    # Mapped, so that no array is made for what a header says and the file has not.
    with reading(TOKEN_FILE, what), np.errstate(over="ignore"):
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray):
        raise UsageError(f"{what}: {TOKEN_FILE.fault}: it is an archive of arrays (.npz)")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(f"{what}: token ids are integers; found {ids.dtype}")
    ids = ids.reshape(-1)
    if ids.size == 0:
        raise UsageError(f"{what}: it is empty")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UsageError(f"{what}: ids from {ids.min()} to {ids.max()}; the model has 0 to {vocab_size - 1}")
    return ids.astype(np.int64)


def make_windows(ids: np.ndarray, context: int, calibration: int, heldout: int, origin: str) -> CalibrationData:
    """Cut a token sequence into windows and deal them out, so that both parts are spread over the whole text.

    Args:
        ids: int64 [L].
        context: tokens a window.
        calibration, heldout: how many windows are wanted; a short text gives fewer of each.

    Raises:
        UsageError: the text gives fewer than two windows.
    """
    count = len(ids) // context
    if count < 2:
        raise UsageError(
            f"{origin}: {len(ids)} tokens; calibration needs at least two windows of {context} tokens (one is held out). "
            "Give a longer text or a smaller --calibration-context"
        )
    windows = torch.from_numpy(ids[: count * context].reshape(count, context).copy())
    wanted = min(count, calibration + heldout)
    spread = np.linspace(0, count - 1, wanted).round().astype(int)
    held = max(1, min(heldout, wanted - 1, round(wanted * heldout / (calibration + heldout))))
    places = set(np.linspace(0, wanted - 1, held + 2)[1:-1].round().astype(int).tolist()) or {0}
    first = [int(spread[i]) for i in range(wanted) if i not in places]
    second = [int(spread[i]) for i in sorted(places)]
    digest = hashlib.sha256(windows[first + second].numpy().tobytes()).hexdigest()
    return CalibrationData(windows[first], windows[second], origin, digest)


def load_calibration_data(
    tokenizer: Any | None,
    vocab_size: int,
    *,
    text_file: Path | None = None,
    tokens_file: Path | None = None,
    context: int = 512,
    calibration: int = 5,
    heldout: int = 4,
    seed: int = 0,
) -> CalibrationData:
    """Token windows from a token file, else a text file, else the default text, else (no tokenizer) random tokens.

    Raises:
        UsageError: a file that can't be used, or a text without a tokenizer.
    """
    if tokens_file is not None:
        return make_windows(read_tokens(tokens_file, vocab_size), context, calibration, heldout, str(tokens_file))
    if tokenizer is None:
        if text_file is not None:
            raise UsageError(
                f"{text_file}: the model has no tokenizer, so a text can't be used; give token ids with --calibration-tokens"
            )
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, vocab_size, context * (calibration + heldout), dtype=np.int64)
        data = make_windows(ids, context, calibration, heldout, "random tokens")
        warning = (
            "calibrated on random tokens, because the model has no tokenizer and no --calibration-tokens was given: "
            "thresholds and drift say nothing about real text"
        )
        return CalibrationData(data.calibration, data.heldout, data.origin, data.digest, (warning,))
    text = read_text(text_file) if text_file is not None else default_text()
    origin = str(text_file.name) if text_file is not None else "pydoc_data.topics"
    return make_windows(_tokenize(tokenizer, text, origin), context, calibration, heldout, origin)


def _tokenize(tokenizer: Any, text: str, origin: str) -> np.ndarray:
    with reading(TEXT, origin):
        ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    return ids
