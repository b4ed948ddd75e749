"""Run an exported engine with nothing but ONNX Runtime and NumPy: what any program in any language has to do.

    python samples/plain_onnxruntime.py build/quickstart/smollm2 504 5565 282 6181 314

The numbers are token ids; the folder's `tokenizer.json` is the model's own. `clada_export` is not imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

NEW_TOKENS = 16


def open_engine(folder: Path) -> tuple[ort.InferenceSession, dict[str, Any]]:
    """The session and the manifest. The one special line registers the library with the SparseFFN op."""
    manifest = json.loads((folder / "clada.json").read_text())
    options = ort.SessionOptions()
    options.register_custom_ops_library(str((folder / manifest["library"]).resolve()))
    session = ort.InferenceSession(str(folder / manifest["model"]), options, providers=["CPUExecutionProvider"])
    return session, manifest


def empty_cache(manifest: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    """No past: the axes that grow have length 0 (bfloat16 caches have no NumPy type and are not shown here)."""
    cache = {}
    for tensor in manifest["cache"]:
        shape = [0 if isinstance(axis, str) else axis for axis in tensor["shape"][1:]]
        cache[tensor["past"]] = np.zeros([batch, *shape], tensor["dtype"])
    return cache


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
    session, manifest = open_engine(folder)
    wanted = {value.name for value in session.get_inputs()}
    cache = empty_cache(manifest, batch=1)

    # The prompt runs dense: load = +inf for each of its tokens.
    tokens, load, total, made = prompt, np.inf, 0, []
    for _ in range(NEW_TOKENS):
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total + len(tokens)), np.int64),
            "position_ids": np.arange(total, total + len(tokens), dtype=np.int64)[None],
            "load": np.full((1, len(tokens)), load, np.float32),
            **cache,
        }
        names = [value.name for value in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
        total += len(tokens)
        # `present` becomes the next step's `past`. (To hand it over without a copy, use `run_with_ort_values`.)
        cache = {tensor["past"]: outputs[tensor["present"]] for tensor in manifest["cache"]}

        logits = outputs["logits"][0, -1]
        token = int(logits.argmax())
        made.append(token)
        # From here on each token runs the neurons that it needs: more of them where the text is hard to predict.
        tokens, load = [token], next_load(manifest["load_signal"], logits, token)
    print(*made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
