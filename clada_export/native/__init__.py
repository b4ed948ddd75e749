"""The libraries that are loaded: our own, from bytes that were checked, and TensorRT's."""
