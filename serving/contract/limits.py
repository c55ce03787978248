"""What a request may ask for and what the server sets aside: every bound in one place.

They are written into config.pbtxt as `parameters` when the repository is rendered and read back from there inside Triton, so that what
is deployed can be read, and changed, where Triton's own settings are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# Names of the release before: still read, no longer written.
OLD_NAMES = {"max_in_hand": "max_in_flight"}


class LimitsError(ValueError):
    """A bound that is unknown, not a number, or contradicts another."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one served reader.

    Attributes:
        max_passages: passages a question may bring.
        max_question_characters: longest question.
        max_passage_characters: longest passage, and longest title. What exceeds the reader's passage_length in tokens is cut, not refused.
        max_new_tokens: most tokens a request may ask for.
        default_max_new_tokens: tokens generated at most where a request does not say.
        slots: questions decoded together by one reader process; more wait.
        kv_cache_bytes: memory for keys and values of one reader process at most; fewer slots are used where they would exceed it. 0 = as
            the slots need.
        max_in_flight: questions that a reader process has taken and not yet answered, running ones included; more are refused at once.
        encoder_batch: passages in one encoder call on a GPU; at least max_passages are. On the CPU a call holds one question's.
        encoder_instances: encoder processes on a GPU: the second prepares its call while the first one's runs.
        reader_instances: reader processes, each with slots of its own: what they do in Python then goes on side by side.
        encode_threads: questions tokenized and encoded at the same time.
        intra_op_threads: threads of one engine call on the CPU; 0 = one a core.
        log_text: 1 = write questions and answers into the request log; 0 = only sizes, times and outcomes.
    """

    max_passages: int = 40
    max_question_characters: int = 2_000
    max_passage_characters: int = 50_000
    max_new_tokens: int = 512
    default_max_new_tokens: int = 32
    slots: int = 16
    kv_cache_bytes: int = 0
    max_in_flight: int = 512
    encoder_batch: int = 0
    encoder_instances: int = 1
    reader_instances: int = 1
    encode_threads: int = 8
    intra_op_threads: int = 0
    log_text: int = 0

    def __post_init__(self) -> None:
        faults = []
        for field in dataclasses.fields(self):
            least, value = 0 if field.default == 0 else 1, getattr(self, field.name)
            if not isinstance(value, int) or value < least:
                faults.append(f"{field.name}: wanted an integer of at least {least}, got {value!r}")
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
        """Read from the `parameters` of a model's configuration, {name: {"string_value": text}}; absent ones keep their default."""
        values = {}
        for written in (*OLD_NAMES, *cls.names()):  # a new name beside its old one counts
            if written in parameters:
                text = parameters[written]["string_value"]
                if not text.isdigit():
                    raise LimitsError(f"parameter {written} in config.pbtxt: wanted a whole number, got {text!r}")
                values[OLD_NAMES.get(written, written)] = int(text)
        return cls(**values)

    def to_parameters(self, names: tuple[str, ...] | None = None) -> dict[str, str]:
        """The inverse of `from_parameters`, as name -> text, for the given names or all."""
        return {name: str(getattr(self, name)) for name in names or self.names()}
