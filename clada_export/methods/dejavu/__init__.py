"""DejaVu: a predictor of neurons."""
