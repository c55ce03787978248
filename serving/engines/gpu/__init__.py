"""A reader on a GPU: its GEMMs by TensorRT or ONNX Runtime, CUDA kernels between them, replayed as CUDA graphs."""
