"""The Python models that Triton loads. The only package that imports Triton's Python backend."""
