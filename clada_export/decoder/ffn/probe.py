"""Run a model on a few tokens and see what flows through its projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clada_export.decoder.ffn.layer import is_projection
from clada_export.errors import UnsupportedModelError

TOKENS = 8


@dataclass
class Record:
    """One projection in one pass.

    Attributes:
        path: the module's path.
        order: its place among all projections, by when it ran first.
        calls: how often it ran.
        given: the very tensor that it was given, which tells whether two projections read the same.
        x, y: what went in [rows, in] and came out [rows, out], the first time, float32.
    """

    path: str
    module: nn.Module
    order: int
    calls: int
    given: Tensor
    x: Tensor
    y: Tensor

    @property
    def rows(self) -> int:
        """Tokens that it saw."""
        return int(self.x.shape[0])


def probe(model: nn.Module, inject: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> dict[str, Record]:
    """Run `TOKENS` fixed random tokens, and record every projection.

    Args:
        inject: by `id` of a projection, what takes the place of its result.

    Returns:
        By path, in the order in which they ran. A projection that no token reached is not in it.

    Raises:
        UnsupportedModelError: the model does not run on token ids alone; says what it raised.
    """
    records: dict[str, Record] = {}
    changes = inject or {}
    handles = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], Tensor | None]:
        def after(module: nn.Module, args: tuple[Tensor, ...], y: object) -> Tensor | None:
            if not isinstance(y, Tensor):
                # A router that is written as a projection returns weights and choices together (Llama 4).
                return None
            if path in records:
                records[path].calls += 1
            elif args:
                given = args[0]
                records[path] = Record(path, module, len(records), 1, given, _flat(given), _flat(y))
            return changes[id(module)](y) if id(module) in changes else None

        return after

    for path, module in model.named_modules():
        if is_projection(module):
            handles.append(module.register_forward_hook(hook(path)))
    try:
        with torch.no_grad():
            model(input_ids=_tokens(model), use_cache=False)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on token ids alone, as a text decoder does: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return records


def _tokens(model: nn.Module) -> Tensor:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = int(embeddings.weight.shape[0])
    return torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def _flat(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float()
