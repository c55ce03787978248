"""Triton entry point of the reader: the chain behind one request."""

from serving.triton.reader_model import ReaderModel as TritonPythonModel  # noqa: F401
