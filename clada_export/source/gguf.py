"""A GGUF file: its blocks become ordinary weights."""

from __future__ import annotations

import transformers
from transformers.utils.quantization_config import GgufConfig

from clada_export.decoder.residency import Residency
from clada_export.decoder.spool import Spool
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.foreign import GGUF_ARCHITECTURE
from clada_export.patches.gguf_reader import one_gguf_reader
from clada_export.patches.gguf_weights import gguf_weights
from clada_export.source.causal_lm import load_causal_lm, require_decoder
from clada_export.source.config_file import Stored
from clada_export.source.description import check_vocabulary, digest_file, tokenizer_at
from clada_export.source.gguf_blocks import block_reader
from clada_export.source.gguf_header import GgufHeader, check_layers, read_gguf_header
from clada_export.source.loading import forget_gguf
from clada_export.source.model import SourceModel, SourceRequest
from clada_export.source.pretrained import alone, load_config


def load_gguf(request: SourceRequest) -> SourceModel:
    """The model of a GGUF file.

    Raises:
        UsageError, UnsupportedModelError, BackendError: see `clada_export.source.load.load_source`.
    """
    path = request.path
    if path.suffix != ".gguf":
        raise UsageError(
            f"{path}: a single file must be a .gguf file; for safetensors give the folder that holds config.json too"
        )
    request.refuse_revision(str(path), "file")
    spool = Spool()
    with one_gguf_reader(), block_reader(path, spool) as blocks, gguf_weights(blocks.unpack, spool.give_back):
        header = read_gguf_header(path)
        check_layers(header, header.layers, path)
        # What lies beside the file is no part of it: a config.json, an adapter, code.
        with alone(path) as folder:
            return _load_alone(folder, header, request, spool)


def _load_alone(folder: str, header: GgufHeader, request: SourceRequest, spool: Spool) -> SourceModel:
    path = request.path
    architecture = header.metadata.get("general.architecture", "unknown")
    place = f"{path}: GGUF architecture {architecture!r}, transformers {transformers.__version__}"
    config = load_config(folder, gguf_file=path.name, kind=GGUF_ARCHITECTURE, place=place)
    require_decoder(config, str(path))
    check_layers(header, getattr(config.get_text_config(), "num_hidden_layers", None), path)  # what became of it
    # Without `dequantize`, transformers would keep packed blocks and could fetch matmul kernels from the Hub.
    quantization = GgufConfig(dequantize=True)
    model = load_causal_lm(
        folder,
        str(path),
        config,
        Stored.of([tensor.shape for tensor in header.tensors]),
        spool,
        import_experts=request.import_experts,
        dtype=request.dtype,
        gguf_file=path.name,
        quantization_config=quantization,
    )
    forget_gguf(model)
    warnings: list[str] = []
    tokenizer = tokenizer_at(folder, warnings, gguf_file=path.name)
    check_vocabulary(model, tokenizer, warnings)
    decoder = TorchDecoder(model, residency=Residency(model, spool))
    return SourceModel(
        decoder=decoder,
        tokenizer=tokenizer,
        name=path.stem,
        revision=None,
        kind="gguf",
        path=path,
        files={path.name: digest_file(path)},
        weights_digest=decoder.weights_digest(),
        license=header.metadata.get("general.license"),
        source_dtype=header.main_type,
        warnings=warnings,
    )
