"""The calibration stage: text in, `SparsityPlan` out."""

from clada_export.calibration.budget import Budget
from clada_export.calibration.calibrate import CalibrationOptions, CalibrationResult, calibrate
from clada_export.calibration.text import CalibrationData, load_calibration_data

__all__ = ["Budget", "CalibrationData", "CalibrationOptions", "CalibrationResult", "calibrate", "load_calibration_data"]
