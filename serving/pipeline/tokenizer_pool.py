"""A pool of tokenizers: texts in, token ids out, each text truncated to a length.

The `tokenizers` library has threads of its own, but they share one cache and its lock: on 16 cores, questions tokenized at the same time
took ten times as long as one alone. So every task here borrows a tokenizer that no other task uses meanwhile.
"""

from __future__ import annotations

import collections
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tokenizers import Tokenizer

from .truncation import TruncatingTokenizer

# A passage takes some hundred microseconds, so the passages of one question are spread over the cores, this many a task at least.
PASSAGES_PER_TASK = 2
PASSAGES_PER_STEP = 8  # short passages between two looks at whether the client still waits
MAX_TOKENIZERS = 12  # each holds a vocabulary: 5 MB for 3,000 pieces, 36 MB for T5's 32,000


class TokenizerPool:
    """Tokenizes on threads of its own. Safe to share between threads.

    Args:
        tokenizer: copied; its truncation and padding settings are not used.
        length: tokens kept of each text.
        threads: tokenizers to make; one a core by default, MAX_TOKENIZERS at most.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, threads: int | None = None):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        serialized = tokenizer.to_str()
        self._size = threads or min(len(os.sched_getaffinity(0)), MAX_TOKENIZERS)
        self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="tokenize")
        self._idle: queue.SimpleQueue[TruncatingTokenizer] = queue.SimpleQueue()
        self._callers, self._lock = 0, threading.Lock()

        def make(_: int) -> TruncatingTokenizer:
            return TruncatingTokenizer(serialized, length)

        # Made before the first question, in parallel. An error of any thread is raised here and fails the load.
        for own in self._pool.map(make, range(self._size)):
            self._is_short = own.is_short
            self._idle.put(own)

    def truncated_ids(self, texts: Sequence[str], cancel_reason: Callable[[], Exception | None] = lambda: None) -> list[list[int]]:
        """The first `length` token ids of each text, without special tokens.

        Args:
            texts: of any length; the cost is that of the tokens kept (see truncation.py).
            cancel_reason: called between short steps, on any thread: None, or the error to stop with.

        Raises:
            Exception: what `cancel_reason` returned.
        """
        with self._lock:
            self._callers += 1
            # Each task costs turns of Python's lock. Under load a question is one task, and the cores work on different questions.
            threads = max(self._size // self._callers, 1)
        try:
            short = [i for i, text in enumerate(texts) if self._is_short(text)]
            size = max(PASSAGES_PER_TASK, -(-len(short) // threads))
            tasks = [short[i : i + size] for i in range(0, len(short), size)]
            tasks += [[i] for i in sorted(set(range(len(texts))) - set(short))]
            return self._run(tasks, texts, cancel_reason)
        finally:
            with self._lock:
                self._callers -= 1

    def _run(self, tasks: list[list[int]], texts: Sequence[str], cancel_reason: Callable[[], Exception | None]) -> list[list[int]]:
        """Run tasks, places of texts, as many at a time as there are threads: other callers' tasks get their turn in between."""
        found: dict[int, list[int]] = {}
        running: collections.deque[tuple[list[int], Future[list[list[int]]]]] = collections.deque()
        for task in tasks:
            if len(running) == self._size:
                places, future = running.popleft()
                found |= dict(zip(places, future.result(), strict=True))
            running.append((task, self._pool.submit(self._tokenize, [texts[i] for i in task], cancel_reason)))
        for places, future in running:
            found |= dict(zip(places, future.result(), strict=True))
        return [found[i] for i in range(len(texts))]

    def _tokenize(self, texts: list[str], cancel_reason: Callable[[], Exception | None]) -> list[list[int]]:
        """The ids of short texts, or of one long one."""
        tokenizer = self._idle.get()  # never waits: there are as many tokenizers as threads
        try:
            found: list[list[int]] = []
            if len(texts) == 1:
                _raise_if_cancelled(cancel_reason)
                for ids in tokenizer.first_ids(texts[0]):
                    _raise_if_cancelled(cancel_reason)
                    found += [ids] if ids is not None else []
                return found
            for first in range(0, len(texts), PASSAGES_PER_STEP):
                _raise_if_cancelled(cancel_reason)
                found += tokenizer.whole(texts[first : first + PASSAGES_PER_STEP])
            return found
        finally:
            self._idle.put(tokenizer)


def _raise_if_cancelled(cancel_reason: Callable[[], Exception | None]) -> None:
    if reason := cancel_reason():
        raise reason
