"""A pool of tokenizers: texts in, token ids out, each text truncated to a length.

The `tokenizers` library has threads of its own, but they share one cache and its lock: on 16 cores, questions tokenized at the same time
took ten times as long as one alone. So every task here borrows a tokenizer that no other task uses meanwhile.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

# A passage takes some hundred microseconds, so the passages of one question are spread over the cores, this many a task at least.
PASSAGES_PER_TASK = 2
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
        self._idle: queue.SimpleQueue[Tokenizer] = queue.SimpleQueue()
        self._callers, self._lock = 0, threading.Lock()

        def make(_: int) -> Tokenizer:
            own = Tokenizer.from_str(serialized)
            own.no_padding()
            # The library truncates before it builds Python objects: a long text would otherwise hold Python's lock for its whole length.
            own.enable_truncation(length)
            return own

        # Made before the first question, in parallel. An error of any thread is raised here and fails the load.
        for own in self._pool.map(make, range(self._size)):
            self._idle.put(own)

    def truncated_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The first `length` token ids of each text, without special tokens."""
        with self._lock:
            self._callers += 1
            # Each task costs turns of Python's lock. Under load a question is one task, and the cores work on different questions.
            threads = max(self._size // self._callers, 1)
        try:
            size = max(PASSAGES_PER_TASK, -(-len(texts) // threads))
            tasks = [texts[i : i + size] for i in range(0, len(texts), size)]
            return [ids for part in self._pool.map(self._tokenize, tasks) for ids in part]
        finally:
            with self._lock:
                self._callers -= 1

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self._idle.get()  # never waits: there are as many tokenizers as threads
        try:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        finally:
            self._idle.put(tokenizer)
