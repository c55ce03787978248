"""Bounds of a served reader: how large a request may be, and how much the server reserves.

The export writes them into config.pbtxt as `parameters`; the models read them back from there when Triton loads them. An operator finds and
changes them where Triton's own settings are. This module does not enforce them: the pipeline and the engines do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Names of the previous release: still read, no longer written.
OLD_NAMES = {"max_in_hand": "max_in_flight"}
MAY_BE_NONE = ("max_allowed_answers", "token_elimination")  # bounds that may be 0 besides those whose default is


class LimitsError(ValueError):
    """A bound that is not a whole number, contradicts another, or exceeds what the engines or the memory allow."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one served reader.

    Attributes:
        max_passages: passages per question.
        max_question_characters: characters of a question.
        max_passage_characters: characters of a passage, and of a title. A passage with more tokens than the reader's passage_length is
            truncated, not refused.
        max_new_tokens: largest max_new_tokens that a request may ask for.
        default_max_new_tokens: max_new_tokens of a request that does not set it.
        max_num_beams: largest num_beams that a request may ask for, and 1 where the engine has no beam search. A question holds as many
            slots as it has beams, so slots bound it too. 1 = greedy answers only.
        max_allowed_answers: answers that a request may choose from. They are scored max_num_beams at a time. 0 = none, as where the engine
            has no beam search.
        max_allowed_answer_characters: characters of each.
        token_elimination: 1 = a request may go on with a part of its encoder tokens; 0 = it may not, as where the engine cannot.
        slots: sequences that one reader process decodes together, each beam counted; further ones wait.
        kv_cache_bytes: bytes of keys and values per reader process. If the slots need more, fewer slots are used. 0 = no bound.
        max_in_flight: questions that a reader process has accepted and not yet answered, running ones included. It refuses further ones.
        encoder_batch: passages per encoder call on a GPU; max_passages if that is larger. On the CPU 0 = a call holds one question: best
            unless there are many cores and questions of few passages.
        encoder_instances: encoder processes on a GPU: one prepares its call while another's runs.
        reader_instances: reader processes, each with its own slots: their Python code runs in parallel.
        encode_threads: questions that are tokenized and encoded at the same time.
        intra_op_threads: threads of each engine on the CPU, which an encoder divides among two or four calls at a time; 0 = one per core.
        answer_cache_bytes: bytes of whole answers that each reader process keeps for identical requests. 0 = none.
        encoder_cache_bytes: bytes of encoder states that each reader process keeps, for passages that come again with their question.
            0 = none; on a GPU none.
        log_text: 1 = the request log holds questions and answers; 0 = only sizes, times and outcomes.
    """

    max_passages: int = 40
    max_question_characters: int = 2_000
    max_passage_characters: int = 50_000
    max_new_tokens: int = 512
    default_max_new_tokens: int = 32
    max_num_beams: int = 10
    max_allowed_answers: int = 100
    max_allowed_answer_characters: int = 500
    token_elimination: int = 1
    slots: int = 16
    kv_cache_bytes: int = 0
    max_in_flight: int = 512
    encoder_batch: int = 0
    encoder_instances: int = 1
    reader_instances: int = 1
    encode_threads: int = 8
    intra_op_threads: int = 0
    answer_cache_bytes: int = 0
    encoder_cache_bytes: int = 0
    log_text: int = 0

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            minimum, value = 0 if field.default == 0 or field.name in MAY_BE_NONE else 1, getattr(self, field.name)
            if not isinstance(value, int) or value < minimum:
                faults.append(f"{field.name}: wanted an integer of at least {minimum}, got {value!r}")
        if not faults and self.default_max_new_tokens > self.max_new_tokens:
            faults.append(f"default_max_new_tokens: wanted at most max_new_tokens={self.max_new_tokens}, got {self.default_max_new_tokens}")
        if faults:
            raise LimitsError("limits:\n  " + "\n  ".join(faults))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all bounds."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Limits:
        """Read the `parameters` of a model's configuration, {name: {"string_value": text}}; absent ones keep their default.

        Raises:
            LimitsError: if a value is not a whole number, or the bounds contradict each other.
        """
        values = {}
        for written in (*OLD_NAMES, *cls.names()):  # where both names are present, the new one counts
            if written in parameters:
                text = parameters[written]["string_value"]
                if not text.isdigit():
                    raise LimitsError(f"parameter {written} in config.pbtxt: wanted a whole number, got {text!r}")
                values[OLD_NAMES.get(written, written)] = int(text)
        return cls(**values)

    def to_parameters(self, names: tuple[str, ...] | None = None) -> dict[str, str]:
        """Name -> text of the bounds called `names`, or of all: the inverse of `from_parameters`."""
        return {name: str(getattr(self, name)) for name in names or self.names()}
