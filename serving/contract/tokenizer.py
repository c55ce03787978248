"""What a tokenizer and a reader's embedding must agree on. Checked at export and again when a reader is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def token_without_embedding(tokenizer: Tokenizer, vocab_size: int) -> int | None:
    """The largest token id if it has no row in an embedding of `vocab_size` rows, else None."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    return largest if largest >= vocab_size else None
