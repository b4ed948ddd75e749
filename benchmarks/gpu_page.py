"""Write `docs/gpu.md` and its picture from what `gpu_suite.py` found.

python -m benchmarks.gpu_page benchmarks/results/gpu-h100.json docs/gpu.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.plot_cuda import draw

ONE_ROW = ("load=inf", "external 50%", "external 25%", "shadow 50%", "shadow 25%", "gate 50%", "gate 25%", "exact 25%")
ROWS = ("load=inf", "external 50%", "external 25%", "external 10%")
LAYER = "llama-8b"
PICTURE = "images/ffn-h100.svg"

PAGE = """<!-- Written by `python -m benchmarks.gpu_page` from benchmarks/results/{source}; change those, not this file. -->

# On a GPU

What `benchmarks/gpu_suite.py` found on one {gpu} (driver {driver}, CUDA 13.0), commit {commit}; everything is in
[`{source}`](../benchmarks/results/{source}).

## Correctness

| step | found |
| --- | --- |
| the TensorRT plugin and the kernels keep the op's contract | {conformance} |
| kernels at the sizes of real layers, against the reference | {kernels} |
| compute-sanitizer: memcheck, racecheck, initcheck, synccheck | {sanitizers} |
| the op on ONNX Runtime's CUDA provider | {ort_cuda} |
| a TensorRT engine that generates text | {engine} |

What was skipped was not run: the machine had no `onnxruntime-gpu` and no TensorRT, and TensorRT-RTX has no target for Hopper.

## An engine for ONNX Runtime on a GPU

    pip uninstall onnxruntime && pip install 'clada-export[ort-gpu]'
    clada-export MODEL --target ort --portable -o OUT
    clada run OUT --prompt "..." --device cuda

`--portable` leaves attention in standard operators: as one node in float32 ONNX Runtime has it on the CPU only, so `auto` runs
engines that were exported without it there, and `cuda` refuses them. Engines of `--weights int8` to `int4` are for the CPU.

`--device` (`load_engine(device=...)`) is `auto`, `cpu` or `cuda`. `auto` takes the GPU where all three are there: ONNX
Runtime's CUDA provider, a GPU, and `libclada_ort_cuda.so`, which is built where nvcc is found; else the CPU. `cuda` without
them is an error that says which is missing and how to install it. The export holds no CUDA library: it is the installed
package's, or the one that `CLADA_ORT_CUDA_LIBRARY` names, loaded from the bytes that were checked. The cache stays in the
GPU's memory between runs; products are in float32 and not in TF32; operators that the provider lacks run on the CPU, with
copies between. The graph is the one for the CPU (`ort_fusions` `cpu`), and the checks at export and of `clada verify` are the
CPU's. **None of this was run on a GPU**: tests hold the choice of device and what is bound where to a pretended one.

## Speed of one FFN

Against a dense FFN of cuBLAS in the same run (gate and up in one product or in two, whichever is faster), as a CUDA graph over
copies of the weights that the second-level cache does not hold. Weights and x are float16 and random; time over dense's, so
below 1 is faster. One row, as in decode of one sequence:

| layer (hidden, intermediate) | dense | all neurons | {one_row_names} |
| --- | ---: | ---: | {one_row_line} |
{one_row}

The percentage is the share of neurons that run. `external` has its scores for nothing (a router's cost comes on top). `shadow`
reads a 4-bit copy of gate and up first, a quarter of two thirds of the bytes, and pays from half of the neurons on; `exact`
reads gate and up of every neuron.

Several rows at once, {layer}:

| rows | dense | all neurons | external 50% | external 25% | external 10% |
| ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

![Time against active neurons, and against the batch]({picture})

## Where we lose

- **Batches.** At two rows only the sparsest variants are faster than dense float16, and from 4 to 16 rows none is: a row's
  neurons are computed apart from the others', with scalar arithmetic, where cuBLAS uses tensor cores once for all rows. In
  float32 the kernels hold until 4 to 8 rows at the sizes of 7B and 8B.
- **Prompts** (32 rows and more) take {prompts} times as long as dense: a mask and a second pass over h beside the same
  two products.
- **SmolLM2's layers** are so small that starting kernels is most of the time: nothing is gained.
- **Without cuBLASLt** our own product takes {own} as long as cuBLAS's; it is there so that the library works,
  not as a choice.
"""


def _time(result: dict[str, Any], variant: str) -> float:
    return float(result["variants"][variant]["microseconds"]["median"])


def _dense(result: dict[str, Any]) -> float:
    """Microseconds of the faster dense FFN."""
    return min(_time(result, "dense"), _time(result, "dense_split"))


def _over(result: dict[str, Any], variant: str) -> str:
    return f"{_time(result, variant) / _dense(result):.2f}" if variant in result["variants"] else ""


def _line(name: str, result: dict[str, Any], variants: tuple[str, ...]) -> str:
    return " | ".join([f"| {name}", f"{_dense(result):.1f} us", *(_over(result, variant) for variant in variants)]) + " |"


def page(found: dict[str, Any], source: str) -> str:
    """The text of the page."""
    steps, about = found["steps"], found["about"]
    results = [item for item in found["ffn_cuda"]["results"] if item["dtype"] == "float16"]
    single = [item for item in results if item["rows"] == 1]
    several = [item for item in results if item["rows"] > 1 and item["size"] == LAYER]
    prompts = [_time(item, "load=inf") / _dense(item) for item in results if item["rows"] >= 32]
    own = [(_time(item, "load=inf") / _dense(item), item["rows"]) for item in found["ffn_own_gemm"]["results"]]
    checked = {
        steps[f"sanitizer_{tool}"]["summary"].split(" in ")[0] for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    }
    return PAGE.format(
        source=source,
        gpu=about["gpu"]["name"],
        driver=about["gpu"]["driver_version"],
        commit=about["commit"],
        sanitizers=", ".join(sorted(checked)) + " with each",
        one_row_names=" | ".join(ONE_ROW[1:]),
        one_row_line=" | ".join("---:" for _ in ONE_ROW[1:]),
        one_row="\n".join(_line(f"{item['size']} ({item['d']}, {item['f']})", item, ONE_ROW) for item in single),
        layer=LAYER,
        rows="\n".join(_line(str(item["rows"]), item, ROWS) for item in several),
        picture=PICTURE,
        prompts=f"{min(prompts):.1f} to {max(prompts):.1f}",
        own=" and ".join(f"{ratio:.0f} times (at {rows} rows)" for ratio, rows in own),
        **{name: steps[name]["summary"].split(" in ")[0] for name in ("conformance", "kernels", "ort_cuda", "engine")},
    )


def main(arguments: list[str]) -> int:
    source, target = map(Path, arguments)
    found = json.loads(source.read_text(encoding="utf-8"))
    target.write_text(page(found, source.name), encoding="utf-8")
    draw(found["ffn_cuda"], target.parent / PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
