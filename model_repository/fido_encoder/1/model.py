"""Triton entry point of the encoder model."""

from serving.triton.encoder_model import EncoderModel as TritonPythonModel  # noqa: F401
