"""Lory: experts merged for a segment."""
