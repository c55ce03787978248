"""Triton entry point of the encoder model."""

from serving.encoder_model import EncoderModel as TritonPythonModel  # noqa: F401
