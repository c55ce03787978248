"""The modules as ONNX graphs, for the CPU and for a GPU."""
