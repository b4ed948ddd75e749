"""An ONNX Runtime session over an exported graph: opens it, and hands the state of one step to the next without a copy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from clada_export.errors import BackendError, UsageError
from clada_export.manifest import CacheTensor, Manifest
from clada_export.runtime.graph import ENTROPY, LOAD_OUTPUTS, LOG_SUM_EXP, PassOutput

_FED_INPUTS = ("input_ids", "attention_mask", "position_ids", "load")
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "float64": 11, "int64": 7, "int32": 6}
_LOGITS_TYPES = ("tensor(float)", "tensor(float16)")


class GraphSession:
    """A graph with state.

    Args:
        folder: the export.
        manifest: its manifest.
        library: the custom-op library to register; None runs the op's function body, which needs none.
        threads: threads of one operator; None takes one for each core that this process may use.

    Raises:
        BackendError: ONNX Runtime can't load the library or the graph.
        UsageError: the graph does not have the inputs and outputs that the manifest names.
    """

    def __init__(self, folder: Path, manifest: Manifest, library: Path | None, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if library is not None:
            try:
                options.register_custom_ops_library(str(library))
            except Exception as error:  # ORT's exceptions share no base of their own
                raise BackendError(
                    f"{library}: ONNX Runtime {ort.__version__} can't load the custom-op library: {error}; "
                    "build or install clada-export for this machine, and export again"
                ) from error
        model = folder / manifest.model
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"{model}: ONNX Runtime {ort.__version__} can't load the graph: {error}") from error
        self._cache = manifest.cache
        self.longest_run: int | None = None
        self.max_batch: int | None = None
        self.max_tokens: int | None = None
        self.inputs = {value.name for value in self._session.get_inputs()}
        outputs = {value.name: value.type for value in self._session.get_outputs()}
        self._check_names(model, outputs)
        self._results = ["logits", *(["active_neurons"] if "active_neurons" in outputs else [])]
        # Only where the manifest lists them: a graph of someone else may call other things so.
        if {spec.name for spec in manifest.outputs} & outputs.keys() >= {*LOAD_OUTPUTS}:
            self._results += LOAD_OUTPUTS
        self._output_names = [*self._results, *(tensor.present for tensor in self._cache)]

    def _check_names(self, model: Path, outputs: Mapping[str, str]) -> None:
        unknown = self.inputs - set(_FED_INPUTS) - {tensor.past for tensor in self._cache}
        if unknown:
            raise UsageError(f"{model}: graph input {sorted(unknown)[0]!r} is neither a known one nor in the manifest's cache")
        missing = [name for tensor in self._cache for name in (tensor.past,) if name not in self.inputs]
        missing += [name for name in ("logits", *(tensor.present for tensor in self._cache)) if name not in outputs]
        if missing or "input_ids" not in self.inputs:
            raise UsageError(f"{model}: the graph has no input or output {(missing or ['input_ids'])[0]!r}")
        if outputs["logits"] not in _LOGITS_TYPES:
            raise UsageError(f"{model}: output 'logits' is {outputs['logits']}; {' or '.join(_LOGITS_TYPES)} is wanted")

    def empty_state(self, batch: int) -> dict[str, ort.OrtValue]:
        """The state before the first step, for `batch` sequences: by input name, with growing axes of length 0."""
        state = {}
        for tensor in self._cache:
            shape = [batch, *(0 if isinstance(axis, str) else axis for axis in tensor.shape[1:])]
            if 0 not in shape:  # a statistic: it starts at zero, and memory from ORT is not cleared
                state[tensor.past] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=tensor.dtype))
            else:
                state[tensor.past] = ort.OrtValue.ortvalue_from_shape_and_type(shape, _ONNX_TYPES[tensor.dtype], "cpu")
        return state

    def run(self, feeds: Mapping[str, npt.NDArray[np.generic]], state: Mapping[str, ort.OrtValue]) -> PassOutput:
        """Run the graph once.

        Args:
            feeds: arrays by input name; those the graph does not have are left out.
            state: from `empty_state` or the run before; its memory is read in place.

        Raises:
            BackendError: ONNX Runtime fails.
        """
        inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in feeds.items()
            if name in self.inputs
        }
        try:
            values = self._session.run_with_ort_values(self._output_names, {**inputs, **state})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the graph: {error}") from error
        first = len(self._results)
        found = {name: value.numpy() for name, value in zip(self._results, values[:first], strict=True)}
        return PassOutput(
            logits=found["logits"].astype(np.float32, copy=False),
            active=found.get("active_neurons"),
            state={
                tensor.past: state[tensor.past] if _is_kept(tensor, value) else value
                for tensor, value in zip(self._cache, values[first:], strict=True)
            },
            log_sum_exp=found.get(LOG_SUM_EXP),
            entropy=found.get(ENTROPY),
        )


def _is_kept(tensor: CacheTensor, value: ort.OrtValue) -> bool:
    """Whether the state before the run goes on: a merged FFN comes out empty from a run that did not merge."""
    return tensor.role.startswith("merged") and value.shape()[0] == 0
