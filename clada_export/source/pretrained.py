"""The one door to transformers' `from_pretrained`.

Everything of a model that transformers reads comes through here, so that nothing is forgotten anywhere: the model's own code is
run only where the caller says so (transformers *asks on stdin* where it is not told, and takes `y` from a pipe), nothing is
fetched, transformers' reports do not stand beside our messages, and what it raises becomes an error of ours.
"""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clada_export.errors import CladaError, UsageError
from clada_export.files.json_files import read_json
from clada_export.files.tokenizer_file import LARGEST, check_tokenizer_file
from clada_export.files.tokenizer_growth import check_growth
from clada_export.foreign import CONFIG, GENERATION_CONFIG, MODEL, TOKENIZER, InputKind, reading
from clada_export.source.config_file import check_config, inert

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
_MOST_HOLES = 100_000
"""Ids without a token: when a vocabulary is written, each is looked for and told of."""
_SMALL_FILES = (TOKENIZER_FILE, "special_tokens_map.json", "added_tokens.json")
_LARGE_FILES = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
)


def load_config(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    kind: InputKind = CONFIG,
    place: str | None = None,
    **arguments: Any,
) -> PreTrainedConfig:
    """The configuration in a folder, or (`gguf_file`) of a GGUF file in it.

    Without trust, transformers gets to see what is a setting of a model and nothing else (`config_file.inert`).

    Args:
        trust_remote_code: run Python code that comes with the model.
        kind: what a failure is called.
        place: where it is, for messages; the file by default.
        arguments: of `AutoConfig.from_pretrained`.

    Raises:
        UsageError: of `kind`, or a number in it is out of all bounds.
    """
    file = Path(folder) / CONFIG_FILE
    if "gguf_file" in arguments:
        return _auto_config(folder, trust_remote_code, kind, place or str(file), **arguments)
    value = read_json(file)
    check_config(value, str(file))
    if trust_remote_code:
        return _auto_config(folder, trust_remote_code, kind, place or str(file), **arguments)
    with TemporaryDirectory(prefix="clada-") as seen:
        (Path(seen) / CONFIG_FILE).write_text(json.dumps(inert(value)), encoding="utf-8")
        config = _auto_config(seen, False, kind, place or str(file), **arguments)
    config.name_or_path = str(folder)
    return config


def _auto_config(
    folder: str | Path, trust_remote_code: bool, kind: InputKind, place: str, **arguments: Any
) -> PreTrainedConfig:
    with reading(kind, place), quiet():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **arguments
        )
        parts = config.get_text_config(), config.get_text_config(decoder=True)
    # Any name becomes an attribute: a `text_config` of a type that has no such part stays a dictionary.
    if not all(isinstance(part, PreTrainedConfig) for part in parts):
        raise kind.error(f"{place}: {kind.fault}: its part about text is none that the type {config.model_type!r} has")
    return config


def load_model(
    loader: Any, location: str, *, place: str | Path, trust_remote_code: bool = False, **arguments: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and what transformers has to say about how they fit. Its `generation_config.json` is read too.

    Args:
        loader: an auto class or a model class.
        place: for messages.
        arguments: of its `from_pretrained`.

    Raises:
        UsageError: it can't be built.
        BackendError: a package that it needs is missing.
    """
    load_generation_config(location)  # transformers reads it again, and would not say which file is wrong
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
        if model.generation_config is not None:
            forget_code(model.generation_config)
    return model, info


def model_without_memory(loader: Any, config: PreTrainedConfig, *, place: str | Path, most: int) -> Any:
    """The model of a configuration on PyTorch's meta device: all shapes and no weights; never the model's own code.

    Args:
        loader: an auto class or a model class.
        place: for messages.
        most: how many modules and parameters it may have, so that no count that is set too high takes all day.

    Raises:
        UsageError: it can't be built.
        BackendError: a package that it needs is missing.
    """
    with reading(MODEL, place), quiet(), torch.device("meta"), _bounded(most, place):
        model: PreTrainedModel = (
            loader(config) if not hasattr(loader, "from_config") else loader.from_config(config, trust_remote_code=False)
        )
    return model


@contextmanager
def _bounded(most: int, place: str | Path) -> Iterator[None]:
    """Count the parts that models get inside, and stop where there are too many."""
    count = 0

    def counted(module: nn.Module, name: str, part: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UsageError(
                f"{place}: the configuration asks for more than {most} modules and parameters, {type(module).__name__} among "
                "them; the weights can't have so many: check its counts"
            )

    hooks: Any = torch.nn.modules.module
    handles = [
        hooks.register_module_module_registration_hook(counted),
        hooks.register_module_parameter_registration_hook(counted),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_tokenizer(location: str | Path, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """The tokenizer in a folder, or (`gguf_file`) of a GGUF file in it.

    Args:
        trust_remote_code: run Python code that comes with the model.
        arguments: of `AutoTokenizer.from_pretrained`; the `config` is that of the folder by default.

    Raises:
        UsageError: it can't be read.
        BackendError: a package that it needs is missing.
    """
    folder = Path(location)
    if "gguf_file" not in arguments:
        _check_tokenizer_files(folder)
        if not trust_remote_code:
            arguments.setdefault("config", _config_of_tokenizer(folder))
    try:
        with reading(TOKENIZER, location), quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(location), trust_remote_code=trust_remote_code, local_files_only=True, **arguments
            )
            # Settings that make no sense show when it is used.
            tokenizer("", add_special_tokens=False)
            count, highest = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
    except UsageError as error:
        file = folder / TOKENIZER_FILE
        if not trust_remote_code and file.is_file() and read_json(file).get("auto_map"):
            raise UsageError(
                f"{file}: the tokenizer comes with Python code, which is run only if you ask for it (--trust-remote-code)"
            ) from error
        raise
    if highest > 2 * count + _MOST_HOLES:
        raise UsageError(f"{location}: {TOKENIZER.fault}: it has {count} tokens, and one of them has the id {highest}")
    if not trust_remote_code:
        forget_code(tokenizer)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        check_growth(backend, folder)
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Look at the files that transformers parses into Python's values before it does."""
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            value = read_json(folder / name)
            if not isinstance(value, dict):
                raise UsageError(f"{folder / name}: a JSON object is wanted, and this is {type(value).__name__}")
    if (folder / "tokenizer.json").is_file():
        check_tokenizer_file(folder / "tokenizer.json")
    for file in (*(folder / name for name in _LARGE_FILES), *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        if file.is_file() and (size := file.stat().st_size) > LARGEST:
            raise UsageError(f"{file}: {size} bytes; at most {LARGEST} can be meant")


def _config_of_tokenizer(folder: Path) -> PreTrainedConfig:
    """What transformers chooses the tokenizer's class by; without one it takes that of `tokenizer_config.json`."""
    if (folder / CONFIG_FILE).is_file():
        with suppress(CladaError):
            return load_config(folder)
    return PreTrainedConfig()


def load_generation_config(folder: str | Path) -> GenerationConfig | None:
    """What `generation_config.json` of a folder says, or None if there is none.

    Raises:
        UsageError: it can't be read, or has a setting that is none.
    """
    place = Path(folder) / GENERATION_FILE
    if not place.is_file():
        return None
    value = read_json(place)
    check_config(value, str(place))
    for name in value:
        if inspect.isroutine(inspect.getattr_static(GenerationConfig, name, None)) or name.startswith("__"):
            raise UsageError(f"{place}: {name!r} is no setting")
    with reading(GENERATION_CONFIG, place), quiet():
        config: GenerationConfig = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    forget_code(config)
    return config


@contextmanager
def alone(file: Path) -> Iterator[str]:
    """A folder that holds one file and nothing else, so that transformers reads nothing that lies beside it.

    Raises:
        UsageError: no such folder can be made.
    """
    with TemporaryDirectory(prefix="clada-") as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield folder


def forget_code(owner: Any) -> None:
    """Take the names of the model's own classes out of a configuration or tokenizer: an export must not pass them on."""
    for name in ("auto_map", "_auto_map", "custom_pipelines", "custom_generate"):
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
