"""The targets, by the name that `--target` takes."""

from __future__ import annotations

from clada_export.targets import onnxruntime as target_ort
from clada_export.targets import tensorrt as target_trt
from clada_export.targets.common import Target

TARGETS: dict[str, Target] = {"ort": target_ort, "trt": target_trt}
