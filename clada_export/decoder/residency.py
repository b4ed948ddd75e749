"""Which weights are in memory: those in use, where a model is large beside the memory that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from clada_export.decoder.spool import Pages, Spool


class Residency:
    """The weights of a model that lie in a spool, and when their memory is given back.

    Args:
        model: its weights are where they are to stay.
        spool: holds them.
            If they are large (`clada_export.decoder.spool.LARGE`), each layer gives its memory back after every call. Small
            models are left alone: nothing is added to their calls.
    """

    def __init__(self, model: nn.Module, spool: Spool) -> None:
        self.spool = spool
        self._all = spool.pages(_tensors(model))
        if spool.large:
            _rest_after_calls(model, spool)

    def rest(self) -> None:
        """Give all memory of the weights back; they stay what they are and come back when they are read."""
        self._all.rest()


def _rest_after_calls(model: nn.Module, spool: Spool) -> None:
    """Let each layer give its memory back once it has run, and the model that of what is in no layer."""
    layers = list(_layers(model))
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for layer in layers:
        layer.register_forward_hook(_resting(spool.pages(_tensors(layer))))
    model.register_forward_hook(_resting(spool.pages(tensor for tensor in _tensors(model) if id(tensor) not in inside)))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the lists that are in no other list: a decoder's layers, but not the experts of one."""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{other}.") for other in found):
            found.append(path)
            yield from module


def _tensors(module: nn.Module) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()


def _resting(pages: Pages) -> Callable[..., None]:
    # A plain function: copies of a model share it, where an object of ours would be copied with the file that it holds.
    def rest(module: nn.Module, args: Any, output: Any) -> None:
        pages.rest()

    return rest
