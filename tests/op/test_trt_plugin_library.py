"""TensorRT-RTX takes the plugin: it loads the library, parses nodes into plugin layers and builds engines, without a GPU.

It never runs a layer here, so the library may be the one for the emulated CUDA runtime.
"""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import emulation_folder
from op_shells import Case, make_case, make_model

from clada_export.errors import BackendError
from clada_export.native.library import build_info, check_library, trt_library_path
from clada_export.native.tensorrt import RTX, load_backend, load_plugin, plugin_creator
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION, SCORES, SparseFFNAttributes, output_names

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
TYPES = {
    "f32": (torch.float32, torch.float32),
    "f16_weights": (torch.float32, torch.float16),
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
TRT_TYPES = {torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16}


@functools.cache
def library() -> Path:
    try:
        return trt_library_path()
    except BackendError:
        return emulation_folder() / "plugins" / "libclada_trt.so"


@dataclass(frozen=True)
class Built:
    """What the parser and the builder made of a model; `plan` is None when one of them refused it."""

    plan: bytes | None
    layers: tuple[str, ...]
    outputs: dict[str, Any]
    errors: str


def build(
    case: Case, *, function: bool = False, embed: bool = False, runtime: tuple[str, ...] = (), **attributes: Any
) -> Built:
    backend = load_backend(RTX)
    builder = trt.Builder(backend.logger)
    load_plugin(backend, builder.get_plugin_registry(), library())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, backend.logger)
    model = make_model(case, function=function, runtime_inputs=runtime, node_attributes=attributes or None)
    plan = None
    if parser.parse(model.SerializeToString()):
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            # make_model leaves all axes open; the last of x and score, and the weights', have one size.
            shape = case.input(tensor.name).shape
            sizes = [
                (1, 16, 64) if axis < {"past_stat": 1}.get(tensor.name, 2) else (size,) * 3 for axis, size in enumerate(shape)
            ]
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))
        config.add_optimization_profile(profile)
        if embed:
            config.plugins_to_serialize = [str(library())]
        made = builder.build_serialized_network(network, config)
        plan = bytes(made) if made is not None else None
    layers = tuple(network.get_layer(i).type.name for i in range(network.num_layers))
    tensors = [network.get_output(i) for i in range(network.num_outputs)]
    outputs = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in tensors}
    return Built(plan, layers, outputs, backend.messages.take())


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("score", SCORES)
def test_engines_hold_the_plugin(score: str, types: str) -> None:
    x_dtype, dtype = TYPES[types]
    stat = {"use_stat": True} if score == "prefix" else {}
    wanted = SparseFFNAttributes(score=score, has_bias=True, emit_stat=True, stat_norm="none", emit_active=True, **stat)
    found = build(make_case(wanted, x_dtype=x_dtype, dtype=dtype))
    assert found.plan is not None, found.errors
    assert found.layers.count("PLUGIN_V3") == 1
    assert found.outputs == {"y": (TRT_TYPES[x_dtype], 3), "stat": (trt.float32, 2), "active": (trt.int32, 2)}
    assert tuple(found.outputs) == output_names(wanted)
    # The node's name is kept for messages, and every attribute by its name.
    for text in ("layer7/ffn", "prior_gamma", "stat_norm", score):
        assert text.encode() in found.plan


def test_a_node_with_a_function_becomes_the_plugin() -> None:
    found = build(make_case(SparseFFNAttributes()), function=True)
    assert found.plan is not None and "PLUGIN_V3" in found.layers, found.errors


def test_the_library_can_be_part_of_the_engine() -> None:
    case = make_case(SparseFFNAttributes())
    alone, together = build(case), build(case, embed=True)
    assert alone.plan is not None and together.plan is not None, together.errors
    image = library().read_bytes()
    assert image in together.plan and image not in alone.plan


@pytest.mark.parametrize(
    ("attributes", "parts"),
    [
        ({"score": "magic"}, ("'score'", "'magic'", "gate, exact")),
        ({"stat_norm": "column"}, ("'stat_norm'", "'column'", "row, none")),
        ({"granule": 1.5}, ("'granule'", "a float32", "an int32")),
        ({"granule": 5}, ("96 neurons", "granule 5")),
        ({"gated": 0}, ("'w_in'", "[96, 2, 64]", "[f, 1, d]")),
        ({"has_bias": 1}, ("5 inputs", "8", "gate_bias")),
        ({"emit_stat": 1}, ("layer7/ffn",)),
        ({"plugin_version": "2"}, ("Plugin not found",)),
    ],
)
def test_the_logger_hears_what_is_wrong(attributes: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Messages reach the logger of this TensorRT, whose interface is not that of the headers the plugin was built with."""
    found = build(make_case(SparseFFNAttributes()), **attributes)
    assert found.plan is None
    for part in parts:
        assert part in found.errors, found.errors


def test_a_type_that_the_contract_does_not_have() -> None:
    case = make_case(SparseFFNAttributes(score="exact"))
    assert case.tensors.neuron_scale is not None
    tensors = {**vars(case.tensors), "neuron_scale": case.tensors.neuron_scale.half()}
    found = build(Case(case.attributes, type(case.tensors)(**tensors), case.x, case.load))
    assert found.plan is None
    assert "layer7/ffn" in found.errors and "'neuron_scale' has type float16; wanted float32" in found.errors


def test_the_creator_and_the_exported_names() -> None:
    backend = load_backend(RTX)
    registry = trt.Builder(backend.logger).get_plugin_registry()
    load_plugin(backend, registry, library())
    creator = plugin_creator(registry)
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (OP_TYPE, str(OP_VERSION), DOMAIN)
    check_library(library())
    assert f"{DOMAIN}::{OP_TYPE} {OP_VERSION}, TensorRT headers" in build_info(library())
    symbols = subprocess.run(["nm", "-D", "--defined-only", library()], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {"getCreators", "setLoggerFinder", "clada_op_version", "clada_build_info"}
    needed = subprocess.run(["ldd", library()], capture_output=True, text=True, check=True).stdout
    assert "nvinfer" not in needed and "libcudart" not in needed
