"""A model by its configuration and the headers of its weight files: all shapes, and no weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.foreign import GGUF_ARCHITECTURE, MODEL, reading
from clada_export.patches.gguf_reader import one_gguf_reader
from clada_export.source.causal_lm import decoder_config, loader_of, require_decoder
from clada_export.source.config_file import Stored, check_counts, check_size
from clada_export.source.gguf_header import check_layers, read_gguf_header
from clada_export.source.hub import fetch
from clada_export.source.mixtures import folder_layout, import_blocks
from clada_export.source.model import SourceRequest
from clada_export.source.pretrained import alone, load_config, model_without_memory, quiet
from clada_export.source.weight_files import check_config_file, check_safetensors, weight_files

_FEW_ROWS = 64
"""Of the head of a stand-in: what comes out of it is not looked at."""


@dataclass(frozen=True)
class Outline:
    """What headers say of a model.

    Attributes:
        model: on the meta device; ties are ties.
        stored: bytes of the weight files.
        place: for messages.
        source_dtype: as `SourceModel.source_dtype`; empty where only the weights would say.
        build: makes another such model.
    """

    name: str
    kind: str
    model: PreTrainedModel
    stored: int
    source_dtype: str
    import_experts: bool
    place: str
    build: Callable[[], PreTrainedModel] = field(repr=False)

    def decoder(self) -> TorchDecoder:
        """A decoder of this architecture and these sizes with made-up weights, which every layer shares with the others.

        Its FFNs can be searched, for what an FFN computes does not depend on its weights. It takes the memory of one layer.
        Nothing else of it means anything.
        """
        model = self.build()
        _stand_in(model, self.place)
        if self.import_experts:
            import_blocks(model)
        return TorchDecoder(model)


def outline(request: SourceRequest) -> Outline | None:
    """Look at a folder, a GGUF file, or a Hub id as `load_source` takes it.

    Returns:
        None where only reading the weights tells what the model is: it comes with code, or in a layout of its own.

    Raises:
        UsageError, UnsupportedModelError, BackendError: see `clada_export.source.load.load_source`.
    """
    if request.trust_remote_code:
        return None
    if request.path.is_file():
        return _of_gguf(request)
    if request.path.is_dir():
        request.refuse_revision(request.model, "folder")
        return _of_folder(request, request.path, request.path.resolve().name, "folder")
    return _of_folder(request, fetch(request), request.model, "hub")


def _of_folder(request: SourceRequest, folder: Path, name: str, kind: str) -> Outline | None:
    check_config_file(folder)
    files = weight_files(folder, request.allow_pickle)
    size = sum(file.stat().st_size for file in files)
    if folder_layout(folder) is not None:
        return None
    dtype, stored = ("", Stored.at_most(size)) if files[0].suffix == ".bin" else check_safetensors(files)
    config = decoder_config(folder, False)
    return _outlined(request, name, kind, config, stored, size, dtype, str(folder / "config.json"))


def _of_gguf(request: SourceRequest) -> Outline | None:
    path = request.path
    if path.suffix != ".gguf":
        return None  # loading it says what is wrong
    request.refuse_revision(str(path), "file")
    with one_gguf_reader():
        header = read_gguf_header(path)
        check_layers(header, header.layers, path)
        with alone(path) as folder:
            config = load_config(folder, gguf_file=path.name, kind=GGUF_ARCHITECTURE, place=str(path))
    require_decoder(config, str(path))
    stored = Stored.of([tensor.shape for tensor in header.tensors])
    return _outlined(request, path.stem, "gguf", config, stored, path.stat().st_size, header.main_type, str(path))


def _outlined(
    request: SourceRequest,
    name: str,
    kind: str,
    config: PreTrainedConfig,
    stored: Stored,
    size: int,
    dtype: str,
    place: str,
) -> Outline:
    check_counts(config, stored, place)
    loader = loader_of(config) or AutoModelForCausalLM
    config.dtype = torch.float32

    def build() -> PreTrainedModel:
        model: PreTrainedModel = model_without_memory(loader, config, place=place, most=stored.most_parts)
        model.train(False)
        return model

    model = build()
    check_size(model, stored, place)
    return Outline(name, kind, model, size, dtype, request.import_experts, place, build)


def _stand_in(model: PreTrainedModel, place: str) -> None:
    """Give a model of the meta device numbers to compute with, in place."""
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[str, torch.Size], Tensor] = {}
    head = None
    with suppress(AttributeError, NotImplementedError):
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for path, module in model.named_modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            # Layers differ by a number in their path.
            key = (re.sub(r"\d+", "", f"{path}.{name}"), weight.shape)
            if key not in made:
                rows = isinstance(module, nn.Embedding)
                made[key] = _few_rows(weight, generator) if module is head else _numbers(weight.shape, rows, generator)
            filled: Any = nn.Parameter(made[key], requires_grad=False)
            filled._is_hf_initialized = True
            setattr(module, name, filled)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    # Fills the buffers; the weights are marked as done.
    with reading(MODEL, place), quiet():
        model.initialize_weights()  # type: ignore[no-untyped-call]


def _numbers(shape: torch.Size, rows: bool, generator: torch.Generator) -> Tensor:
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) + 0.5
    if rows:
        # As large as it likes: each row begins one number after the row before.
        return torch.randn(shape[0] + shape[1], generator=generator).as_strided(shape, (1, 1))
    return torch.randn(shape, generator=generator) / math.sqrt(max(1, min(shape[-2:])))


def _few_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    return _numbers(torch.Size((min(_FEW_ROWS, weight.shape[0]), *weight.shape[1:])), False, generator)
