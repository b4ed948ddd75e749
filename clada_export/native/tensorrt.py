"""Which TensorRT is used, and what has to be done before and after its calls.

Classic TensorRT (module `tensorrt`) builds for the GPU it finds. TensorRT-RTX (module `tensorrt_rtx`) builds anywhere, for GPUs
named by compute capability, and compiles kernels when an engine is loaded. Both have one Python API, so a `Backend` holds the
module and every caller takes it from there; neither is imported until it is asked for.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clada_export.errors import BackendError
from clada_export.foreign import PLUGIN_LIBRARY, reading
from clada_export.native.sealed import sealed_copy
from graph_passes.op import DOMAIN, OP_TYPE, OP_VERSION

CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
EXTRAS = {CLASSIC: "clada-export[trt]", RTX: "clada-export[rtx]"}
PLUGIN_VERSION = str(OP_VERSION)
"""What the nodes ask for by their attribute `plugin_version`."""

_log = logging.getLogger("clada_export.tensorrt")
_RTX_LIBRARY = "libtensorrt_rtx.so"
_REPEATED = ("already exists, the output tensors", "Make sure input")
"""Warnings of the parser that are there for every model: a function used twice, and inputs of 64-bit integers."""


@dataclass
class Messages:
    """What TensorRT said, by a logger that can't raise: exceptions must not cross its C++ frames.

    Attributes:
        errors: messages of severity error, in order.
        interrupted: an exception (Ctrl-C) that came while TensorRT ran; `raise_interrupt` raises it afterwards.
    """

    errors: list[str] = field(default_factory=list)
    interrupted: BaseException | None = None

    def take(self) -> str:
        """The errors so far as one text, once."""
        text = "; ".join(dict.fromkeys(" ".join(message.split()) for message in self.errors))
        self.errors.clear()
        return text

    def raise_interrupt(self) -> None:
        """Raise what was held back."""
        held, self.interrupted = self.interrupted, None
        if held is not None:
            raise held


@dataclass(frozen=True)
class Backend:
    """An importable TensorRT. `trt` is its module, `logger` an `ILogger` that fills `messages`."""

    name: str
    version: str
    trt: Any
    logger: Any
    messages: Messages

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == RTX

    @property
    def title(self) -> str:
        """Name and version for messages."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"


def find_backend() -> Backend:
    """Classic TensorRT where it is installed and there is a GPU, else TensorRT-RTX.

    Raises:
        BackendError: neither can be used; says what to install.
    """
    if importlib.util.find_spec(CLASSIC) is not None and missing_gpu() is None:
        return load_backend(CLASSIC)
    if importlib.util.find_spec(RTX) is not None:
        return load_backend(RTX)
    if importlib.util.find_spec(CLASSIC) is not None:
        raise BackendError(
            f"TensorRT is installed, and it builds only where the GPU is ({missing_gpu()}); to build here, get TensorRT-RTX: "
            f"pip install '{EXTRAS[RTX]}'"
        )
    raise BackendError(
        f"--target trt needs TensorRT: pip install '{EXTRAS[RTX]}' (builds on any machine, for GeForce and RTX GPUs) or "
        f"pip install '{EXTRAS[CLASSIC]}' (builds for the GPU of this machine)"
    )


@functools.cache
def load_backend(name: str) -> Backend:
    """Import a TensorRT by its module's name and make it ready to parse. A process has one: TensorRT keeps its first logger.

    Raises:
        BackendError: it is not installed or can't be imported; says what to install.
    """
    try:
        trt = importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{name} can't be imported ({error}): pip install '{EXTRAS[name]}'") from error
    if name == RTX:
        provide_rtx_library()
    messages = Messages()
    return Backend(name, str(trt.__version__), trt, make_logger(trt, messages), messages)


def missing_gpu() -> str | None:
    """Why no NVIDIA GPU can be used here, or None if one can."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver: libcuda.so.1 was not found"
    status = cuda.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = cuda.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return f"the NVIDIA driver reports error {status}"
    return None if count.value else "the NVIDIA driver finds no GPU"


def gpu_capability() -> str | None:
    """The compute capability of the first GPU, like `8.9`, or None without one."""
    if missing_gpu() is not None:
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    for attribute, value in ((75, major), (76, minor)):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
    return f"{major.value}.{minor.value}"


# --- messages ---


def make_logger(trt: Any, messages: Messages) -> Any:
    """An `ILogger` that hands messages to Python's `logging` (`clada_export.tensorrt`) and keeps errors."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.INFO,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            try:
                level = levels.get(severity, logging.INFO)
                if level == logging.ERROR:
                    messages.errors.append(message)
                # Errors become exceptions with the text in them; only what nobody else reports is logged above `info`.
                repeated = any(part in message for part in _REPEATED)
                shown = logging.DEBUG if level == logging.ERROR or repeated else level
                _log.log(shown, "%s", message)
            except BaseException as error:
                messages.interrupted = error

    return Logger()


def make_monitor(backend: Backend, step: Callable[[str, int, int], None]) -> Any:
    """An `IProgressMonitor` that reports the build's phases; a Ctrl-C cancels the build.

    Args:
        step: called with what the build is at, how many steps are done, and how many there are.
    """
    trt, messages = backend.trt, backend.messages

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def _report(self, phase: str, done: int) -> None:
            try:
                step(phase, done, self.steps.get(phase, 0))
            except BaseException as error:
                messages.interrupted = error

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self.steps.get(phase_name, 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return messages.interrupted is None

    return Monitor()


# --- the plugin library ---


def plugin_creator(registry: Any) -> Any:
    """The creator of the op's plugin by name, version and namespace, or None."""
    return registry.get_creator(OP_TYPE, PLUGIN_VERSION, DOMAIN)


def load_plugin(backend: Backend, registry: Any, library: Path, name: Path | None = None) -> None:
    """Register the plugin of a library; nothing happens if one is registered already.

    Args:
        registry: of a builder or a runtime, or the global one.
        name: what messages call the library, where it is loaded from a copy.

    Raises:
        BackendError: the library can't be loaded, or does not hold the plugin; says which name, version and namespace.
    """
    if plugin_creator(registry) is not None:
        return
    wanted = f"{DOMAIN}::{OP_TYPE} version {PLUGIN_VERSION}"
    shown = name or library
    if not library.is_file():
        raise BackendError(f"{shown}: the TensorRT plugin library is missing; copy the whole export, or export again")
    backend.messages.take()
    with reading(PLUGIN_LIBRARY, f"{shown}: {backend.title}"):
        handle = registry.load_library(str(library))
    if plugin_creator(registry) is not None:
        return
    held = [creator for creator in registry.all_creators if creator.name == OP_TYPE]
    found = ", ".join(f"{creator.plugin_namespace}::{creator.name} version {creator.plugin_version}" for creator in held)
    said = backend.messages.take() or ("it was loaded" if handle is not None else "no reason given")
    raise BackendError(
        f"{shown}: {backend.title} finds no plugin {wanted} in it (found: {found or 'none of that name'}; TensorRT: {said})"
    )


# --- the missing name of the RTX library ---


def provide_rtx_library() -> None:
    """Make `dlopen("libtensorrt_rtx.so")` find the library that is loaded already.

    The ONNX parser opens the library by that name when it meets a plugin, and the wheel has only `libtensorrt_rtx.so.1`: the
    process would end there with an abort, not an exception. An empty shared object with that name, which depends on the
    loaded library, is loaded from memory; nothing is written and no compiler is needed.

    Raises:
        BackendError: neither that nor a temporary file can be loaded; says what to link.
    """
    if _can_open(_RTX_LIBRARY):
        return
    image = stub_library(_RTX_LIBRARY, f"{_RTX_LIBRARY}.1")
    try:
        ctypes.CDLL(str(sealed_copy(image, _RTX_LIBRARY)))
        why = "it was loaded, and is not found by its name"
    except OSError as error:
        why = str(error)
    if _can_open(_RTX_LIBRARY):
        return
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folder = str(Path(spec.origin).parent) if spec is not None and spec.origin else "the folder of libtensorrt_rtx.so.1"
    raise BackendError(
        f"TensorRT-RTX's ONNX parser needs {_RTX_LIBRARY}, and the wheel has only {_RTX_LIBRARY}.1; it could not be provided "
        f"({why}). Link it: ln -s {_RTX_LIBRARY}.1 {folder}/{_RTX_LIBRARY}, and set LD_LIBRARY_PATH={folder}"
    )


def _can_open(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def stub_library(name: str, needed: str) -> bytes:
    """A shared object (ELF, 64 bit) without code, called `name`, that depends on the library `needed`.

    A symbol that is looked up in it is found in what it depends on.
    """
    machine = {"x86_64": 62, "aarch64": 183}.get(platform.machine())
    if machine is None:
        raise BackendError(f"TensorRT-RTX runs on x86-64 and AArch64, and this is {platform.machine()}")
    header, program_header, symbol = 64, 56, 24
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    strings += b"\0" * (-len(strings) % 8)
    symbols_at = header + 3 * program_header
    hash_at = symbols_at + symbol
    strings_at = hash_at + 16
    dynamic_at = strings_at + len(strings)
    # DT_NEEDED, DT_SONAME, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    entries = [(1, len(name) + 2), (14, 1), (4, hash_at), (5, strings_at), (6, symbols_at)]
    entries += [(10, len(strings)), (11, symbol), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = dynamic_at + len(dynamic)

    def segment(kind: int, offset: int, length: int, alignment: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, 6, offset, offset, offset, length, length, alignment)

    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, header, 0, 0, header, program_header, 3, 64, 0, 0)
    # PT_LOAD, PT_DYNAMIC, PT_GNU_STACK (no executable stack); a page is at most 64 KiB.
    segments = segment(1, 0, size, 0x10000) + segment(2, dynamic_at, len(dynamic), 8) + segment(0x6474E551, 0, 0, 16)
    hash_table = struct.pack("<IIII", 1, 1, 0, 0)
    return identity + elf + segments + bytes(symbol) + hash_table + strings + dynamic
