"""A pool of tokenizers: texts in, token ids out, each text truncated to a length; and a table of words seen before.

The `tokenizers` library has threads of its own, but they share one cache and its lock: on 16 cores, questions tokenized at the same time
took ten times as long as one alone. So every task here borrows a tokenizer that no other task uses meanwhile.
"""

from __future__ import annotations

import collections
import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from .truncation import TruncatingTokenizer, is_plain, splits_locally

# Token ids of a text from a table of its words: no tokenizer runs for words that were seen before.
#
# A tokenizer that splits at spaces before its model runs tokenizes every word by itself. So the ids of a text are those of its words,
# joined, and a table from words to ids finds them several times as fast. Words that the table lacks are tokenized and added. The ids are
# exactly the tokenizer's. A text for which that is not certain yields None, and the caller tokenizes it.

MAX_WORDS = 1 << 17  # of the table: some 20 MB; then it starts anew
MAX_CHARACTERS = 48  # of a word in the table
CHARACTERS_PER_TOKEN = 12  # that are looked at; a text of longer words is tokenized
METASPACE = "\u2581"  # a space in the tokenizer's own alphabet: a word with it may have a split inside
SPACES = ("\n", "\t", "\r", "\u00a0")  # that may be spaces to a tokenizer

Table = dict[str, bytes | None]  # int32[tokens] of a word as they lie in memory; None: it must be tokenized with its neighbours


class WordCache:
    """The first ids of texts, without special tokens. Safe to share between threads; holds Python's lock for some 30 us a text.

    Args:
        serialized: a tokenizer.json; its truncation and padding settings are not used.
        length: ids kept of each text.

    Attributes:
        works: whether this tokenizer treats words by themselves; if not, every text yields None.
    """

    def __init__(self, serialized: str, length: int):
        self._length = length
        self._tokenizer = Tokenizer.from_str(serialized)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = json.loads(serialized)
        self._added = [token["content"] for token in settings["added_tokens"]]
        self._added += [self._normalized(token["content"]) for token in settings["added_tokens"] if token["normalized"]]
        self.works = splits_locally(settings) and not any(map(str.isspace, "".join(self._added))) and self._adds_up()
        # Between two spaces there is no word, unless the tokenizer keeps spaces.
        self._new_table: Table = {"": b"" if self._tokenized(" a  b ") == self._tokenized("a b") else None}
        self._table: Table = dict(self._new_table)
        self._spaces = [space for space in SPACES if self.works and self._tokenized(f"a{space}b") == self._tokenized("a b")]

    def ids(self, text: str) -> np.ndarray | None:
        """int32[tokens], the first `length` ids of a text, or None if the tokenizer must be asked."""
        if not self.works:
            return None
        looked_at = CHARACTERS_PER_TOKEN * self._length
        head = text[:looked_at]
        for space in self._spaces:
            head = head.replace(space, " ")
        words = head.split(" ", self._length)
        whole = len(text) <= looked_at and len(words) <= self._length
        if not whole:
            words.pop()  # may go on behind what was looked at
        table = self._table
        try:
            joined = self._joined(table, words)
            while joined is None:
                self._add(table, words)
                joined = self._joined(table, words)
        except TypeError:  # a None in the table
            return None
        found = np.frombuffer(joined, np.int32)
        return found[: self._length] if whole or len(found) >= self._length else None

    @staticmethod
    def _joined(table: Table, words: list[str]) -> bytes | None:
        """The ids of all words; None if one is not in the table."""
        try:
            return b"".join(map(table.__getitem__, words))  # type: ignore[arg-type]
        except KeyError:
            return None

    def _add(self, table: Table, words: list[str]) -> None:
        if len(table) > MAX_WORDS:
            self._table = dict(self._new_table)  # `table` is dropped once its last user is done
        missing = [word for word in dict.fromkeys(words) if word not in table]
        alone = [word for word in missing if self._stands_alone(word)]
        encoded = self._tokenizer.encode_batch_fast(alone, add_special_tokens=False)
        table.update(dict.fromkeys(missing))
        table.update((word, np.array(encoding.ids, np.int32).tobytes()) for word, encoding in zip(alone, encoded, strict=True))

    def _stands_alone(self, word: str) -> bool:
        """Whether the ids of a word are the same in any text."""
        return (
            len(word) <= MAX_CHARACTERS
            and is_plain(word[0])
            and is_plain(word[-1])
            and METASPACE not in word
            and not any(content in text for text in (word, self._normalized(word)) for content in self._added)
        )

    def _tokenized(self, text: str) -> list[int]:
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _adds_up(self) -> bool:
        """Whether words by themselves have the ids that they have in a text."""
        probe = "The first of May, 1999: it's (once more) a-b \u00e9t\u00e9 \u6771\u4eac 3,000 50% x".split()
        return self._tokenized(" ".join(probe)) == [i for word in probe for i in self._tokenized(word)]


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
