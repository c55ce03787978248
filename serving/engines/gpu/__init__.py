"""A reader on a GPU: GEMM engines of TensorRT or ONNX Runtime with our kernels between them, replayed as CUDA graphs."""
