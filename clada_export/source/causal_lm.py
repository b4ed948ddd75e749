"""The causal language model that transformers makes of a checkpoint, held to it: every difference is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from clada_export.decoder.spool import Spool
from clada_export.errors import UnsupportedModelError, UsageError
from clada_export.files.json_files import read_json
from clada_export.source.config_file import Stored, check_counts, check_size
from clada_export.source.loading import check_finite, check_loading
from clada_export.source.mixtures import import_blocks
from clada_export.source.placing import placed_in, reserve
from clada_export.source.pretrained import load_config, load_model, model_without_memory


def decoder_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        UsageError: it can't be read.
        UnsupportedModelError: it is none of a decoder that transformers knows.
    """
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
    require_decoder(config, str(place))
    return config


def require_decoder(config: PreTrainedConfig, place: str) -> None:
    """Check that a configuration is one of a decoder.

    Raises:
        UnsupportedModelError: it is not; says what it is.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{place}: {kind!r} is an encoder-decoder model; only decoder-only language models are supported"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if loader_of(config) is None and not remote:
        raise UnsupportedModelError(f"{place}: {kind!r} is not a decoder: transformers has no causal language model for it")
    # Encoders such as BERT can be *turned into* a causal model with `is_decoder`; as they come they look both ways.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedModelError(
            f"{place}: {kind!r} is an encoder (a masked language model), not a decoder; only decoder-only models are supported"
        )


def loader_of(config: PreTrainedConfig) -> Any:
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


def load_causal_lm(
    location: str,
    place: str,
    config: PreTrainedConfig,
    stored: Stored,
    spool: Spool,
    *,
    import_experts: bool,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    **arguments: Any,
) -> PreTrainedModel:
    """Load the weights and refuse every difference between them and the config.

    Args:
        location: what `from_pretrained` takes.
        place: for messages.
        stored: what the weight files hold.
        spool: gets the weights, one after the other.
        import_experts: see `clada_export.source.load.load_source`.
        arguments: of `load_model`.

    Returns:
        The model, in eval mode, without gradients.

    Raises:
        UsageError: damaged weights, some that do not fit the config, or no room on the disk for them.
        BackendError: a package that it needs is missing.
    """
    loader = loader_of(config) or AutoModelForCausalLM
    if not trust_remote_code:
        settings = place if "gguf_file" in arguments else str(Path(location) / "config.json")
        check_counts(config, stored, settings)
        empty = model_without_memory(loader, config, place=settings, most=stored.most_parts)
        check_size(empty, stored, settings)
        reserve(spool, empty, dtype)
    with placed_in(spool, dtype):
        model, info = load_model(
            loader, location, place=place, trust_remote_code=trust_remote_code, config=config, dtype=dtype, **arguments
        )
    check_loading(info, place)
    if import_experts:
        import_blocks(model, spool.adopt)
    return finished(model, place, spool)


def finished(model: PreTrainedModel, place: str, spool: Spool) -> PreTrainedModel:
    """A model whose weights are all there and lie in the spool, in eval mode and without gradients.

    Raises:
        UsageError: a weight is no number.
    """
    spool.adopt(model)
    check_finite(model, place, spool.used)
    model.train(False)
    model.requires_grad_(False)
    return model
