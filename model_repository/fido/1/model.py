"""Triton entry point of the reader: the chain behind one request."""

from serving.reader_model import ReaderModel as TritonPythonModel  # noqa: F401
