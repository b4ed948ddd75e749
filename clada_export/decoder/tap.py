"""See, and change, what flows through the FFNs of an eager model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clada_export.decoder.ffn import EagerFFN

Inner = Callable[[int, Tensor, Tensor], Tensor | None]
Outer = Callable[[int, Tensor], Tensor | None]
Replace = Callable[[int, Tensor], Tensor]


class FFNTap:
    """A context manager that calls back from every FFN.

    Args:
        ffns: the FFNs, in the order of their index.
        inner: called as `inner(index, x, h)` with the FFN input x [.., d] and the hidden activation h [.., f] just before
            the down projection; what it returns takes the place of h (None: no change).
        outer: called as `outer(index, y)` with the output of the down projection [.., d]; likewise.
        replace: called as `replace(index, x)`; what it returns is the FFN's output, whatever the model computed.
    """

    def __init__(
        self,
        ffns: Sequence[EagerFFN],
        inner: Inner | None = None,
        outer: Outer | None = None,
        replace: Replace | None = None,
    ) -> None:
        self._ffns = ffns
        self._inner = inner
        self._outer = outer
        self._replace = replace
        self._inputs: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> FFNTap:
        for index, ffn in enumerate(self._ffns):
            self._handles.append(ffn.inputs[0].register_forward_pre_hook(self._keep_input(index)))
            self._handles.append(ffn.down.register_forward_pre_hook(self._before_down(index)))
            self._handles.append(ffn.down.register_forward_hook(self._after_down(index)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _keep_input(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._inputs[index] = args[0]

        return hook

    def _before_down(self, index: int) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            if self._inner is None:
                return None
            changed = self._inner(index, self._inputs[index], args[0])
            return None if changed is None else (changed, *args[1:])

        return hook

    def _after_down(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            x = self._inputs.pop(index)
            if self._replace is not None:
                return self._replace(index, x)
            return None if self._outer is None else self._outer(index, output)

        return hook
