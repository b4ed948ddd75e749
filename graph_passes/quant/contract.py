"""The contract of `com.clada::QuantMatMul`, version 1, as data. `graph_passes.quant.op` reads it.

Made from `plugins/quant_matmul.yaml` by `make contract`. Change that file, and run it again; do not edit this one.
"""

from __future__ import annotations

DOMAIN = "com.clada"
OP_TYPE = "QuantMatMul"
OP_VERSION = 1

BLOCK = 32
TILE_ROWS = 32
STEP = 4
HIGH_BITS = 4
LEAST_AMAX = 2.0**-94
BITS = (4, 5, 6, 8)
MOST_FEATURES = 2147483648
"""`out_features` is below it."""

INPUTS = ("x", "weight", "bias")
OUTPUTS = ("y",)
ATTRIBUTES = ("out_features", "bits", "has_offset", "has_bias")
