"""What export writes and serving reads: tensors, manifest, limits, GEMM shapes, optimization profiles, memory. Arithmetic and data only."""
