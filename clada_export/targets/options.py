"""What can be asked of TensorRT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clada_export.errors import UsageError

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


def merging_refused(policy: str) -> str:
    """Why TensorRT does not run a policy that merges experts."""
    return (
        f"policy {policy!r} does not run on TensorRT: merged weights are made only in runs that hold a dense token and kept "
        "otherwise, and a TensorRT engine can't leave out an output; use --target ort or another --policy"
    )


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
            UsageError: a number below 1, a compute capability that is not one, options that exclude each other.
        """
        for name in ("max_batch", "max_sequence", "max_past"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not self.compute_capabilities:
            raise UsageError("--compute-capability needs at least one, like 8.9")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise UsageError(f"--compute-capability {capability!r} is not one; give it like 8.9")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise UsageError(f"--compute-capability {' '.join(self.compute_capabilities)} names one twice")
        if self.embed_plugin and not self.plugin:
            raise UsageError("--embed-plugin and --no-plugin exclude each other")
        if self.timing_cache is not None and not self.timing_cache.absolute().parent.is_dir():
            raise UsageError(f"--timing-cache {self.timing_cache}: the folder {self.timing_cache.parent} does not exist")
