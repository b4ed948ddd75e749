"""The targets, by the name that `--target` takes."""

from __future__ import annotations

from clada_export.targets.common import Target
from clada_export.targets.ort import target as target_ort
from clada_export.targets.trt import target as target_trt

TARGETS: dict[str, Target] = {"ort": target_ort, "trt": target_trt}
