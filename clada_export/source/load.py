"""The source stage: a Hub id, a local folder, a GGUF file or an ONNX model becomes a float32 model that calibration can run,
with its tokenizer. What transformers makes of it is held to the checkpoint (`clada_export.source.loading`)."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils.quantization_config import GgufConfig

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.digest import weights_digest
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import BackendError, CladaError, UnsupportedModelError, UsageError
from clada_export.files.json_files import read_json
from clada_export.foreign import GGUF_ARCHITECTURE, MODEL_CARD, one_line, reading
from clada_export.source.config_file import Stored, check_counts, check_size
from clada_export.source.gguf_header import GgufHeader, check_layers, read_gguf_header
from clada_export.source.hub import fetch
from clada_export.source.loading import check_finite, check_loading, forget_gguf, one_gguf_reader
from clada_export.source.mixtures import import_blocks, is_llama_moe, load_llama_moe
from clada_export.source.onnx.files import companions, is_onnx, locate_onnx
from clada_export.source.pretrained import alone, load_config, load_model, load_tokenizer, model_without_memory
from clada_export.source.weight_files import check_config_file, check_safetensors, weight_files

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    *_TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ONNX_NAMES = ("model.onnx", "decoder_model.onnx")


@dataclass(frozen=True)
class SourceFile:
    """A file of the source: the hexadecimal sha256 of its bytes, and how many there are."""

    sha256: str
    bytes: int


@dataclass
class SourceModel:
    """A loaded decoder.

    `decoder` is in eval mode; `tokenizer` is None when the source has none (then `warnings` says so). `name` is the Hub id, the
    folder's name or the file's stem; `kind` is `hub`, `folder`, `gguf` or `onnx`; `revision` is the commit of a Hub source.
    `files` maps paths relative to `path` to their digests; `weights_digest` is over the weights as loaded. `source_dtype` is
    the type most weights are stored in: `float32`, `bfloat16`, `float16`, or a GGUF type such as `Q4_1`. `graph` is the ONNX
    file that is compiled as it is; None where the model is traced.
    """

    decoder: Decoder
    tokenizer: Any
    name: str
    revision: str | None
    kind: str
    path: Path
    files: dict[str, SourceFile]
    weights_digest: str
    license: str | None
    source_dtype: str
    warnings: list[str] = field(default_factory=list)
    graph: Path | None = None

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it (`source` in `docs/manifest.md`)."""
        return {
            "name": self.name,
            "kind": self.kind,
            "revision": self.revision,
            "weights_digest": self.weights_digest,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "license": self.license,
            "dtype": self.source_dtype,
        }


def load_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    import_experts: bool = True,
    dtype: torch.dtype = torch.float32,
) -> SourceModel:
    """Load a decoder LLM for export.

    Args:
        model: a Hub id (`org/name`), a local folder with `config.json` and safetensors, a `.gguf` file, an `.onnx` file or a
            folder that holds one.
        revision: branch, tag or commit of a Hub id.
        token: Hub access token; None uses the stored one.
        cache_dir: where Hub files are kept; None is the Hub's default.
        local_files_only: use the cache only, never the network.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: accept `pytorch_model.bin` (read with `weights_only=True`).
        import_experts: take routed experts of a known layout as FFNs that the op can run (`moe_import`); without it they stay
            what they are, and the dense FFNs beside them are the model's FFNs.
        dtype: the type of the loaded weights.

    Raises:
        UsageError: no such model, a damaged or incomplete one, or weights that do not fit the config.
        UnsupportedModelError: not a decoder, an architecture unknown to transformers, or weights that are already quantised.
        BackendError: a package that the format needs is missing.
    """
    path = _path(model)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{model}: it is neither a file nor a folder")
    if path.exists() and is_onnx(path):
        return _load_onnx(locate_onnx(path), revision)
    if path.is_file():
        with one_gguf_reader():
            return _load_gguf(path, revision, import_experts, dtype)
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"{model}: a revision ({revision!r}) belongs to a Hub id, and this is a local folder")
        return _load_folder(
            path,
            name=path.resolve().name,
            kind="folder",
            revision=None,
            remote=trust_remote_code,
            pickled=allow_pickle,
            experts=import_experts,
            dtype=dtype,
        )
    folder = fetch(model, revision, token, cache_dir, local_files_only, trust_remote_code, allow_pickle)
    return _load_folder(
        folder,
        name=model,
        kind="hub",
        revision=folder.name,
        remote=trust_remote_code,
        pickled=allow_pickle,
        experts=import_experts,
        dtype=dtype,
    )


def _path(model: str) -> Path:
    try:
        path = Path(model).expanduser()
        path.exists()  # whether the system can say at all
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{model[:200]!r}: no such file or folder: {one_line(error)}") from error
    return path


def _load_folder(
    folder: Path,
    *,
    name: str,
    kind: str,
    revision: str | None,
    remote: bool,
    pickled: bool,
    experts: bool,
    dtype: torch.dtype,
) -> SourceModel:
    check_config_file(folder)
    weights = weight_files(folder, pickled)
    pickle_used = weights[0].suffix == ".bin"
    if pickle_used:
        source_dtype, stored = "unknown", Stored.at_most(sum(file.stat().st_size for file in weights))
    else:
        source_dtype, stored = check_safetensors(weights)
    # Of a layout that is imported, transformers does not know the type that the config names.
    described_by: dict[str, Any] = {}
    if is_llama_moe(folder):
        if source_dtype == "unknown":
            source_dtype = str(read_json(folder / "config.json").get("torch_dtype", dtype)).removeprefix("torch.")
        model = _finished(load_llama_moe(folder, weights, stored, dtype), str(folder))
        config = model.config
        described_by["config"] = config
    else:
        config = _config(folder, remote)
        if source_dtype == "unknown":
            source_dtype = str(config.dtype or dtype).removeprefix("torch.")
        model = _build(
            str(folder),
            name if kind == "hub" else str(folder),
            config,
            stored,
            import_experts=experts,
            dtype=dtype,
            trust_remote_code=remote,
            use_safetensors=not pickle_used,
            weights_only=True,
        )
    warnings: list[str] = []
    tokenizer = _folder_tokenizer(folder, name, warnings, trust_remote_code=remote, **described_by)
    _check_vocabulary(model, tokenizer, warnings)
    described = [folder / file for file in _DESCRIPTION_FILES if (folder / file).is_file()]
    return SourceModel(
        decoder=TorchDecoder(model),
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        kind=kind,
        path=folder,
        files={str(file.relative_to(folder)): _digest_file(file) for file in sorted([*weights, *described])},
        weights_digest=weights_digest(model),
        license=_license(folder, config, warnings),
        source_dtype=source_dtype,
        warnings=warnings,
    )


def _load_gguf(path: Path, revision: str | None, experts: bool, dtype: torch.dtype) -> SourceModel:
    if path.suffix != ".gguf":
        raise UsageError(
            f"{path}: a single file must be a .gguf file; for safetensors give the folder that holds config.json too"
        )
    if revision is not None:
        raise UsageError(f"{path}: a revision ({revision!r}) belongs to a Hub id, and this is a local file")
    header = read_gguf_header(path)
    check_layers(header, header.layers, path)
    # What lies beside the file is no part of it: a config.json, an adapter, code.
    with alone(path) as folder:
        return _load_alone(folder, path, header, experts, dtype)


def _load_alone(folder: str, path: Path, header: GgufHeader, experts: bool, dtype: torch.dtype) -> SourceModel:
    architecture = header.metadata.get("general.architecture", "unknown")
    place = f"{path}: GGUF architecture {architecture!r}, transformers {transformers.__version__}"
    config = load_config(folder, gguf_file=path.name, kind=GGUF_ARCHITECTURE, place=place)
    _check_decoder(config, str(path))
    check_layers(header, getattr(config.get_text_config(), "num_hidden_layers", None), path)  # what became of it
    # Without `dequantize`, transformers would keep packed blocks and could fetch matmul kernels from the Hub.
    quantization = GgufConfig(dequantize=True)
    model = _build(
        folder,
        str(path),
        config,
        Stored.of([tensor.shape for tensor in header.tensors]),
        import_experts=experts,
        dtype=dtype,
        gguf_file=path.name,
        quantization_config=quantization,
    )
    forget_gguf(model)
    warnings: list[str] = []
    tokenizer = _tokenizer(folder, warnings, gguf_file=path.name)
    _check_vocabulary(model, tokenizer, warnings)
    return SourceModel(
        decoder=TorchDecoder(model),
        tokenizer=tokenizer,
        name=path.stem,
        revision=None,
        kind="gguf",
        path=path,
        files={path.name: _digest_file(path)},
        weights_digest=weights_digest(model),
        license=header.metadata.get("general.license"),
        source_dtype=header.main_type,
        warnings=warnings,
    )


def _load_onnx(path: Path, revision: str | None) -> SourceModel:
    if revision is not None:
        raise UsageError(f"{path}: a revision ({revision!r}) belongs to a Hub id, and this is a local file")
    try:
        from clada_export.source.onnx.load import load_decoder, weight_files_of
    except ImportError as error:
        raise BackendError("an ONNX model as source needs ONNX Runtime: pip install 'clada-export[ort]'") from error
    decoder, folder = load_decoder(path), companions(path)
    # A file is called by what its folder is called, where it has the name that every exporter gives it.
    name = folder.resolve().name if path.name in _ONNX_NAMES else path.stem
    warnings: list[str] = []
    tokenizer = _folder_tokenizer(folder, name, warnings)
    described = [folder / file for file in _DESCRIPTION_FILES if (folder / file).is_file()]
    return SourceModel(
        decoder=decoder,
        tokenizer=tokenizer,
        name=name,
        revision=None,
        kind="onnx",
        path=folder,
        files={str(file.relative_to(folder)): _digest_file(file) for file in sorted([*weight_files_of(path), *described])},
        weights_digest=weights_digest(decoder.module),
        license=_license(folder, decoder.config, warnings),
        source_dtype="float32",
        warnings=warnings,
        graph=path,
    )


def _config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    place = folder / "config.json"
    try:
        config = load_config(folder, trust_remote_code=trust_remote_code)
    except UsageError as error:
        value = read_json(place)
        if not trust_remote_code and isinstance(value, dict) and value.get("auto_map"):
            raise UnsupportedModelError(
                f"{place}: the model comes with Python code, which is run only if you ask for it (--trust-remote-code)"
            ) from error
        model_type = value.get("model_type") if isinstance(value, dict) else None
        if model_type is None or (isinstance(model_type, str) and model_type not in transformers.CONFIG_MAPPING):
            raise UnsupportedModelError(
                f"{place}: model_type: transformers {transformers.__version__} does not know {model_type!r}"
            ) from error
        raise
    _check_decoder(config, str(place))
    return config


def _check_decoder(config: PreTrainedConfig, place: str) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{place}: {kind!r} is an encoder-decoder model; only decoder-only language models are supported"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if _loader(config) is None and not remote:
        raise UnsupportedModelError(f"{place}: {kind!r} is not a decoder: transformers has no causal language model for it")
    # Encoders such as BERT can be *turned into* a causal model with `is_decoder`; as they come they look both ways.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{place}: {kind!r} is an encoder (a masked language model), not a decoder; only decoder-only models are supported"
        )


def _loader(config: PreTrainedConfig) -> Any:
    """What loads the decoder of a configuration, or None if transformers has none.

    The decoder of a model of text and images may be saved alone; its configuration names a class of transformers then.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None) if str(name).endswith("ForCausalLM") else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.config_class is type(config):
            return kind
    return None


def _build(
    location: str,
    place: str,
    config: PreTrainedConfig,
    stored: Stored,
    *,
    import_experts: bool,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """Load the weights and refuse every difference between them and the config.

    Args:
        stored: what the weight files hold.
    """
    loader = _loader(config) or AutoModelForCausalLM
    if not trust_remote_code:
        settings = place if "gguf_file" in arguments else str(Path(location) / "config.json")
        check_counts(config, stored, settings)
        empty = model_without_memory(loader, config, place=settings, most=stored.most_parts)
        check_size(empty, stored, settings, dtype.itemsize)
    model, info = load_model(
        loader, location, place=place, trust_remote_code=trust_remote_code, config=config, dtype=dtype, **arguments
    )
    check_loading(info, place)
    if import_experts:
        import_blocks(model)
    return _finished(model, place)


def _finished(model: PreTrainedModel, place: str) -> PreTrainedModel:
    check_finite(model, place)
    model.train(False)
    model.requires_grad_(False)
    return model


def _folder_tokenizer(folder: Path, name: str, warnings: list[str], **arguments: Any) -> Any:
    if any((folder / file).is_file() for file in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken")):
        return _tokenizer(str(folder), warnings, **arguments)
    warnings.append(f"{name} has no tokenizer files; prompts will have to be token ids")
    return None


def _tokenizer(location: str, warnings: list[str], **arguments: Any) -> Any:
    try:
        return load_tokenizer(location, **arguments)
    except CladaError as error:
        warnings.append(f"the tokenizer can't be loaded ({error}); prompts will have to be token ids")
        return None


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any, warnings: list[str]) -> None:
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", None)
    if tokenizer is not None and rows is not None and len(tokenizer) > rows:
        warnings.append(f"the tokenizer has {len(tokenizer)} tokens and the model {rows}; text that uses the others will fail")


def _license(folder: Path, config: PreTrainedConfig, warnings: list[str]) -> str | None:
    readme = folder / "README.md"
    value: Any = getattr(config, "license", None)
    if value is None and readme.is_file():
        try:
            with reading(MODEL_CARD, readme):
                value = (metadata_load(readme) or {}).get("license")
        except CladaError as error:
            warnings.append(f"no licence is recorded: {error}")
    return value if isinstance(value, str) else None


def _digest_file(path: Path) -> SourceFile:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return SourceFile(digest, path.stat().st_size)
