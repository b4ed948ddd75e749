"""FFNs whose weights become codes: those of the quantiser, in the layout of the op, made when they are read; and refusals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import tiny_models
from eager import score_constants

from clada_export.native.library import ort_library_path
from graph_passes import FFNRewrite, rewrite_ffns
from graph_passes.op import ContractError, SparseFFNAttributes
from graph_passes.quant.ffn_layout import unpack_in, unpack_out
from graph_passes.quant.layout import QuantisedMatrix
from graph_passes.quant.quantise import quantise
from graph_passes.quant.quantiser import QuantFormat, UniformQuantiser, ffn_matrix

IDS = np.random.default_rng(0).integers(3, 256, (2, 7))
INF = float("inf")


@dataclass(frozen=True)
class Recording(UniformQuantiser):
    """Says what was asked for; roles may have other forms."""

    forms: dict[str, QuantFormat | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def form(self, name: str) -> QuantFormat | None:
        return self.forms.get(name.rpartition(":")[2], self.format)

    def matrix(self, name: str, weight: npt.NDArray[np.float32]) -> QuantisedMatrix:
        self.asked.append(name)
        return super().matrix(name, weight)


def plan(kind: str, **attributes: object) -> dict[str, FFNRewrite]:
    wanted = SparseFFNAttributes(**{"score": "exact", "load_slope": 0.3, **attributes})  # type: ignore[arg-type]
    threshold = np.array([40.0 if wanted.rule == "topk" else 0.1], np.float32)
    return {name: FFNRewrite(wanted, threshold, score_constants) for name in tiny_models.ffn_names(kind)}


def run(model: ir.Model, load: float) -> dict[str, np.ndarray]:
    session = tiny_models.session(model, ort_library_path())
    feeds = {**tiny_models.prompt_feeds(model.graph.inputs, IDS), "load": np.full(IDS.shape, load, np.float32)}
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))


def initializer(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("llama", 8), ("opt", 5), ("gpt2", 6)])
def test_codes_and_logits(kind: str, bits: int) -> None:
    plain, model = tiny_models.export_tiny(kind), tiny_models.export_tiny(kind)
    rewrite_ffns(plain, plan(kind))
    quantiser = Recording(QuantFormat(bits))
    report = rewrite_ffns(model, plan(kind), quantiser=quantiser)
    assert quantiser.asked == [], "weights are quantised when they are read"
    names = tiny_models.ffn_names(kind)
    for ffn in report.ffns:
        original = initializer(plain, f"{ffn.node}.w_in"), initializer(plain, f"{ffn.node}.w_out")
        gated = original[0].shape[1] == 2
        gate, up = unpack_in(initializer(model, f"{ffn.node}.w_in"), bits, gated=gated)
        found = {"up": up, "down": unpack_out(initializer(model, f"{ffn.node}.w_out"), bits)}
        wanted = {"up": original[0][:, -1], "down": original[1].T}
        if gate is not None:
            found["gate"], wanted["gate"] = gate, original[0][:, 0]
        assert (gate is not None) == gated
        for role, matrix in found.items():
            codes = quantise(np.ascontiguousarray(wanted[role]), bits)
            np.testing.assert_array_equal(matrix.codes, codes.codes)
            np.testing.assert_array_equal(matrix.scale, codes.scale)
        # The score's constants are those of the weights, not of the codes.
        np.testing.assert_array_equal(
            initializer(model, f"{ffn.node}.neuron_scale"), initializer(plain, f"{ffn.node}.neuron_scale")
        )
        numbers = sum(each.size for each in original)
        assert ffn.bytes_before == 4 * numbers
        names_of_biases = [f"{ffn.node}.{part}_bias" for part in ("gate", "up", "down")]
        biases = sum(4 * initializer(model, name).size for name in names_of_biases if name in model.graph.initializers)
        assert ffn.weight_bytes == numbers * (bits / 8 + 1 / 16) + biases
    asked = {ffn_matrix(name, role) for name in names for role in ("up", "down", *(("gate",) if kind == "llama" else ()))}
    assert set(quantiser.asked) == asked and len(quantiser.asked) == len(asked), "a matrix is quantised once"
    for load in (INF, 0.0):
        found, wanted = run(model, load), run(plain, load)
        scale = np.abs(wanted["logits"]).max()
        assert np.abs(found["logits"] - wanted["logits"]).max() < scale * {4: 0.2, 5: 0.1, 6: 0.06, 8: 0.03}[bits]
        assert found["active_neurons"].shape == wanted["active_neurons"].shape
    assert 0 < run(model, 0.0)["active_neurons"].mean() < 96


def test_layers_may_differ() -> None:
    """One layer in codes, the other as it is; each has its function."""
    model = tiny_models.export_tiny("llama")
    names = tiny_models.ffn_names("llama")

    class First(UniformQuantiser):
        def form(self, name: str) -> QuantFormat | None:  # type: ignore[override]
            return self.format if name.startswith(names[0]) else None

    report = rewrite_ffns(model, plan("llama"), quantiser=First(QuantFormat(4)))
    dtypes = [model.graph.initializers[f"{ffn.node}.w_in"].dtype for ffn in report.ffns]
    assert dtypes == [ir.DataType.UINT8, ir.DataType.FLOAT] and len(model.functions) == 2
    assert np.isfinite(run(model, 0.0)["logits"]).all()


def test_the_function_has_the_ops_numbers() -> None:
    """Where the library is missing."""
    model = tiny_models.export_tiny("llama")
    rewrite_ffns(model, plan("llama", activation="silu"), quantiser=UniformQuantiser(QuantFormat(4)))
    native = run(model, INF)["logits"]
    feeds = {**tiny_models.prompt_feeds(model.graph.inputs, IDS), "load": np.full(IDS.shape, INF, np.float32)}
    session = tiny_models.session(model)
    function = dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))["logits"]
    # A rounding of h in 8 bits may fall on the other side.
    np.testing.assert_allclose(native, function, atol=0.01 * float(np.abs(native).max()))


def refused(
    *parts: str,
    quantiser: UniformQuantiser,
    kind: str = "llama",
    change: dict[str, object] | None = None,
    **attributes: object,
) -> None:
    model = tiny_models.export_tiny(kind)
    before = model.graph.num_nodes()
    rewrites = {name: replace(each, **(change or {})) for name, each in plan(kind, **attributes).items()}  # type: ignore[arg-type]
    with pytest.raises(ContractError) as error:
        rewrite_ffns(model, rewrites, quantiser=quantiser)
    for part in (tiny_models.ffn_names(kind)[0], *parts):
        assert part in str(error.value), str(error.value)
    assert model.graph.num_nodes() == before


def test_what_is_refused() -> None:
    four = UniformQuantiser(QuantFormat(4))
    mixed = Recording(QuantFormat(4), forms={"down": QuantFormat(5)})
    partly = Recording(QuantFormat(4), forms={"gate": None})
    refused("one format", "gate int4, up int4, down int5", quantiser=mixed)
    refused("one format", "gate plain, up int4, down int4", quantiser=partly)
    refused("with offsets", quantiser=UniformQuantiser(QuantFormat(4, has_offset=True)))
    refused("weight_format 'int4'", "score 'exact'", "score is 'gate'", quantiser=four, score="gate")
    refused("weight_format 'int4'", "granule 2", quantiser=four, granule=2)
    refused("weight_format 'int4'", "no statistic", quantiser=four, emit_stat=True)
    refused("chosen neurons", "plain", "int4", quantiser=four, change={"neurons": np.arange(64)})
