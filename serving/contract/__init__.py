"""What export writes and serving reads: tensors, manifest, limits, GEMM shapes, call sizes, optimization profiles, memory.

Plain data and arithmetic: nothing here loads an engine or needs a GPU.
"""
