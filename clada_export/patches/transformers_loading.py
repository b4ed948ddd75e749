"""Let transformers load one weight after another, and put each in its place before the next is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, core_model_loading, modeling_utils

from clada_export.patches.patch import Patch

PATCH = Patch(
    name="transformers_loading",
    package="transformers",
    made_for="5.23.0",
    reason="It starts to read all weights at once, as copies of its own in memory, and maps weight files, so that one that is "
    "cut while it is read ends the process (docs/decisions/0014-weights.md).",
    until="from_pretrained takes where each weight is to lie, and reads a weight only when its turn has come",
)

Place = Callable[[PreTrainedModel, Tensor], Tensor]
"""Takes the model, still without memory where nothing was loaded, and a weight as it is to be; gives it where it is to lie."""


@contextmanager
def weights_placed(place: Place) -> Iterator[None]:
    """Let `from_pretrained` put every weight of a checkpoint where `place` says, renamed and converted as it always is."""
    set_param, materialize, safe_open = (
        core_model_loading.set_param_for_module,
        core_model_loading.spawn_materialize,
        vars(modeling_utils)["safe_open"],
    )

    def placed(model: PreTrainedModel, target_name: str, param_value: Tensor, *args: Any, **options: Any) -> None:
        set_param(model, target_name, place(model, param_value), *args, **options)

    def in_turn(pool: Any, *args: Any, **options: Any) -> Any:
        # Without a pool it returns what reads the weight, to be called when its turn has come.
        return materialize(None, *args, **options)

    def read(file: Any, framework: str, **options: Any) -> Any:
        return safe_open(file, framework=framework, **{**options, "backend": "pread"})

    vars(core_model_loading).update(set_param_for_module=placed, spawn_materialize=in_turn)
    vars(modeling_utils).update(safe_open=read)
    try:
        yield
    finally:
        vars(core_model_loading).update(set_param_for_module=set_param, spawn_materialize=materialize)
        vars(modeling_utils).update(safe_open=safe_open)
