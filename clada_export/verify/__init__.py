"""The verify stage: the engine against eager PyTorch."""

from clada_export.verify.report import Verification
from clada_export.verify.verify import QuantisedWeights, VerifyOptions, verify

__all__ = ["QuantisedWeights", "Verification", "VerifyOptions", "verify"]
