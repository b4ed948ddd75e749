"""Which matrices of a model are quantised, and what kind each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clada_export.decoder.decoder import Decoder
from clada_export.decoder.ffn import EagerFFN
from clada_export.decoder.ffn.layer import is_projection, unpack, weight_rows
from clada_export.decoder.torch_decoder import require_torch
from clada_export.errors import UnsupportedModelError
from graph_passes.quant.contract import BLOCK
from graph_passes.quant.quantiser import ffn_matrix
from graph_passes.quant.table import table_name


@dataclass(frozen=True)
class ModelMatrix:
    """A matrix of the model.

    Attributes:
        name: the path of its module.
        kind: one of `clada_export.plan.weights_form.KINDS`.
        module: holds it.
    """

    name: str
    kind: str
    module: nn.Module

    def rows(self) -> Tensor:
        """The matrix [out_features, in_features], in the model's memory; of an embedding [tokens, width]."""
        if isinstance(self.module, nn.Embedding):
            return self.module.weight.detach()
        return weight_rows(self.module)

    @property
    def size(self) -> int:
        """Weights."""
        return self.rows().numel()


@dataclass(frozen=True)
class MatrixPart:
    """Where a matrix that a graph asks for lies: in the rows of a module's.

    Attributes:
        matrix: the path of the module.
        packing: of a projection that packs gate and up (`clada_export.decoder.ffn.layer.PACKINGS`), else None.
        place: 0 for gate and 1 for up, in such a projection.
    """

    matrix: str
    packing: str | None = None
    place: int = 0

    def of(self, values: Tensor) -> Tensor:
        """Its rows of what is there for each row of the module's matrix [rows, ..]."""
        return values if self.packing is None else unpack(values, self.packing, 0)[self.place]


@dataclass(frozen=True)
class ModelMatrices:
    """All matrices that are quantised.

    Attributes:
        found: by module path, in the model's order.
        parts: where each matrix of an FFN lies, by `graph_passes.quant.quantiser.ffn_matrix`, and a table of tokens, by
            `graph_passes.quant.table.table_name`.
        tied: the path of the embedding and of the head that share one matrix, or None.
    """

    found: Mapping[str, ModelMatrix]
    parts: Mapping[str, MatrixPart]
    tied: tuple[str, str] | None


def find_matrices(decoder: Decoder) -> ModelMatrices:
    """Those of every linear layer whose inputs blocks divide, and of the table of tokens.

    Raises:
        UsageError: the decoder is not PyTorch's.
        UnsupportedModelError: an FFN whose sizes blocks do not divide; names it.
    """
    model = require_torch(decoder, "--weights int8, int6, int5, int4 and auto").model
    paths = {id(module): path for path, module in model.named_modules()}
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    table: nn.Module | None = model.get_input_embeddings()
    parts: dict[str, MatrixPart] = {}
    ffn_modules = set()
    for ffn in decoder.ffns:
        _check(ffn)
        ffn_modules |= {id(module) for module in (*ffn.inputs, ffn.down)}
        parts.update(_parts(ffn, paths))
    found: dict[str, ModelMatrix] = {}
    for path, module in model.named_modules():
        if module is table and isinstance(module, nn.Embedding):
            kind = "embedding"
            parts[table_name(path)] = MatrixPart(path)
        elif not is_projection(module):
            continue
        else:
            kind = "ffn" if id(module) in ffn_modules else "head" if module is head else "attention"
        matrix = ModelMatrix(path, kind, module)
        if matrix.rows().shape[1] % BLOCK == 0 and matrix.rows().dtype == torch.float32:
            found[path] = matrix
    tied = None
    if head is not None and table is not None and getattr(head, "weight", None) is getattr(table, "weight", None):
        both = paths[id(table)], paths[id(head)]
        tied = both if all(path in found for path in both) else None
    return ModelMatrices(found, parts, tied)


def _parts(ffn: EagerFFN, paths: Mapping[int, str]) -> dict[str, MatrixPart]:
    inner = [paths[id(module)] for module in ffn.inputs]
    found = {ffn_matrix(ffn.name, "down"): MatrixPart(paths[id(ffn.down)])}
    if ffn.packing is not None:
        for place, role in enumerate(("gate", "up")):
            found[ffn_matrix(ffn.name, role)] = MatrixPart(inner[0], ffn.packing, place)
        return found
    roles = ("gate", "up") if ffn.gated else ("up",)
    return {**found, **{ffn_matrix(ffn.name, role): MatrixPart(path) for role, path in zip(roles, inner, strict=True)}}


def _check(ffn: EagerFFN) -> None:
    for what, size in (("hidden size", ffn.hidden_size), ("intermediate size", ffn.intermediate_size)):
        if size % BLOCK:
            raise UnsupportedModelError(
                f"{ffn.name}: its {what} is {size}, and quantised weights lie in blocks of {BLOCK}; use --weights float32, "
                "bfloat16 or float16"
            )
