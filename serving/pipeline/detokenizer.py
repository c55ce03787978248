"""Incremental detokenization: tokens in, one at a time; text out as soon as it is certain."""

from __future__ import annotations

from .prompt import PromptEncoder


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
