"""A decoder whose FFNs are PyTorch modules, and whose other nodes ONNX Runtime runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, nn

from clada_export.decoder.decoder import Decoder, DecoderOutput
from clada_export.decoder.ffn import EagerFFN, EagerFFNs, SkippedFFN
from clada_export.decoder.padding import padding_of
from clada_export.errors import UnsupportedModelError
from clada_export.foreign import ONNX_RUN, reading
from clada_export.op.reference import activate
from clada_export.source.onnx.graph import SOURCE_NAME
from clada_export.source.onnx.stages import Stage, cut
from graph_passes.matchers.common import FFNMatch, fixed_size
from graph_passes.matchers.weights import MatrixSource, VectorSource
from graph_passes.search import FFNMiss

Array = npt.NDArray[Any]


class OnnxFFN(nn.Module):
    """An FFN with the weights of a match. x [.., d] float32 to [.., d]."""

    def __init__(self, match: FFNMatch) -> None:
        super().__init__()
        self.activation = match.activation
        self.gate = None if match.gate is None else _linear(match.gate, match.gate_bias)
        self.up = _linear(match.up, match.up_bias)
        self.down = _linear(match.down, match.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)), or down(act(up(x)))."""
        # A tap looks for x at the first input projection, so that one runs first.
        first = activate(self.activation, self.up(x) if self.gate is None else self.gate(x))
        result: Tensor = self.down(first if self.gate is None else first * self.up(x))
        return result

    def described(self, match: FFNMatch) -> EagerFFN:
        """As calibration wants to have it."""
        inputs = (self.up,) if self.gate is None else (self.gate, self.up)
        return EagerFFN(
            match.name, inputs, self.down, match.activation, match.gated, match.hidden_size, match.intermediate_size
        )


class _Weights(nn.Module):
    """The FFNs of a graph, and what tells it from others.

    Args:
        digest: 32 bytes over the files. It is a buffer, so that a digest of the state is one of the whole graph.
    """

    def __init__(self, matches: Sequence[FFNMatch], digest: bytes) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(OnnxFFN(match) for match in matches)
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self.requires_grad_(False)
        self.eval()


class OnnxDecoder(Decoder):
    """A decoder from an ONNX graph. A cache is a dictionary of arrays, by the name of the graph's input.

    Args:
        path: of the model file; weights that lie in other files are read from its folder.
        model: the same model, its interface named (`graph_passes.naming`), not changed here.
        matches, misses: of its FFNs.
        config: of the source; has `vocab_size`.
        generation_config: of the source, or None.
        digest: 32 bytes over the files.
        threads: of ONNX Runtime.
    """

    def __init__(
        self,
        path: Path,
        model: ir.Model,
        matches: Sequence[FFNMatch],
        misses: Sequence[FFNMiss],
        config: Any,
        generation_config: Any,
        digest: bytes,
        threads: int,
    ) -> None:
        self._config = config
        self._generation_config = generation_config
        self.path = path
        self.threads = threads
        self._weights = _Weights(matches, digest)
        described = [ffn.described(match) for ffn, match in zip(self._weights.ffns, matches, strict=True)]  # type: ignore[operator]
        self._matched = EagerFFNs(tuple(described), tuple(SkippedFFN(miss.name, miss.reason) for miss in misses))
        self._edges = [(str(match.x.name), str(match.y.name), match.hidden_size) for match in matches]
        self._flat = [len(match.y.shape or ()) == 2 for match in matches]
        self._proto = ir.to_proto(model)
        interface = (*model.graph.inputs, *model.graph.outputs)
        self._source_names = {str(value.name): str(value.meta.get(SOURCE_NAME, value.name)) for value in interface}
        self._inputs = [value.name for value in self._proto.graph.input]
        self._cache = {
            str(value.name): (_cache_shape(value, path), value.dtype.numpy())
            for value in model.graph.inputs
            if str(value.name).startswith("past_key_values.") and value.dtype is not None
        }
        self._stages: list[tuple[Stage, onnxruntime.InferenceSession]] = []
        self._build(cut(model, self._proto, matches))
        self._whole: onnxruntime.InferenceSession | None = None
        self._as_given = self._state()

    @property
    def name(self) -> str:
        """The class: the graph has no name that means anything."""
        return type(self).__name__

    @property
    def module(self) -> nn.Module:
        """The FFNs, and the digest of the files."""
        return self._weights

    @property
    def config(self) -> Any:
        """See `Decoder.config`."""
        return self._config

    @property
    def generation_config(self) -> Any:
        """See `Decoder.generation_config`."""
        return self._generation_config

    @property
    def differentiable(self) -> bool:
        """Never: ONNX Runtime computes most of it."""
        return False

    @property
    def takes_positions(self) -> bool:
        """Never: positions are counted here, from the mask."""
        return False

    @property
    def first_position(self) -> int:
        """The graph adds what its model counts from."""
        return 0

    @cached_property
    def padding(self) -> str:
        """See `Decoder.padding`."""
        return padding_of(self, cached=False)

    def run(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Mapping[str, Array] | None = None,
        keep_cache: bool = False,
    ) -> DecoderOutput:
        """Run the stages, and the FFNs between them; see `Decoder.run`."""
        assert positions is None, "it takes none"
        values: dict[str, Array] = self._feeds(ids.numpy(), mask, cache)
        for stage, session in self._stages:
            if stage.nodes:
                feeds = {name: values[name] for name in stage.inputs}
                with reading(ONNX_RUN, self.path):
                    found = session.run(list(stage.outputs), feeds)
                values.update(zip(stage.outputs, found, strict=True))
            for index in stage.ffns:
                before, after, width = self._edges[index]
                x = self._rows(before, values[before], ids.shape, width)
                y: Tensor = self._weights.ffns[index](x)
                values[after] = (y.reshape(-1, width) if self._flat[index] else y).detach().numpy()
        return self._output(values, keep_cache)

    def run_whole(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Mapping[str, Array] | None = None,
        keep_cache: bool = False,
    ) -> DecoderOutput:
        """The file as it was given, in one piece; but with the FFNs of this model where their weights have been changed."""
        if self._state() != self._as_given:
            return self.run(ids, positions=positions, cache=cache, keep_cache=keep_cache)
        if self._whole is None:
            self._whole = self._session(self.path)
        given = self._feeds(ids.numpy(), None, cache)
        feeds = {self._source_names[name]: value for name, value in given.items()}
        for value in self._whole.get_inputs():
            # An input that the graph does not use was left out here.
            if value.name not in feeds:
                shape = [size if isinstance(size, int) else 1 for size in value.shape]
                feeds[value.name] = np.zeros(shape, dtype=helper.tensor_dtype_to_np_dtype(self._element(value)))
        names = [value.name for value in self._proto.graph.output]
        with reading(ONNX_RUN, self.path):
            found = self._whole.run([self._source_names[name] for name in names], feeds)
        return self._output(dict(zip(names, found, strict=True)), keep_cache)

    def _search(self) -> EagerFFNs:
        return self._matched

    def _state(self) -> list[tuple[int, int]]:
        """Which tensors the weights are, and how often they have been written to."""
        return [(id(parameter), parameter._version) for parameter in self._weights.parameters()]

    def _feeds(self, ids: Array, mask: Tensor | None, past: Mapping[str, Array] | None) -> dict[str, Array]:
        batch, sequence = ids.shape
        feeds: dict[str, Array] = {"input_ids": ids.astype(np.int64)}
        for name, (shape, dtype) in self._cache.items():
            feeds[name] = past[name] if past is not None else np.zeros((batch, shape[0], 0, shape[1]), dtype=dtype)
        before = next((feeds[name].shape[2] for name in self._cache), 0)
        whole = np.ones((batch, before + sequence), dtype=np.int64) if mask is None else mask.numpy().astype(np.int64)
        feeds["attention_mask"] = whole
        feeds["position_ids"] = np.maximum(whole.cumsum(axis=1) - 1, 0)[:, before:]
        return {name: value for name, value in feeds.items() if name in self._inputs}

    def _output(self, values: Mapping[str, Array], keep_cache: bool) -> DecoderOutput:
        past = {name: values[name.replace("past_key_values", "present")] for name in self._cache} if keep_cache else None
        return DecoderOutput(torch.from_numpy(values["logits"]).float(), past)

    def _build(self, stages: Sequence[Stage]) -> None:
        types = {value.name: value.type for value in self._proto.graph.input}
        types.update({after: _tensor_type(onnx.TensorProto.FLOAT) for _, after, _ in self._edges})
        for stage in stages:
            proto = onnx.ModelProto(ir_version=self._proto.ir_version, opset_import=self._proto.opset_import)
            proto.functions.extend(self._proto.functions)
            proto.graph.name = "stage"
            proto.graph.node.extend(stage.nodes)
            proto.graph.initializer.extend(stage.initializers)
            for name in stage.inputs:
                proto.graph.input.append(onnx.ValueInfoProto(name=name, type=types[name]))
            # Results have no type here: ONNX Runtime infers it, and the stages that read them are told.
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in stage.outputs)
            session = self._session(proto) if stage.nodes else None
            if session is not None:
                for value in session.get_outputs():
                    types[value.name] = _tensor_type(self._element(value))
            self._stages.append((stage, session))

    def _session(self, model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4  # what goes wrong is in the exception too
        # Dozens of sessions take turns: threads that wait for work by spinning would take it from the one that has some.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not isinstance(model, Path):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path.parent))
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        with reading(ONNX_RUN, self.path):
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _element(self, value: Any) -> int:
        """The element type of an input or output of a session."""
        if value.type not in _ELEMENTS:
            raise UnsupportedModelError(f"{self.path}: {value.name!r} is a {value.type}; a tensor of numbers is wanted")
        return int(_ELEMENTS[value.type])

    def _rows(self, name: str, found: Array, ids: Sequence[int], width: int) -> Tensor:
        """The input of an FFN as [batch, sequence, width]."""
        if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.size != math.prod(ids) * width:
            raise UnsupportedModelError(
                f"{self.path}: {name!r}, which an FFN reads, is {np.shape(found)} for tokens {tuple(ids)}; wanted are rows of "
                f"{width} numbers"
            )
        return torch.from_numpy(found).reshape(*ids, width)


_ELEMENTS = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(int16)": onnx.TensorProto.INT16,
    "tensor(int8)": onnx.TensorProto.INT8,
    "tensor(uint64)": onnx.TensorProto.UINT64,
    "tensor(uint32)": onnx.TensorProto.UINT32,
    "tensor(uint16)": onnx.TensorProto.UINT16,
    "tensor(uint8)": onnx.TensorProto.UINT8,
    "tensor(bool)": onnx.TensorProto.BOOL,
}
"""Of a session's inputs and outputs, by what ONNX Runtime calls them."""


def _tensor_type(element: int) -> onnx.TypeProto:
    """A tensor of unknown shape."""
    return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=element))


def _linear(weight: MatrixSource, bias: VectorSource | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(rows, columns, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(torch.from_numpy(np.array(weight.read().T, dtype=np.float32, order="C")), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(torch.from_numpy(np.array(bias.read(), dtype=np.float32)), requires_grad=False)
    return linear


def _cache_shape(value: ir.Value, path: Path) -> tuple[int, int]:
    """(heads, head size) of keys or values."""
    sizes = [fixed_size(size) for size in value.shape or ()]
    if len(sizes) != 4 or sizes[1] is None or sizes[3] is None:
        raise UnsupportedModelError(
            f"{path}: cache input {value.name!r} has shape {value.shape}; wanted is [batch, heads, past, head_dim], with "
            "numbers for heads and head_dim"
        )
    return sizes[1], sizes[3]
