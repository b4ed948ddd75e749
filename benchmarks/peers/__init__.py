"""Engines of this tool beside those that a user would pick instead: speed, and beside each speed its quality."""
