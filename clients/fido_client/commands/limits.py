"""A data set against the limits that a reader was exported with: finds what the server would refuse, before the first question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..connection.diagnosis import known_readers
from ..connection.endpoint import Endpoint
from ..connection.served_models import ServedModel
from ..data.examples import Example
from .common import UsageError


def check_reader(model: ServedModel, endpoint: Endpoint) -> None:
    """Refuse a model that cannot answer one question with one response.

    Raises:
        UsageError: If it is a streaming model, or no reader.
    """
    if model.is_reader and not model.is_streaming:
        return
    kind = "a streaming model, which evaluate does not use" if model.is_reader else "not a reader"
    raise UsageError(f"--model: {model.name} is {kind}; {known_readers(endpoint) or 'name a reader'}")


def check_limits(model: ServedModel, examples: Sequence[Example], *, data: str, max_new_tokens: int | None) -> Iterator[str]:
    """Warnings of questions that will fail.

    Args:
        model: The reader.
        examples: The questions, with the passages that will be sent.
        data: The file's name, for messages.
        max_new_tokens: The limit that every request will carry; None: the server's default.

    Raises:
        UsageError: If questions have too many passages, or if every question would be refused.
    """
    limit = model.limits.get("max_new_tokens")
    if limit is not None and max_new_tokens is not None and max_new_tokens > limit:
        raise UsageError(
            f"--max-new-tokens: {model.name} allows 1 to {limit}, got {max_new_tokens}: give {limit} or less, "
            f'or export it with LIMITS="--max-new-tokens {max_new_tokens}"'
        )
    limit = model.limits.get("max_passages")
    longest = max(examples, key=lambda example: len(example.contexts))
    if limit is not None and len(longest.contexts) > limit:
        count = sum(len(example.contexts) > limit for example in examples)
        raise UsageError(
            f"{data}: {count} of {len(examples)} questions have more passages than {model.name} allows, "
            f"{len(longest.contexts)} where {limit} are allowed: send the first {limit} with --max-passages {limit}, "
            f'or export the reader with LIMITS="--max-passages {len(longest.contexts)}"'
        )
    yield from _failing(examples, lambda example: not example.contexts, data, "no passages", "give each at least one")
    for name, length in (("max_question_characters", _question_length), ("max_passage_characters", _passage_length)):
        limit = model.limits.get(name)
        if limit is not None:
            kind = name.split("_")[1]
            option = name.replace("_", "-")
            yield from _failing(
                examples,
                lambda example, length=length, limit=limit: length(example) > limit,  # type: ignore[misc]
                data,
                f"a {kind} of more than the {limit} characters that {model.name} allows",
                f'shorten it, or export the reader with LIMITS="--{option} {max(map(length, examples))}"',
            )


def _failing(examples: Sequence[Example], fails: Callable[[Example], bool], data: str, what: str, remedy: str) -> Iterator[str]:
    failing = [example for example in examples if fails(example)]
    if not failing:
        return
    text = f"{data}: {len(failing)} of {len(examples)} questions have {what}, the first is {failing[0].id}: {remedy}"
    if len(failing) == len(examples):
        raise UsageError(text)
    yield f"{text}; they will fail"


def _question_length(example: Example) -> int:
    return len(example.question)


def _passage_length(example: Example) -> int:
    return max((len(context.text) for context in example.contexts), default=0)
