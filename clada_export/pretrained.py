"""The one door to transformers' `from_pretrained`.

Everything of a model that transformers reads comes through here, so that nothing is forgotten anywhere: the model's own code is
run only where the caller says so (transformers *asks on stdin* where it is not told, and takes `y` from a pipe), nothing is
fetched, transformers' reports do not stand beside our messages, and what it raises becomes an error of ours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clada_export.config_file import check_config
from clada_export.foreign import CONFIG, GENERATION_CONFIG, MODEL, TOKENIZER, InputKind, reading
from clada_export.json_files import read_json

GENERATION_FILE = "generation_config.json"


def load_config(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    kind: InputKind = CONFIG,
    place: str | None = None,
    **arguments: Any,
) -> PreTrainedConfig:
    """The configuration in a folder, or (`gguf_file`) of a GGUF file in it.

    Args:
        trust_remote_code: run Python code that comes with the model.
        kind: what a failure is called.
        place: where it is, for messages; the file by default.
        arguments: of `AutoConfig.from_pretrained`.

    Raises:
        UsageError: of `kind`, or a number in it is out of all bounds.
    """
    file = Path(folder) / "config.json"
    if "gguf_file" not in arguments:
        check_config(read_json(file), str(file))
    with reading(kind, place or file), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **arguments
        )
    return config


def load_model(
    loader: Any, location: str, *, place: str | Path, trust_remote_code: bool = False, **arguments: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and what transformers has to say about how they fit.

    Args:
        loader: an auto class or a model class.
        place: for messages.
        arguments: of its `from_pretrained`.

    Raises:
        UsageError: it can't be built.
        BackendError: a package that it needs is missing.
    """
    with reading(MODEL, place), quiet():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = loader.from_pretrained(
            location,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    model, info = loaded
    if not trust_remote_code:
        forget_code(model.config)
    return model, info


def model_without_memory(loader: Any, config: PreTrainedConfig, *, place: str | Path) -> PreTrainedModel:
    """The model of a configuration on PyTorch's meta device: all shapes and no weights; never the model's own code.

    Args:
        loader: an auto class or a model class.
        place: for messages.

    Raises:
        UsageError: it can't be built.
        BackendError: a package that it needs is missing.
    """
    with reading(MODEL, place), quiet(), torch.device("meta"):
        model: PreTrainedModel = (
            loader(config) if not hasattr(loader, "from_config") else loader.from_config(config, trust_remote_code=False)
        )
    return model


def load_tokenizer(location: str | Path, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """The tokenizer in a folder, or (`gguf_file`) of a GGUF file in it.

    Raises:
        UsageError: it can't be read.
        BackendError: a package that it needs is missing.
    """
    with reading(TOKENIZER, location), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            str(location), trust_remote_code=trust_remote_code, local_files_only=True, **arguments
        )
    if not trust_remote_code:
        forget_code(tokenizer)
    return tokenizer


def load_generation_config(folder: str | Path) -> GenerationConfig | None:
    """What `generation_config.json` of a folder says, or None if there is none.

    Raises:
        UsageError: it can't be read, or transformers would refuse to write it.
    """
    place = Path(folder) / GENERATION_FILE
    if not place.is_file():
        return None
    check_config(read_json(place), str(place))
    with reading(GENERATION_CONFIG, place), quiet():
        config: GenerationConfig = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        # What it would refuse when the export is written, it refuses now.
        config.validate(strict=True)
    return config


def forget_code(owner: Any) -> None:
    """Take the names of the model's own classes out of a configuration or tokenizer: an export must not pass them on."""
    for name in ("auto_map", "_auto_map", "custom_pipelines"):
        if getattr(owner, name, None):
            setattr(owner, name, None)
            vars(owner).pop(name, None)
    for settings in (getattr(owner, "init_kwargs", None), getattr(owner, "_init_kwargs", None)):
        if isinstance(settings, dict):
            settings.pop("auto_map", None)
    for part in getattr(owner, "sub_configs", None) or ():
        if (inner := getattr(owner, part, None)) is not None:
            forget_code(inner)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own report and progress bars (its GGUF reader's has no switch) would stand beside our messages."""
    control: Any = transformers_logging
    level, bars = control.get_verbosity(), control.is_progress_bar_enabled()
    control.set_verbosity_error()
    control.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        control.set_verbosity(level)
        if bars:
            control.enable_progress_bar()
