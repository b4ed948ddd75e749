"""`--target ort`: the rewritten graph, its weights, and the ONNX Runtime custom-op library. Activations stay float32."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clada_export.artifact.manifest import Manifest
from clada_export.decoder.decoder import Decoder
from clada_export.decoder.rounding import round_ffn_weights
from clada_export.decoder.spool import is_large
from clada_export.decoder.torch_decoder import TorchDecoder
from clada_export.errors import UsageError
from clada_export.native.library import LIBRARY_NAME, require_ort
from clada_export.runtime import Engine, load_engine
from clada_export.targets.common import (
    MODEL_NAME,
    BuildRequest,
    BuiltModel,
    Subject,
    cache_tensors,
    ffn_rewrite,
    run_passes,
    save,
    tensor_spec,
)
from clada_export.targets.options import TensorRTOptions
from clada_export.verify import Verification, VerifyOptions
from clada_export.verify import verify as run_checks
from graph_passes.dead_columns import DropDeadColumns
from graph_passes.fuse_attention import AttentionReport, FuseAttention
from graph_passes.kept_logits import KeepLastLogits
from graph_passes.load_outputs import AddLoadOutputs
from graph_passes.machine_paths import ForgetMachinePaths
from graph_passes.merge_products import AddBeforeSplit, MergeProducts
from graph_passes.pass_list import PassList
from graph_passes.quant_matmul import QuantiseProducts
from graph_passes.reshapes import RemoveHeadReshapes
from graph_passes.rewrite import RewriteFFNs
from graph_passes.tied_weights import ShareTransposed

FUSIONS: str | None = "cpu"
PACKAGES: tuple[str, ...] = ("onnxruntime",)


def require_backend(settings: TensorRTOptions | None = None, verify: bool = True) -> None:
    """Check that ONNX Runtime and the custom-op library are there.

    Raises:
        UsageError: options of TensorRT.
        BackendError: ONNX Runtime or the library is missing, or the library has another op version.
    """
    if settings is not None:
        raise UsageError("options of TensorRT (profiles, compute capabilities, plugin, ...) need --target trt")
    require_ort("--target ort")


def round_weights(decoder: Decoder, dtype: str) -> str:
    """Round the FFNs' weights, and nothing else, in place."""
    return round_ffn_weights(decoder.ffns, dtype, decoder.used)


def traceable(decoder: TorchDecoder, dtype: str) -> TorchDecoder:
    """The decoder itself: activations are float32 whatever the weights' type is."""
    return decoder


def passes(rewrite: RewriteFFNs, products: QuantiseProducts | None = None, attention: FuseAttention | None = None) -> PassList:
    """What is done to a traced graph, in this order.

    Args:
        products: quantises what is not an FFN's, where weights are quantised.
        attention: makes one node of each attention; without it they stay in standard operators, which run on any device.
    """
    return PassList(
        rewrite,  # FFNs become SparseFFN nodes; `load` comes in, counts go out
        DropDeadColumns(),  # what packed projections held for those FFNs
        ShareTransposed(),  # tied embeddings, which the last product reads transposed
        AddBeforeSplit(),  # biases of products that the exporter packed
        *(() if products is None else (products,)),  # other products become QuantMatMul nodes
        MergeProducts(),  # those of one x become one
        RemoveHeadReshapes(),  # detours of ort_fusions around attention
        *(() if attention is None else (attention,)),  # attention becomes one node, with a cache that grows in place
        KeepLastLogits(),  # a prompt needs those of its last position
        AddLoadOutputs(),  # what the load needs of the logits
        ForgetMachinePaths(),
    )


def build(request: BuildRequest) -> BuiltModel:
    """Rewrite the graph and write it.

    Raises:
        UnsupportedModelError: not one FFN of the plan is in the graph; says why.
        UsageError: a layer of the plan has other sizes than the graph.
        BackendError: as `require_backend`.
    """
    library = require_ort("--target ort")
    model = request.traced.graph
    rewrite = ffn_rewrite(request)
    products = None if request.quantiser is None else QuantiseProducts(request.quantiser)
    attention = None if request.portable else FuseAttention(request.limit)
    report = run_passes(request, rewrite, passes(rewrite, products, attention))
    save(model, request.out)
    shutil.copyfile(library, request.out / LIBRARY_NAME)
    return BuiltModel(
        MODEL_NAME,
        LIBRARY_NAME,
        tuple(tensor_spec(value) for value in model.graph.inputs),
        tuple(tensor_spec(value) for value in model.graph.outputs),
        cache_tensors(model),
        report,
        warnings=() if attention is None else attention_warnings(attention.report),
        products=None if products is None else products.report,
    )


def attention_warnings(report: AttentionReport) -> tuple[str, ...]:
    """A sentence for each reason for which attention stayed in standard operators."""
    reasons = Counter(item.reason for item in report.kept)
    return tuple(
        f"attention of {count} layers stays slow, with a cache that is copied: {reason}" for reason, count in reasons.items()
    )


def verify(subject: Subject) -> Verification:
    """Run all checks on an engine that was just written: its files need not be read once more before."""
    return _run_checks(subject, verify_files=False)


def verify_saved(folder: Path, manifest: Manifest) -> Verification | None:
    """Nothing is saved: this target is checked in full wherever it is made."""
    return None


def verify_deployed(subject: Subject) -> Verification:
    """The same checks again."""
    return _run_checks(subject, verify_files=True)


def _run_checks(subject: Subject, verify_files: bool) -> Verification:
    @contextmanager
    def opened() -> Iterator[Engine]:
        # What is not packed is in the file alone, and slower.
        packed = not is_large(sum(path.stat().st_size for path in subject.folder.iterdir() if path.is_file()))
        yield load_engine(subject.folder, verify_files=verify_files, device="cpu", packed=packed)

    options = VerifyOptions(limits=subject.limits)
    return run_checks(opened, subject.folder, subject.decoder, subject.text, options, subject.progress, subject.weights)
