"""What can be asked of TensorRT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clada_export.errors import UsageError
from clada_export.plan.ranges import BATCH, TOKENS, require_between

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class TensorRTOptions:
    """Options of `--target trt`; the defaults are those of the command line.

    Attributes:
        max_batch: sequences in one batch.
        max_sequence: prompt tokens in one run; longer prompts run in parts. None: 512, or what the model takes.
        max_past: tokens in the cache before a run. None: 2048, or what the model takes less one.
        compute_capabilities: GPUs that an engine of TensorRT-RTX is for. Classic TensorRT builds for the GPU it finds.
        plugin: False builds the op from its ONNX function body: dense arithmetic with a mask, no library needed.
        embed_plugin: put the plugin library into the engine file.
        refit: make an engine whose weights can be replaced.
        weight_streaming: make an engine whose weights need not all fit into GPU memory.
        timing_cache: a file that keeps timings between builds of classic TensorRT.
    """

    max_batch: int = 1
    max_sequence: int | None = None
    max_past: int | None = None
    compute_capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    plugin: bool = True
    embed_plugin: bool = False
    refit: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None

    def check(self) -> None:
        """Refuse what can be refused without TensorRT.

        Raises:
            UsageError: a number out of range, a timing cache that is no file, a compute capability that is not one, options
                that exclude each other.
        """
        require_between("--max-batch", self.max_batch, BATCH)
        require_between("--max-sequence", self.max_sequence, TOKENS)
        require_between("--max-past", self.max_past, TOKENS)
        if not self.compute_capabilities:
            raise UsageError("--compute-capability needs at least one, like 8.9")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability):
                raise UsageError(f"--compute-capability {capability!r} is not one; give it like 8.9")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise UsageError(f"--compute-capability {' '.join(self.compute_capabilities)} names one twice")
        if self.embed_plugin and not self.plugin:
            raise UsageError("--embed-plugin and --no-plugin exclude each other")
        if self.timing_cache is not None:
            _check_timing_cache(self.timing_cache)


def _check_timing_cache(path: Path) -> None:
    try:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--timing-cache {path}: the folder {path.parent} does not exist")
        if path.exists() and not path.is_file():
            raise UsageError(f"--timing-cache {path}: it is not a file")
    except OSError as error:
        raise UsageError(f"--timing-cache {path}: it can't be used: {error.strerror or error}") from error
