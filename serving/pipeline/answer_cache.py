"""Whole answers of identical requests, kept in memory: a request goes in, the answer that the same one got before comes out.

A reader is a pure function of the request, so a kept answer is exact. The least recently used ones leave when the bytes are spent. Knows
neither Triton nor what an answer consists of.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pickle
import threading
from typing import Any

from .request import ReaderRequest

ENTRY_BYTES = 250  # of Python's objects around an answer: the two headers and the place in the table
NOT_OF_THE_ANSWER = ("timeout_us", "id")  # fields of a request that change nothing in its answer


@dataclasses.dataclass(frozen=True)
class CacheCounts:
    """Lookups since the start, and what is kept now; the metrics read them."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    entries: int = 0


class ByteCache:
    """Contents by key, the least recently used ones leaving when the bytes are spent. Safe to share between threads.

    Args:
        max_bytes: of all that is kept, with keys; 0 = nothing is kept, and nothing is looked up or counted.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._kept: collections.OrderedDict[bytes, bytes] = collections.OrderedDict()  # the least recently used first
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> bytes | None:
        """What was put under the key, or None."""
        with self._lock:
            content = self._kept.get(key)
            if content is None:
                self._misses += 1
                return None
            self._hits += 1
            self._kept.move_to_end(key)
        return content

    def put(self, key: bytes, content: bytes) -> None:
        """Keep a content, and let go of those used longest ago. One larger than all the cache may hold is not kept."""
        if _size(key, content) > self._max_bytes:
            return
        with self._lock:
            if (before := self._kept.pop(key, None)) is not None:
                self._bytes -= _size(key, before)
            self._kept[key] = content
            self._bytes += _size(key, content)
            while self._bytes > self._max_bytes:
                self._bytes -= _size(*self._kept.popitem(last=False))

    def counts(self) -> CacheCounts:
        """A copy of the counts."""
        with self._lock:
            return CacheCounts(self._hits, self._misses, self._bytes, len(self._kept))


class AnswerCache:
    """Kept answers. Safe to share between threads.

    Args:
        max_bytes: as of ByteCache.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._kept = ByteCache(max_bytes)

    def get(self, request: ReaderRequest) -> Any | None:
        """A copy of what was put for the same request, or None."""
        if not self._max_bytes:
            return None
        content = self._kept.get(key_of(request))
        return None if content is None else pickle.loads(content)  # of our own making

    def put(self, request: ReaderRequest, answer: Any) -> None:
        """Keep an answer."""
        if self._max_bytes:
            self._kept.put(key_of(request), pickle.dumps(answer))

    def counts(self) -> CacheCounts:
        """A copy of the counts."""
        return self._kept.counts()


def key_of(request: ReaderRequest) -> bytes:
    """SHA-256 of everything in a request that its answer depends on."""
    fields = dataclasses.asdict(request)
    for name in NOT_OF_THE_ANSWER:
        del fields[name]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()


def _size(key: bytes, content: bytes) -> int:
    return len(key) + len(content) + ENTRY_BYTES
