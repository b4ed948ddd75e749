"""An ONNX graph as the model to compile: read, checked, and run by ONNX Runtime with its FFNs in PyTorch."""
