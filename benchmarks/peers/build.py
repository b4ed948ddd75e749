"""Peers from the same full-precision weights, quantised by their own tools."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.decode import say
from clada_export.errors import BackendError

LLAMA_TYPES = ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q5_1", "Q4_K_M", "Q4_0", "Q4_1")
GENAI_PRECISIONS = ("fp32", "int8", "int4")

_QUANTISE = """
import sys, llama_cpp
source, target, name = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, ("LLAMA_FTYPE_ALL_" if name == "F32" else "LLAMA_FTYPE_MOSTLY_") + name)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))
"""


def build_llama(model: str, work: Path, types: Sequence[str], python: str, converter: Path) -> Iterator[Path]:
    """GGUF files of these types: llama.cpp's converter writes float32, its quantiser makes the others from that.

    Raises:
        BackendError: one of its tools failed; it has said why on stderr.
    """
    whole = work / "F32.gguf"
    if not whole.is_file():
        part = whole.with_suffix(".part")
        _run([python, str(converter), model, "--outfile", str(part), "--outtype", "f32"])
        part.replace(whole)
    for name in types:
        path = work / f"{name}.gguf"
        if not path.is_file():
            part = path.with_suffix(".part")
            _run([python, "-c", _QUANTISE, str(whole), str(part), name])
            part.replace(path)
        yield path


def build_genai(model: str, work: Path, precisions: Sequence[str], python: str) -> Iterator[Path]:
    """Folders of these precisions, by onnxruntime-genai's model builder, for the CPU.

    Raises:
        BackendError: it failed; it has said why on stderr.
    """
    for precision in precisions:
        folder = work / f"genai-{precision}"
        if not folder.is_dir():
            part = folder.with_name(folder.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            builder = [python, "-m", "onnxruntime_genai.models.builder"]
            kept = ["-o", str(part), "-c", str(work / "genai-cache")]
            _run([*builder, "-i", model, "-p", precision, "-e", "cpu", *kept])
            part.rename(folder)
        yield folder


def _run(command: Sequence[str]) -> None:
    say(" ".join(word for word in command if "\n" not in word))
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise BackendError(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise BackendError(f"{command[0]}: exit code {done.returncode}; it says why above")
