"""An ONNX Runtime session over an exported graph: opens it, and hands the state of one step to the next without a copy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from clada_export.artifact.manifest import CacheTensor, Manifest
from clada_export.errors import BackendError, UsageError
from clada_export.foreign import ENGINE_GRAPH, ENGINE_RUN, OP_LIBRARY, reading
from clada_export.runtime.cache import State, bind, grow, sizes
from clada_export.runtime.devices import CPU, CUDA, CUDA_PROVIDER, INSTALL, providers
from clada_export.runtime.graph import ENTROPY, KEPT_LOGITS, LOAD_OUTPUTS, LOG_SUM_EXP, PassOutput

_FED_INPUTS = {
    "input_ids": "int64",
    "attention_mask": "int64",
    "position_ids": "int64",
    "load": "float32",
    KEPT_LOGITS: "int64",
}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "float64": 11, "int64": 7, "int32": 6}
_NAMES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float64": "tensor(double)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}
_RESULTS = {
    "logits": ("tensor(float)", "tensor(float16)"),
    "active_neurons": ("tensor(int32)",),
    LOG_SUM_EXP: ("tensor(float)",),
    ENTROPY: ("tensor(float)",),
}
_RUNTIME = f"ONNX Runtime {ort.__version__}"
_GROWING_TYPES = ("float32", "float16")
IN_PLACE_RUN = 256
"""Columns of one run where caches grow in place: attention of more columns at once does not fit the processor's caches."""


class GraphSession:
    """A graph with state.

    Args:
        folder: the export.
        manifest: its manifest.
        library: the custom-op library to register; None runs the op's function body, which needs none.
        threads: threads of one operator; None takes one for each core that this process may use.
        library_name: what messages call the library, where it is loaded from a copy.
        packed: let ONNX Runtime keep copies of the matrices of its own products, packed for its kernels: faster prompts and
            batches. False leaves all weights in the file, which is mapped: the system can take back every page of it.
        device: `cpu` or `cuda`. On a GPU, what operators it lacks run on the CPU, and the state stays in its memory.

    Raises:
        BackendError: ONNX Runtime can't load the library or the graph, or can't use the GPU.
        UsageError: the graph does not have the inputs and outputs that the manifest names, with their types and shapes.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        library: Path | None,
        threads: int | None,
        *,
        library_name: Path | None = None,
        device: str = CPU,
        packed: bool = True,
    ) -> None:
        self._device = device
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if library is not None:
            with reading(OP_LIBRARY, f"{library_name or library}: {_RUNTIME}"):
                options.register_custom_ops_library(str(library))
        self._model = folder / manifest.model
        _require_utf8(self._model)
        with reading(ENGINE_GRAPH, f"{self._model}: {_RUNTIME}"):
            self._session = ort.InferenceSession(str(self._model), options, providers=providers(device))
        # A provider that does not come up is left out by ONNX Runtime, with a line on stderr.
        if device == CUDA and CUDA_PROVIDER not in self._session.get_providers():
            raise BackendError(
                f"{self._model}: {_RUNTIME} can't use its CUDA provider (it says why above; often CUDA or cuDNN of the wrong "
                f"version): {INSTALL}, or run on the CPU: device cpu"
            )
        self._cache = manifest.cache
        self.longest_run: int | None = None
        self.max_batch: int | None = None
        self.max_tokens: int | None = None
        # What has a value of its own need not be fed.
        found = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_overridable_initializers())}
        self.inputs = set(found) & {*_FED_INPUTS, *(value.name for value in self._session.get_inputs())}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._check_names(outputs)
        self._results = ["logits", *(["active_neurons"] if "active_neurons" in outputs else [])]
        # Only where the manifest lists them: a graph of someone else may call other things so.
        if {spec.name for spec in manifest.outputs} & outputs.keys() >= {*LOAD_OUTPUTS}:
            self._results += LOAD_OUTPUTS
        self._check_types(found, outputs)
        self._growing = [tensor for tensor in self._cache if tensor.in_place is not None]
        self._handed = [tensor for tensor in self._cache if tensor.in_place is None]
        if self._growing:
            self._check_growing()
            # A merged FFN is made of the first run: it has to see as much of the prompt as ever.
            self.longest_run = None if any(tensor.role.startswith("merged") for tensor in self._cache) else IN_PLACE_RUN
        self._output_names = [*self._results, *(tensor.present for tensor in self._handed)]

    def _check_names(self, outputs: Mapping[str, Any]) -> None:
        unknown = self.inputs - set(_FED_INPUTS) - {tensor.past for tensor in self._cache}
        if unknown:
            raise UsageError(
                f"{self._model}: graph input {sorted(unknown)[0]!r} is neither a known one nor in the manifest's cache"
            )
        missing = [name for tensor in self._cache for name in (tensor.past,) if name not in self.inputs]
        missing += [name for name in ("logits", *(tensor.present for tensor in self._cache)) if name not in outputs]
        if missing or "input_ids" not in self.inputs:
            raise UsageError(f"{self._model}: the graph has no input or output {(missing or ['input_ids'])[0]!r}")

    def _check_types(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """What is fed and taken has to have the types and ranks that the engine knows; the cache those of the manifest."""
        wanted = {name: (_NAMES[kind],) for name, kind in _FED_INPUTS.items() if name in inputs}
        wanted |= {tensor.past: (_NAMES[tensor.dtype],) for tensor in self._cache}
        for name, types in wanted.items():
            if inputs[name].type not in types:
                raise UsageError(f"{self._model}: input {name!r} is {inputs[name].type}; {types[0]} is wanted")
        for name in self._results:
            if outputs[name].type not in _RESULTS[name]:
                raise UsageError(
                    f"{self._model}: output {name!r} is {outputs[name].type}; {' or '.join(_RESULTS[name])} is wanted"
                )
        for tensor in self._cache:
            # The state is made by the manifest's sizes: they have to be the graph's, whatever the manifest says.
            if not _agree(tensor.shape, inputs[tensor.past].shape):
                raise UsageError(
                    f"{self._model}: input {tensor.past!r} is {list(inputs[tensor.past].shape)}, and the manifest's cache says "
                    f"{list(tensor.shape)}"
                )

    def _check_growing(self) -> None:
        for tensor in self._growing:
            axis = tensor.in_place or 0
            named = [index for index, size in enumerate(tensor.shape) if index and isinstance(size, str)]
            if named != [axis] or tensor.dtype not in _GROWING_TYPES or "attention_mask" not in self.inputs:
                raise UsageError(
                    f"{self._model}: the manifest says that {tensor.past!r}, {tensor.dtype} {list(tensor.shape)}, grows in "
                    f"place on axis {axis}; wanted {' or '.join(_GROWING_TYPES)}, that axis alone, an input 'attention_mask'"
                )

    def empty_state(self, batch: int) -> State:
        """The state before the first step, for `batch` sequences."""
        handed = {}
        for tensor, shape in zip(self._handed, sizes(self._handed, batch).values(), strict=True):
            with reading(ENGINE_RUN, f"{self._model}: {_RUNTIME}"):
                if 0 not in shape:  # a statistic: it starts at zero, and memory from ORT is not cleared
                    handed[tensor.past] = _zeros(shape, tensor.dtype)
                else:
                    handed[tensor.past] = ort.OrtValue.ortvalue_from_shape_and_type(shape, _ONNX_TYPES[tensor.dtype], "cpu")
        return State(handed)

    def run(self, feeds: Mapping[str, npt.NDArray[np.generic]], state: State) -> PassOutput:
        """Run the graph once.

        Args:
            feeds: arrays by input name; those the graph does not have are left out.
            state: from `empty_state` or the run before; its memory is read in place, and written where it grows in place.

        Raises:
            BackendError: ONNX Runtime fails, or the graph gives something else than it says.
        """
        inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in feeds.items()
            if name in self.inputs
        }
        with reading(ENGINE_RUN, f"{self._model}: {_RUNTIME}"):
            if self._growing:
                values = self._outputs_in_place({**inputs, **state.handed}, state, feeds)
            else:
                values = self._outputs({**inputs, **state.handed})
        first = len(self._results)
        found = {name: value.numpy() for name, value in zip(self._results, values[:first], strict=True)}
        self._check_shapes(found, feeds)
        state.handed = {
            tensor.past: state.handed[tensor.past] if _is_kept(tensor, value) else value
            for tensor, value in zip(self._handed, values[first:], strict=True)
        }
        return PassOutput(
            logits=found["logits"].astype(np.float32, copy=False),
            active=found.get("active_neurons"),
            state=state,
            log_sum_exp=found.get(LOG_SUM_EXP),
            entropy=found.get(ENTROPY),
        )

    def _outputs(self, inputs: Mapping[str, ort.OrtValue]) -> Sequence[ort.OrtValue]:
        """Run the graph; results in the host's memory, the state in the device's."""
        if self._device == CPU:
            return self._session.run_with_ort_values(self._output_names, inputs)  # type: ignore[no-any-return]
        binding = self._session.io_binding()
        self._bind(binding, inputs)
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()  # type: ignore[no-any-return]

    def _outputs_in_place(
        self, inputs: Mapping[str, ort.OrtValue], state: State, feeds: Mapping[str, npt.NDArray[Any]]
    ) -> Sequence[ort.OrtValue]:
        """The same where caches grow: they are bound once for each memory, the rest for each run."""
        batch, columns = feeds["attention_mask"].shape
        if grow(state, self._growing, batch, columns) or state.binding is None:
            state.binding = self._session.io_binding()
            bind(state.binding, state, self._growing)
        self._bind(state.binding, inputs)
        self._session.run_with_iobinding(state.binding)
        state.used = columns
        # Outputs come in the order in which they were bound: caches first.
        values = state.binding.get_outputs_as_ortvaluevector()
        return [ort.OrtValue(values[len(self._growing) + index]) for index in range(len(self._output_names))]

    def _bind(self, binding: ort.IOBinding, inputs: Mapping[str, ort.OrtValue]) -> None:
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name, CPU if name in self._results else self._device)

    def _check_shapes(self, found: Mapping[str, npt.NDArray[Any]], feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        batch, tokens = feeds["input_ids"].shape
        kept = int(feeds[KEPT_LOGITS][0]) if KEPT_LOGITS in feeds and KEPT_LOGITS in self.inputs else 0
        wanted: dict[str, tuple[int | None, ...]] = {
            "logits": (batch, min(kept, tokens) or tokens, None),
            "active_neurons": (batch, None, tokens),
            LOG_SUM_EXP: (batch,),
            ENTROPY: (batch,),
        }
        for name, array in found.items():
            same = len(array.shape) == len(wanted[name]) and all(
                size == axis or (axis is None and size > 0) for size, axis in zip(array.shape, wanted[name], strict=True)
            )
            if not same:
                text = ", ".join("any" if axis is None else str(axis) for axis in wanted[name])
                raise BackendError(f"{self._model}: the graph gave {name!r} of shape {list(array.shape)}; [{text}] is wanted")


def _require_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path}: its path is no UTF-8, and ONNX Runtime opens no such files; rename it") from error


def _zeros(shape: Sequence[int], dtype: str) -> ort.OrtValue:
    if dtype == "bfloat16":  # NumPy has none; its zero has the same bits
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), _ONNX_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))


def _agree(told: Sequence[int | str], found: Sequence[int | str | None]) -> bool:
    """Whether the manifest's shape of a cache tensor is that of the graph; the first axis is the number of sequences."""
    return (
        bool(told)
        and len(told) == len(found)
        and all(axis == size or not isinstance(size, int) for axis, size in zip(told[1:], found[1:], strict=False))
    )


def _is_kept(tensor: CacheTensor, value: ort.OrtValue) -> bool:
    """Whether the state before the run goes on: a merged FFN comes out empty from a run that did not merge."""
    return tensor.role.startswith("merged") and value.shape()[0] == 0
