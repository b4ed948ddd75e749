"""Where models come from: the Hub, folders, GGUF, ONNX, mixtures of experts."""
