"""The verify stage: the engine against eager PyTorch."""

from clada_export.verify.report import Verification
from clada_export.verify.verify import VerifyOptions, verify

__all__ = ["Verification", "VerifyOptions", "verify"]
