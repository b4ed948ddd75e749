"""Calibration on many processes: workers on Ray, each with the model, that measure windows for the process which decides."""
