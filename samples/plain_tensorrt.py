"""Run an exported engine with nothing but TensorRT (or TensorRT-RTX), PyTorch for its GPU memory, and NumPy.

    python samples/plain_tensorrt.py OUT 504 5565 282 6181 314

OUT is what `clada-export --target trt` wrote; the numbers are token ids of one prompt. `clada_export` is not imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

NEW_TOKENS = 16


def open_engine(folder: Path, record: dict[str, Any]) -> Any:
    """The engine. The one special line registers the library with the SparseFFN plugin, before the engine is read."""
    trt: Any = importlib.import_module(record["backend"])
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    plugin = record["plugin"]
    if plugin is not None and plugin["embedded"]:
        runtime.engine_host_code_allowed = True
    elif plugin is not None:
        runtime.get_plugin_registry().load_library(str((folder / plugin["file"]).resolve()))
    engine = runtime.deserialize_cuda_engine((folder / record["files"][0]["file"]).read_bytes())
    if engine is None:
        sys.exit(f"the engine is for {record['package']} {record['version']} and GPUs {record['files'][0]}")
    return engine


def cache_buffers(manifest: dict[str, Any], tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two buffers for each key and value: a step reads one and writes the other, one token longer."""
    pairs = []
    for tensor in manifest["cache"]:
        shape = [1, *(tokens if isinstance(axis, str) else axis for axis in tensor["shape"][1:])]
        pairs.append(tuple(torch.zeros(shape, dtype=getattr(torch, tensor["dtype"]), device="cuda") for _ in range(2)))
    return pairs


def next_load(signal: dict[str, float], logits: np.ndarray, token: int) -> float:
    """The load of the next step from raw logits [V] and the token taken from them, in nats; by rule `exp`, the default."""
    shifted = logits.astype(np.float64) - logits.max()
    log_sum = np.log(np.exp(shifted).sum())
    surprisal = log_sum - shifted[token]
    entropy = log_sum - (np.exp(shifted - log_sum) * shifted).sum()
    load = signal["surprisal_weight"] * (surprisal - signal["surprisal_mean"]) / signal["surprisal_std"]
    load += signal["entropy_weight"] * (entropy - signal["entropy_mean"]) / signal["entropy_std"]
    return float(np.clip(load, -4.0, 4.0))


def main() -> int:
    """The command."""
    folder, prompt = Path(sys.argv[1]), [int(token) for token in sys.argv[2:]]
    manifest = json.loads((folder / "clada.json").read_text())
    if not torch.cuda.is_available():
        sys.exit("this sample needs an NVIDIA GPU and a PyTorch that can use it")
    engine = open_engine(folder, manifest["engine"])
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    stream = torch.cuda.Stream()
    # Profile 0 takes one new token, profile 1 a prompt; a context stays with one profile.
    contexts = [engine.create_execution_context() for _ in manifest["engine"]["profiles"]]
    for index, context in enumerate(contexts):
        context.set_optimization_profile_async(index, stream.cuda_stream)
    buffers = cache_buffers(manifest, len(prompt) + NEW_TOKENS)

    # The prompt runs dense: load = +inf for each of its tokens. (One longer than the profile takes would run in parts.)
    tokens, load, total, turn, made = prompt, np.inf, 0, 0, []
    for _ in range(NEW_TOKENS):
        context = contexts[0] if len(tokens) == 1 else contexts[-1]
        feeds = {
            "input_ids": torch.tensor([tokens]),
            "attention_mask": torch.ones(1, total + len(tokens), dtype=torch.int64),
            "position_ids": torch.arange(total, total + len(tokens))[None],
            "load": torch.full((1, len(tokens)), load, dtype=torch.float32),
        }
        on_gpu = {name: value.cuda() for name, value in feeds.items() if name in names}
        for name, value in on_gpu.items():
            context.set_input_shape(name, tuple(value.shape))
            context.set_tensor_address(name, value.data_ptr())
        for tensor, pair in zip(manifest["cache"], buffers, strict=True):
            shape = [1, *(total if isinstance(axis, str) else axis for axis in tensor["shape"][1:])]
            context.set_input_shape(tensor["past"], tuple(shape))
            context.set_tensor_address(tensor["past"], pair[turn].data_ptr())
            context.set_tensor_address(tensor["present"], pair[1 - turn].data_ptr())
        results = {}
        for output in manifest["outputs"]:
            if output["name"] in ("logits", "active_neurons"):
                shape = tuple(context.get_tensor_shape(output["name"]))
                results[output["name"]] = torch.empty(shape, dtype=getattr(torch, output["dtype"]), device="cuda")
                context.set_tensor_address(output["name"], results[output["name"]].data_ptr())
        torch.cuda.synchronize()  # the feeds were copied on another stream
        if not context.execute_async_v3(stream.cuda_stream):
            sys.exit("TensorRT could not run the engine")
        stream.synchronize()
        total, turn = total + len(tokens), 1 - turn

        logits = results["logits"][0, -1].float().cpu().numpy()
        token = int(logits.argmax())
        made.append(token)
        # From here on each token runs the neurons that it needs: more of them where the text is hard to predict.
        tokens, load = [token], next_load(manifest["load_signal"], logits, token)
    print(*made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
