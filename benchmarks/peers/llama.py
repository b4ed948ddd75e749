"""llama.cpp through the low-level API of `llama-cpp-python`: `llama_decode` in a loop, and none of the Python around it."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.runner import Logits, Runner

CONTEXT = 2048
ERROR = 4
"""GGML_LOG_LEVEL_ERROR; below it is a line for every tensor."""


class LlamaRunner(Runner):
    """A GGUF file."""

    def __init__(self, path: str, threads: int, load: str) -> None:
        self._api: Any = importlib.import_module("llama_cpp")
        llama_cpp = self._api

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def log(level: int, text: bytes, user: object) -> None:
            if level == ERROR:
                sys.stderr.write(text.decode(errors="replace"))

        self._log = log  # llama.cpp keeps a bare pointer to it
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_settings)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp can't load it; it says why above")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, prompt: Sequence[int]) -> Logits:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._run(prompt)

    def step(self, token: int) -> Logits:
        return self._run([token])

    def _run(self, tokens: Sequence[int]) -> Logits:
        array = (self._api.llama_token * len(tokens))(*tokens)
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {code}")
        pointer = ctypes.cast(self._api.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))


def open_runner(path: str, threads: int, load: str) -> Runner:
    """`load` has no meaning here."""
    return LlamaRunner(path, threads, load)
