"""LTE: experts behind gates of their own."""
