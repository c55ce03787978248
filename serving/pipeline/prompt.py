"""FiD's prompt: a question and its passages in, token ids out; generated tokens back to text.

A prompt is truncated at its passage's end, never in its question. Knows nothing of Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from serving.contract.manifest import Manifest, ManifestError

from .tokenizer_pool import TokenizerPool, WordCache

# Rows are padded to a multiple of this length. Triton's batcher joins requests of equal shape, so fewer lengths make larger batches.
LENGTH_MULTIPLE = 16
# A question that has its reader to itself is encoded in chunks: one is encoded while the next is tokenized.
PASSAGES_PER_CHUNK = 20
CACHED_PER_STEP = 64  # texts looked up in the word cache between two looks at whether the client still waits


class PromptError(ValueError):
    """A question that does not fit into the reader's prompt."""


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """The token ids of a question's passages, or of a chunk of them.

    Attributes:
        input_ids: int32[n_passages, passage_length], padded to the longest passage.
        attention_mask: int32[n_passages, passage_length], 1 = attend; the valid tokens come first in a row.
        encoder_positions: int32[valid tokens], the position of each valid token in the sequence that facebookresearch/FiD builds, where
            every passage takes the full passage_length.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    encoder_positions: np.ndarray


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
        # A tokenizer.json may carry truncation and padding settings. The manifest's lengths count here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._tokenizers = TokenizerPool(tokenizer, manifest.prompt.passage_length)
        self._words = WordCache(tokenizer.to_str(), manifest.prompt.passage_length)
        self._prompt = manifest.prompt
        self._pad, self._eos = manifest.pad_token_id, manifest.eos_token_id
        # A tokenizer with byte fallback spells unknown characters in single bytes: their text is certain only once the run has ended.
        single_bytes = {token for token in (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)) if token is not None}
        # Special tokens have no text, so the bytes on both sides of one still form one run.
        special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self.incomplete_byte_tokens = single_bytes | special

    def encode(self, question: str, passages: Sequence[str], titles: Sequence[str] | None = None) -> EncoderInput:
        """Tokenize one question with its passages.

        Args:
            question: kept whole in every prompt.
            passages: truncated where the prompt exceeds passage_length.
            titles: one per passage; None means empty titles, as facebookresearch/FiD writes them.

        Raises:
            PromptError: if the question alone fills a prompt.
        """
        (whole,) = self.encode_in_chunks(question, passages, titles, len(passages))
        return whole

    def encode_in_chunks(
        self,
        question: str,
        passages: Sequence[str],
        titles: Sequence[str] | None,
        chunk_size: int,
        cancel_reason: Callable[[], Exception | None] = lambda: None,
    ) -> Iterator[EncoderInput]:
        """As `encode`, in chunks of `chunk_size` passages: the first can be encoded while the next are tokenized.

        The positions of a chunk are those in the whole question. `cancel_reason` is called between short steps, on any thread; an error
        that it returns is raised here.
        """
        prompt = self._prompt
        end = [self._eos if prompt.end_token_id is None else prompt.end_token_id] * prompt.append_eos
        room = prompt.passage_length - len(end)
        titles = titles if titles is not None else [""] * len(passages)
        heads = [prompt.head(question, title) for title in {bool(title): title for title in titles}.values()]
        # In a batch, even of one, the library releases Python's lock.
        encoded = self._tokenizer.encode_batch_fast(heads, add_special_tokens=False)
        head_tokens = max((len(head.ids) for head in encoded), default=0)
        if head_tokens > room:
            raise PromptError(f"question: {head_tokens} tokens with its prompt, but a passage holds {room}; ask it in fewer words")
        texts = [prompt.text(question, t, p) for p, t in zip(passages, titles, strict=True)]
        for first in range(0, len(texts), chunk_size):
            rows = self._truncated_ids(texts[first : first + chunk_size], cancel_reason)
            yield self._padded([ids[:room] for ids in rows], end, first)

    def _truncated_ids(self, texts: list[str], cancel_reason: Callable[[], Exception | None]) -> list[Sequence[int] | np.ndarray]:
        """The first passage_length ids of each text: by its words where that is exact, else by the tokenizer."""
        rows: list[Sequence[int] | np.ndarray | None] = []
        for first in range(0, len(texts), CACHED_PER_STEP):
            if reason := cancel_reason():
                raise reason
            rows += map(self._words.ids, texts[first : first + CACHED_PER_STEP])
        missing = [text for text, row in zip(texts, rows, strict=True) if row is None]
        found = iter(self._tokenizers.truncated_ids(missing, cancel_reason) if missing else ())
        return [next(found) if row is None else row for row in rows]

    def _padded(self, rows: list[Sequence[int] | np.ndarray], end: list[int], first_passage: int) -> EncoderInput:
        """Rows of token ids, each with the tokens of `end` behind it, as arrays; row 0 is the question's passage `first_passage`."""
        length = self._prompt.passage_length
        lengths = np.array([len(row) + len(end) for row in rows])
        width = min(-(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, length)
        input_ids = np.full((len(rows), width), self._pad, np.int32)
        for ids, row in zip(input_ids, rows, strict=True):
            ids[: len(row)] = row
            ids[len(row) : len(row) + len(end)] = end
        mask = np.arange(width)[None, :] < lengths[:, None]
        passage, offset = np.nonzero(mask)
        return EncoderInput(input_ids, mask.astype(np.int32), ((first_passage + passage) * length + offset).astype(np.int32))

    def answer_ids(self, answers: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids that the reader spells each answer with, the end token included."""
        return [(*found.ids, self._eos) for found in self._tokenizer.encode_batch_fast(list(answers), add_special_tokens=False)]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


# Incremental detokenization: tokens in, one at a time; text out as soon as it is certain.


class IncrementalDetokenizer:
    """Turns tokens into text as they come. The texts, joined, are the text of all tokens, and no character is split."""

    def __init__(self, prompt_encoder: PromptEncoder):
        self._encoder = prompt_encoder
        self._tokens: list[int] = []
        self._sent = ""

    def add(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._tokens.append(token)
        if token in self._encoder.incomplete_byte_tokens:  # more bytes of the same character may follow
            return ""
        return self._new_text()

    def flush(self) -> str:
        """The text held back until now. Called after the last token."""
        return self._new_text()

    def _new_text(self) -> str:
        text = self._encoder.text(self._tokens)
        new, self._sent = text[len(self._sent) :], text
        return new
