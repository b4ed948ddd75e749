"""The source stage for ONNX: a model file and what lies beside it become a decoder that can be calibrated."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig

from clada_export.errors import UnsupportedModelError, UsageError, VerificationError
from clada_export.foreign import CONFIG, reading
from clada_export.source.onnx.decoder import OnnxDecoder
from clada_export.source.onnx.files import STORED, companions, read_onnx
from clada_export.source.onnx.graph import compilable_ffns, load_graph
from clada_export.source.pretrained import load_config, load_generation_config
from graph_passes.matchers.common import fixed_size
from graph_passes.search import find_ffns

SAME = 1e-4
"""Of the largest logit: what cutting the graph may change. Products are summed in another order, and nothing else."""
_SAMPLE = 12


def load_decoder(path: Path) -> OnnxDecoder:
    """The decoder of a model file.

    Raises:
        UsageError, UnsupportedModelError: as `load_graph`; also, a file beside the model that makes no sense, weights that are
            not float32, or a graph that ONNX Runtime does not run.
        VerificationError: the decoder does not compute what the graph does.
    """
    model = load_graph(path)
    found = find_ffns(model)
    search = compilable_ffns(found)
    if narrow := search.misses[len(found.misses) :]:
        raise UnsupportedModelError(f"{path}: FFN {narrow[0].name!r}: {narrow[0].reason}")
    decoder = OnnxDecoder(
        path,
        model,
        search.matches,
        search.misses,
        _config(path, model),
        load_generation_config(companions(path)),
        _digest(path, model),
        torch.get_num_threads(),
    )
    _check_cut(decoder, path)
    return decoder


def weight_files_of(path: Path, model: ir.Model | None = None) -> list[Path]:
    """The model file and the files that hold its weights, in the order of their names."""
    model = model or read_onnx(path)
    tensors = (value.const_value for value in model.graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [path, *(path.parent / name for name in sorted(names))]


def _digest(path: Path, model: ir.Model) -> bytes:
    result = hashlib.sha256()
    for file in weight_files_of(path, model):
        with file.open("rb") as stream:
            result.update(hashlib.file_digest(stream, "sha256").digest())
    return result.digest()


def _config(path: Path, model: ir.Model) -> Any:
    """The configuration beside the model, or one with the size of the vocabulary alone."""
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    vocabulary = fixed_size(logits.shape[-1]) if logits.shape is not None and len(logits.shape) == 3 else None
    folder = companions(path)
    place = folder / "config.json"
    if place.exists():
        config = load_config(folder)
        with reading(CONFIG, place):
            config = config.get_text_config(decoder=True)
        _check_vocabulary(config, vocabulary, model.meta[STORED], place)
        return config
    if vocabulary is None:
        raise UnsupportedModelError(f"{path}: neither its output 'logits' nor a config.json says how many tokens there are")
    return PretrainedConfig.from_dict({"vocab_size": vocabulary})


def _check_vocabulary(config: PretrainedConfig, logits: int | None, stored: int, place: Path) -> None:
    """Raise UsageError unless a configuration's vocabulary is one that the graph can have: its token ids are fed to it."""
    found = getattr(config, "vocab_size", None)
    limit = stored if logits is None else logits
    if not isinstance(found, int) or isinstance(found, bool) or not 0 < found <= limit:
        has = f"the graph's logits are of {logits} tokens" if logits is not None else f"the weights hold {stored} numbers"
        raise UsageError(f"{place}: vocab_size is {str(found)[:40]}, and {has}")


def _check_cut(decoder: OnnxDecoder, path: Path) -> None:
    """Raise VerificationError unless the decoder in parts gives the logits of the graph in one piece."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.vocab_size, (2, _SAMPLE), generator=generator)
    with torch.inference_mode():
        wanted, found = decoder.run_whole(ids).logits, decoder.run(ids).logits
    shapes = [list(logits.shape) for logits in (wanted, found)]
    if any(len(shape) != 3 or shape[:2] != list(ids.shape) or shape[2] < decoder.vocab_size for shape in shapes):
        raise UnsupportedModelError(
            f"{path}: for tokens {list(ids.shape)} the graph's logits are {shapes[0]}, and {shapes[1]} with its FFNs computed "
            f"apart; wanted is [batch, sequence, vocabulary], and the vocabulary has {decoder.vocab_size} tokens"
        )
    difference, largest = float((wanted - found).abs().max()), float(wanted.abs().max())
    if not difference <= SAME * max(largest, 1.0):
        raise VerificationError(
            f"{path}: with its FFNs computed apart, the graph's logits differ by {difference:.3g} (largest: {largest:.3g})"
        )
