"""The Python runtime: run an exported model with ONNX Runtime, without torch or transformers."""

from clada_export.load.meter import LoadMeter, surprisal_entropy
from clada_export.runtime.engine import Engine
from clada_export.runtime.generation import Generation, StepOutput, TokenPiece, TokenStream
from clada_export.runtime.opening import load_engine

__all__ = ["Engine", "Generation", "LoadMeter", "StepOutput", "TokenPiece", "TokenStream", "load_engine", "surprisal_entropy"]
