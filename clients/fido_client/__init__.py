"""A client of Fusion-in-Decoder readers served by Triton: Python, asyncio, FiD's data format and metric, and the command fido-client.

In: a question and its passages. Out: the reader's answer, its log-probability and its latency. The package needs NumPy and tritonclient;
`fido_client.metrics` and `fido_client.data` need only the standard library, so training uses them without gRPC. That is why the names
below are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Answer, StreamedAnswer, StreamPiece
    from .async_reader_client import AsyncAnswerStream, AsyncReaderClient
    from .errors import ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused
    from .reader_client import AnswerStream, ReaderClient
    from .request import Passage, ReaderRequest

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncReaderClient",
    "Passage",
    "ReaderClient",
    "ReaderError",
    "ReaderRequest",
    "ReaderTimeout",
    "ReaderUnavailable",
    "RequestRefused",
    "StreamPiece",
    "StreamedAnswer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".reader_client", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
