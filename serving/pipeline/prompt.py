"""Text in, token ids out, and back: FiD's prompt, truncation that spares the question, answers in whole characters.

Comes in: a question with its passages. Goes out: `int32[n_passages, passage_length]` ids and mask. Knows nothing of Triton.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tokenizers import Tokenizer

from serving.contract.manifest import Manifest, ManifestError

# Encoder rows are padded to a multiple of this, so that questions meet in one batch of the dynamic batcher more often.
LENGTH_MULTIPLE = 16
# Passages that one thread tokenizes at least: some hundred microseconds a passage, so that a question of many is spread over the cores.
PASSAGES_PER_TASK = 2
# A question that has the reader to itself is encoded in pieces of so many passages: one is on the GPU while the next become tokens.
PASSAGES_PER_CHUNK = 20
MAX_TOKENIZERS = 12  # each holds a vocabulary: 5 MB of 3,000 pieces, 36 MB of T5's 32,000


class PromptError(ValueError):
    """A question that cannot be put to the reader."""


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """A tokenized question, or a piece of one.

    Attributes:
        input_ids: int32[n_passages, passage_length], padded to the longest passage.
        attention_mask: int32[n_passages, passage_length], 1 = attend; a row's valid tokens come first.
        encoder_positions: int32[valid tokens], each valid token's place in the sequence that facebookresearch/FiD would have made, where
            every passage takes the full passage_length.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    encoder_positions: np.ndarray


class TokenizerPool:
    """Texts to token ids, cut at a length, on threads that have a tokenizer each.

    The tokenizer has threads of its own, but they share one cache of words and its lock: on 16 cores questions that were tokenized at the
    same time took ten times as long as one alone. So it is told to use none, and the threads here share nothing.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, threads: int | None = None):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._serialized, self._length = tokenizer.to_str(), length
        self._own = threading.local()
        self._threads = threads = threads or min(len(os.sched_getaffinity(0)), MAX_TOKENIZERS)
        self._busy, self._lock = 0, threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize", initializer=self._make)
        # all threads start now and make their tokenizers, so that no question waits for that
        everyone = threading.Barrier(threads)
        list(self._pool.map(lambda _: everyone.wait(), range(threads)))

    def _make(self) -> None:
        self._own.tokenizer = tokenizer = Tokenizer.from_str(self._serialized)
        # cuts in the tokenizer's own code: turning the tokens of a long text into Python's numbers would hold up all other threads
        tokenizer.enable_truncation(self._length)

    def truncated_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no special ones added, the first `length` of them."""
        with self._lock:
            self._busy += 1
            threads = max(self._threads // self._busy, 1)  # each task costs Python's lock some turns: under load a question is one
        try:
            size = max(PASSAGES_PER_TASK, -(-len(texts) // threads))
            tasks = [texts[i : i + size] for i in range(0, len(texts), size)]
            return [ids for part in self._pool.map(self._truncated_ids, tasks) for ids in part]
        finally:
            with self._lock:
                self._busy -= 1

    def _truncated_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._own.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


class PromptEncoder:
    """The reader's tokenizer with its prompt. Safe to share between threads.

    Raises:
        ManifestError: if the tokenizer has tokens that the reader has no embedding for.
    """

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest):
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= manifest.sizes.vocab_size:
            raise ManifestError(
                f"tokenizer: wanted token ids below the reader's vocab_size={manifest.sizes.vocab_size}, got {largest}; "
                "export the checkpoint with its own tokenizer"
            )
        tokenizer.no_truncation()  # tokenizer.json files carry such settings; the manifest's count here
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._tokenizers = TokenizerPool(tokenizer, manifest.prompt.passage_length)
        self._prompt = manifest.prompt
        self._pad, self._eos = manifest.pad_token_id, manifest.eos_token_id
        # single bytes, from which a tokenizer with byte fallback spells characters that it has no piece for
        bytes_ = {token for token in (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)) if token is not None}
        # special tokens are left out of the text, so that the bytes on both sides of one still make one run
        self.incomplete_byte_tokens = bytes_ | {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}

    def encode(self, question: str, passages: Sequence[str], titles: Sequence[str] | None = None) -> EncoderInput:
        """Tokenize one question with its passages.

        Args:
            question: kept whole in every prompt.
            passages: cut on the right where the prompt exceeds passage_length.
            titles: one per passage; none means empty ones, as facebookresearch/FiD writes them.

        Raises:
            PromptError: if the question alone fills a prompt.
        """
        (whole,) = self.encode_in_chunks(question, passages, titles, len(passages))
        return whole

    def encode_in_chunks(self, question: str, passages: Sequence[str], titles: Sequence[str] | None, size: int) -> Iterator[EncoderInput]:
        """As `encode`, in pieces of `size` passages: the first can be encoded while the next become tokens.

        The pieces' positions are those in the whole question.
        """
        prompt, end = self._prompt, [self._eos] * self._prompt.append_eos
        room = prompt.passage_length - len(end)
        head = prompt.template[: prompt.template.index("{title}")].format(question=question)
        head_tokens = len(self._tokenizer.encode(head, add_special_tokens=False).ids)
        if head_tokens > room:
            raise PromptError(f"question: {head_tokens} tokens with its prompt, but a passage holds {room}; ask it in fewer words")
        titles = titles if titles is not None else [""] * len(passages)
        texts = [prompt.template.format(question=question, title=t, context=p) for p, t in zip(passages, titles, strict=True)]
        for first in range(0, len(texts), size):
            rows = [ids[:room] + end for ids in self._tokenizers.truncated_ids(texts[first : first + size])]
            yield self._padded(rows, first)

    def _padded(self, rows: list[list[int]], first: int) -> EncoderInput:
        """Rows of tokens as arrays; the first is the question's passage `first`."""
        length = self._prompt.passage_length
        lengths = np.array([len(row) for row in rows])
        width = min(-(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, length)
        input_ids = np.full((len(rows), width), self._pad, np.int32)
        for ids, row in zip(input_ids, rows, strict=True):
            ids[: len(row)] = row
        mask = np.arange(width)[None, :] < lengths[:, None]
        passage, offset = np.nonzero(mask)
        return EncoderInput(input_ids, mask.astype(np.int32), ((first + passage) * length + offset).astype(np.int32))

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that generated tokens spell, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class IncrementalDetokenizer:
    """Turns tokens into text as they come: the pieces, joined, are exactly the text of all tokens, and no character is split."""

    def __init__(self, prompt_encoder: PromptEncoder):
        self._encoder = prompt_encoder
        self._tokens: list[int] = []
        self._sent = ""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        self._tokens.append(token)
        if token in self._encoder.incomplete_byte_tokens:  # a run of bytes is text only once it is whole
            return ""
        return self._send(self._encoder.text(self._tokens))

    def rest(self) -> str:
        """What was kept back, once the last token is in."""
        return self._send(self._encoder.text(self._tokens))

    def _send(self, text: str) -> str:
        piece, self._sent = text[len(self._sent) :], text
        return piece
