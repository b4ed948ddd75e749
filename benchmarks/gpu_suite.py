"""Everything that needs a GPU, in one run: build, conformance, kernels, ONNX Runtime, TensorRT, timings, compute-sanitizer.

For a machine with an NVIDIA GPU, nvcc, CMake and PyTorch, and no network. The headers of ONNX Runtime and TensorRT, which such
a machine may lack, are gathered where there is a network:

    python benchmarks/gpu_suite.py kit build/gpu-kit             # with a network; small, to be copied along
    python benchmarks/gpu_suite.py run --kit build/gpu-kit --out results

`results/gpu.json` says what passed, and holds the timings with the GPU, the driver and the commit; `results/*.log` hold what
the steps printed. A step that fails does not stop the others. The exit code is 1 if one failed. `--seconds` bounds the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HEADERS = {
    "tensorrt": (ROOT / "plugins" / "cmake" / "fetch_trt_headers.sh", "TENSORRT_INCLUDE_DIR"),
    "onnxruntime": (ROOT / "plugins" / "cmake" / "fetch_ort_headers.sh", "ONNXRUNTIME_INCLUDE_DIR"),
}


@dataclass
class Suite:
    """One run: where it writes, how long it may take, and what it found."""

    out: Path
    kit: Path | None
    deadline: float
    emulated: bool = False
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def build(self) -> Path:
        """The build folder."""
        return ROOT / "build" / ("gpu-emulated" if self.emulated else "gpu")

    @property
    def kernels(self) -> Path:
        """The library that is timed."""
        return self.build / "plugins" / "libclada_cuda_kernels.so"

    def environment(self) -> dict[str, str]:
        """For the steps: libraries of this build, and the repository on Python's path."""
        native = self.build / "plugins"
        made = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "CLADA_ORT_LIBRARY": str(native / "libclada_ort.so"),
            "CLADA_ORT_CUDA_LIBRARY": str(native / "libclada_ort_cuda.so"),
            "CLADA_TRT_LIBRARY": str(native / "libclada_trt.so"),
            "CLADA_PLUGIN_CONFORMANCE": str(self.build / "tests" / "op" / "native" / "plugin_conformance"),
        }
        if not self.emulated:  # or the tests would look for a GPU
            made["CLADA_CUDA_KERNELS"] = str(self.kernels)
        library = _cublas_folder()
        if library is not None:  # where PyTorch brings cuBLAS along, other programs do not find it by themselves
            made["LD_LIBRARY_PATH"] = os.pathsep.join([str(library), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        if self.kit is not None:
            for name, (_, variable) in HEADERS.items():
                if (self.kit / name).is_dir():
                    made[variable] = str(self.kit / name)
        return made

    def run(self, name: str, command: list[str], seconds: float, **changes: str) -> bool:
        """Run a step; its output goes to a log. A step that finds no time left is recorded as not run."""
        left = self.deadline - time.monotonic()
        if left < 10:
            self.steps[name] = {"passed": False, "summary": "not run: no time was left"}
            print(f"{name}: not run, no time left", flush=True)
            return False
        log = self.out / f"{name}.log"
        begin = time.monotonic()
        with log.open("w", encoding="utf-8") as stream:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self.environment() | changes,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=min(seconds, left),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
            except FileNotFoundError as error:
                stream.write(f"{error}\n")
                code = 127
        took = time.monotonic() - begin
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        summary = _summary(lines)
        self.steps[name] = {"passed": code == 0, "exit_code": code, "seconds": round(took, 1), "summary": summary}
        print(f"{name}: {'passed' if code == 0 else f'FAILED ({code})'} in {took:.0f} s: {summary}", flush=True)
        if code != 0:
            print("\n".join(f"    {line}" for line in lines[-15:]), flush=True)
        return code == 0


def _summary(lines: list[str]) -> str:
    """pytest's or compute-sanitizer's closing line, else the last one."""
    for pattern in (r"\b(passed|failed|skipped|error)\b.* in [0-9.]+s", r"ERROR SUMMARY|RACECHECK SUMMARY"):
        for line in reversed(lines):
            if re.search(pattern, line):
                return line.strip("= ")
    return lines[-1] if lines else ""


def _cublas_folder() -> Path | None:
    try:
        import nvidia
    except ImportError:
        return None
    for root in map(Path, nvidia.__path__):
        for path in sorted(root.glob("**/libcublasLt.so.*")):
            return path.parent
    return None


def make_kit(target: Path) -> int:
    """Gather the headers."""
    target.mkdir(parents=True, exist_ok=True)
    for name, (script, _) in HEADERS.items():
        subprocess.run(["bash", str(script), str(target / name)], check=True)
    print(target)
    return 0


def architecture() -> str:
    """The GPU's, as CMake names it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def build_steps(suite: Suite) -> bool:
    """Configure and build everything, for this GPU alone."""
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DCLADA_TRT=ON", "-DCLADA_TESTS=ON", "-DCLADA_BENCHMARKS=ON"]
    if suite.emulated:
        options.append("-DCLADA_CUDA_EMULATION=ON")
    else:
        options += ["-DCLADA_CUDA=ON", f"-DCLADA_CUDA_ARCHITECTURES={architecture()}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    if not suite.run("configure", ["cmake", "-S", str(ROOT), "-B", str(suite.build), *generator, *options], 120):
        return False
    return suite.run("build", ["cmake", "--build", str(suite.build), "--parallel", str(os.cpu_count() or 2)], 400)


def test_steps(suite: Suite) -> None:
    """The contract through the plugin, the kernels at real sizes, ONNX Runtime's CUDA provider, engines."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    suite.run("conformance", [*pytest, "tests/op/test_plugin.py", "-k", "not cuda_op_of_onnx_runtime"], 400)
    suite.run("kernels", [*pytest, "tests/op/test_cuda_kernels.py", "tests/gpu/test_kernels.py"], 400)
    suite.run("ort_cuda", [*pytest, "tests/gpu/test_ort_cuda.py"], 200)
    suite.run("engine", [*pytest, "tests/gpu/test_engine.py"], 300)


def benchmark_steps(suite: Suite, quick: bool) -> None:
    """Timings; with cuBLASLt, and once without it for the kernels' own GEMM."""
    script = [sys.executable, "benchmarks/ffn_cuda.py", "--library", str(suite.kernels)]
    if suite.emulated:
        tiny = ["--sizes", "64,96", "--rows", "1", "32", "--rounds", "1", "--dtypes", "float16", "--fractions", "1", "0.5"]
        suite.run("timings", [*script, *tiny, "--json", str(suite.out / "ffn_cuda.json")], 300)
        return
    small = ["--rows", "1", "16", "256", "--dtypes", "float16"] if quick else []
    suite.run("timings", [*script, *small, "--json", str(suite.out / "ffn_cuda.json")], 500)
    own = ["--sizes", "llama-7b", "--dtypes", "float16", "--rows", "256", "2048", "--rounds", "5"]
    suite.run("timings_own_gemm", [*script, *own, "--json", str(suite.out / "ffn_own_gemm.json")], 120, CLADA_CUBLASLT="off")


def sanitizer_steps(suite: Suite) -> None:
    """compute-sanitizer over the conformance program, on part of the contract's cases."""
    if suite.emulated:
        return
    tests = "tests/op/test_plugin.py::test_the_plugin_keeps_the_contract"
    for tool in SANITIZER_TOOLS:
        prefix = f"compute-sanitizer --tool {tool} --error-exitcode 9"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
        changes = {"CLADA_CONFORMANCE_PREFIX": prefix, "CLADA_CONFORMANCE_STRIDE": "9", "CLADA_CUBLASLT": "off"}
        suite.run(f"sanitizer_{tool}", command, 240, **changes)


def about() -> dict[str, Any]:
    """The machine and the sources."""
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    found = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]).split(", ")
    return {
        "gpu": dict(zip(query.split(","), found, strict=False)),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        **sources(),
        "python": sys.version.split()[0],
    }


def sources() -> dict[str, Any]:
    """The commit; where the sources were copied without their history, `CLADA_COMMIT` says it."""
    known = os.environ.get("CLADA_COMMIT")
    if known:
        return {"commit": known}
    git = ["git", "-C", str(ROOT)]
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"]).splitlines()
    return {"commit": _output([*git, "rev-parse", "HEAD"]), "changed_files": len(changed)}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


STEPS: dict[str, Callable[[Suite, argparse.Namespace], object]] = {
    "test": lambda suite, options: test_steps(suite),
    "benchmark": lambda suite, options: benchmark_steps(suite, options.quick),
    "sanitizer": lambda suite, options: sanitizer_steps(suite),
}


def run_suite(options: argparse.Namespace) -> int:
    """Run the steps and write what they found."""
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    kit = None if options.kit is None else options.kit.resolve()
    suite = Suite(out, kit, time.monotonic() + options.seconds, options.emulated)
    if build_steps(suite):
        for name in options.steps:
            STEPS[name](suite, options)
    result: dict[str, Any] = {"about": about() | {"emulated": suite.emulated}, "steps": suite.steps}
    for name in ("ffn_cuda", "ffn_own_gemm"):
        path = out / f"{name}.json"
        if path.is_file():
            result[name] = json.loads(path.read_text(encoding="utf-8"))
    (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, step in suite.steps.items() if not step["passed"]]
    print(
        f"{len(suite.steps) - len(failed)} of {len(suite.steps)} steps passed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kit = commands.add_parser("kit", help="gather the headers, with a network")
    kit.add_argument("folder", type=Path)
    run = commands.add_parser("run", help="run everything, on a machine with a GPU")
    run.add_argument("--kit", type=Path, help="what `kit` made; not needed where the headers are installed")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    run.add_argument("--quick", action="store_true", help="fewer timings")
    run.add_argument("--emulated", action="store_true", help="on the CPU, to try the script itself; times mean nothing")
    run.add_argument("--seconds", type=float, default=1700, help="for the whole")
    options = parser.parse_args(arguments)
    return make_kit(options.folder) if options.command == "kit" else run_suite(options)


if __name__ == "__main__":
    sys.exit(main())
