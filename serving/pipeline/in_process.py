"""The chain without Triton: the same prompt, engines and scheduler in one process, for benchmarks and comparisons."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest
from serving.engines.load import load_decoder, load_encoder, load_packer

from .elimination import Elimination, EliminationOptions
from .prompt import PromptEncoder
from .request import checked_new_tokens
from .scheduler import DecodeSequence, Scheduler


@dataclasses.dataclass(frozen=True)
class Generated:
    """An answer with the tokens it was spelled from, the end token included, and the log-probability of each."""

    text: str
    tokens: list[int]
    log_probs: list[float]


class InProcessReader:
    """Answers questions from engines in a directory. Threads may share it; their answers are decoded together."""

    def __init__(self, engines: Path, limits: Limits | None = None):
        limits = limits or Limits()
        manifest = Manifest.load(engines)
        manifest.verify(engines, (TOKENIZER_FILE,))
        self.prompt = PromptEncoder(Tokenizer.from_file(str(engines / TOKENIZER_FILE)), manifest)
        self._encoder = load_encoder(engines, manifest, limits)
        self._encoding = threading.Lock()  # one call at a time keeps all cores busy; two would share them
        decoder = load_decoder(engines, manifest, limits)
        self.packer = load_packer(engines, manifest)
        self._scheduler = Scheduler(
            decoder,
            start_token=manifest.decoder_start_token_id,
            eos_token=manifest.eos_token_id,
            max_waiting=limits.max_in_flight,
        )
        self._limits = limits

    def answer(
        self,
        question: str,
        passages: Sequence[str],
        titles: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        elimination: EliminationOptions | None = None,
    ) -> Generated:
        """Answer one question; blocks until the answer is complete.

        Args:
            elimination: which encoder tokens are dropped on the way; None = none.

        Raises:
            RequestError: if max_new_tokens or min_new_tokens is outside the limits.
            PromptError: if the question does not fit into a prompt.
        """
        maximum, minimum = checked_new_tokens(max_new_tokens, min_new_tokens, self._limits)
        tokens = self.prompt.encode(question, passages, titles)
        with self._encoding:
            (states,) = self._encoder.encode([(tokens.input_ids, tokens.attention_mask)])
        found, log_probs, done, errors = [], [], threading.Event(), []

        def on_token(token: int, log_prob: float) -> None:
            found.append(token)
            log_probs.append(log_prob)

        def on_end(error: Exception | None) -> None:
            errors.append(error)
            done.set()

        hidden = self.packer.pack(states, tokens.attention_mask)
        lost = None if elimination is None else Elimination(elimination, tokens.attention_mask.sum(1))
        rest = (tokens.encoder_positions, maximum, minimum, on_token, on_end)
        self._scheduler.submit(DecodeSequence(hidden, *rest, elimination=lost))
        done.wait()
        if errors[0] is not None:
            raise errors[0]
        return Generated(self.prompt.text(found), found, log_probs)

    def close(self) -> None:
        """Stop the scheduler."""
        self._scheduler.stop()

    def __enter__(self) -> InProcessReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
