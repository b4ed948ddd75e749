"""What transformers made of a checkpoint, held to it: nothing may be missing, left over, of another shape, or not a number.

transformers repairs what does not fit (it re-initialises missing or mismatched weights and drops unexpected ones); here each of
these is an error, because an export of a half-random model would look like a success.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clada_export.errors import UsageError

_NAMES_SHOWN = 3


def check_loading(info: dict[str, Any], place: str) -> None:
    """Look at what transformers says of how the weights fit.

    Args:
        info: of `from_pretrained`, with `output_loading_info`.
        place: for messages.

    Raises:
        UsageError: weights that are missing, left over, or of another shape; names the first.
    """
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        shown = "; ".join(
            f"{name}: {tuple(found)} in the weights, {tuple(wanted)} by the config"
            for name, found, wanted in mismatched[:_NAMES_SHOWN]
        )
        raise UsageError(f"{place}: the weights do not fit the config: {shown}{_more(mismatched)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{place}: weights are missing that the config asks for: {', '.join(missing[:_NAMES_SHOWN])}{_more(missing)}"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise UsageError(
            f"{place}: the weights hold tensors that the config has no place for: {', '.join(unexpected[:_NAMES_SHOWN])}"
            f"{_more(unexpected)}; check the number of layers and the architecture in the config"
        )


def check_finite(model: PreTrainedModel, place: str, used: Callable[[Tensor], None] = lambda weight: None) -> None:
    """Look for weights that are no numbers.

    Args:
        place: for messages.
        used: told of each weight that was looked at.

    Raises:
        UsageError: there are some; names the parameter and how many.
    """
    for name, parameter in model.named_parameters():
        # The sum is NaN or infinite if any element is; it needs no mask as large as the weight. Finite weights can overflow
        # it only in a 16-bit type, hence float32.
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise UsageError(
                    f"{place}: {name}: {bad} of {parameter.numel()} weights are NaN or infinite; the file is damaged"
                )
        used(parameter)


def forget_gguf(model: PreTrainedModel) -> None:
    """After dequantisation it is an ordinary dense model; the quantiser left on it would make exporters treat it as packed."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def _more(names: list[Any]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return f", and {rest} more" if rest > 0 else ""
