"""The demo readers' tokenizer: a Unigram vocabulary learned from the corpus.

In: text. Out: one ``tokenizer.json`` for the ``tokenizers`` library, ids as in T5: pad 0, eos 1, unk 2.

Tokens never cross white space, so a prompt's ids are the concatenation of its words' ids. ``WordEncoder`` relies on
this: it tokenizes questions and passages separately and concatenates them.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
VOCAB_SIZE = 3072

# A mark that ends a value is a token of its own, so that "Italy" has the same ids in "Italy 476 km", "Italy;" and
# "Italy (north)", and an answer can be copied token by token. Commas and points inside numbers stay.
_MARKS = r'[;:)\]"“”/%]|,(?!\d)'
_DELIMITER = "\x1f"


def _delimited(text: str) -> str:
    # White space is a delimiter already; another one before it would separate it from its word ("▁", "What").
    text = re.sub(f"({_MARKS})", f"{_DELIMITER}\\1{_DELIMITER}", text)
    return text.replace(_DELIMITER + " ", " ").strip(_DELIMITER)


def train_tokenizer(texts: Iterable[str], alphabet: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the vocabulary.

    SentencePiece learns it, because the trainer of ``tokenizers`` is not deterministic.

    Args:
        texts: Training texts, without the held-out countries' passages.
        alphabet: Characters that get a token even if ``texts`` lack them, so that no character is unknown.
        vocab_size: Number of tokens, with the three special ones.
    """
    import sentencepiece  # training only: clients and servers read tokenizer.json

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(_delimited(text) for text in texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=1.0,
        required_chars="".join(sorted(set(alphabet))),
        pretokenization_delimiter=_DELIMITER,
        normalization_rule_name="identity",  # the texts are NFKC already
        max_sentence_length=1 << 20,
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=PAD,
        eos_piece=EOS,
        unk_piece=UNK,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), 0.0 if i < 3 else round(pieces.get_score(i), 5)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"), pre_tokenizers.Split(Regex(_MARKS), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, file: pathlib.Path) -> None:
    """Writes ``tokenizer.json`` without indentation (half the size)."""
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    os.replace(beside, file)


class WordEncoder:
    """Text to ids, word by word through a cache: composing a question costs microseconds.

    ``encode(a + " " + b) == encode(a) + encode(b)``, and both equal the tokenizer's own ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without an end token."""
        ids: list[int] = []
        for word in text.split():
            known = self._cache.get(word)
            if known is None:
                known = self._tokenizer.encode(word, add_special_tokens=False).ids
                self._cache[word] = known
            ids += known
        return ids

    def encode_all(self, texts: list[str]) -> list[np.ndarray]:
        """``encode`` of each text as uint16[tokens]."""
        return [np.array(self.encode(text), dtype=np.uint16) for text in texts]
