"""clada-export: compile a Hugging Face decoder into an engine whose FFN layers compute only the neurons a token needs."""

__version__ = "0.1.0"
