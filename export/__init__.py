"""Checkpoint -> torch module -> ONNX engines -> model repository. The only package besides training/ that imports torch."""
