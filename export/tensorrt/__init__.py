"""ONNX graphs compiled by TensorRT for the GPU of this machine."""
