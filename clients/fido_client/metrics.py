"""FiD's exact match, F1 and the percentile of a list, shared by training, perf and the client. Needs only the standard library."""

from __future__ import annotations

import collections
import itertools
import math
import string
import unicodedata
from collections.abc import Iterable, Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD_CATEGORIES = frozenset({"Ll", "Lm", "Lo", "Lt", "Lu", "Mc", "Me", "Mn", "Nd", "Nl", "Pc"})
_CIRCLED_LETTERS = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))
_JOINERS = "\u200c\u200d"


def normalize_answer(text: str) -> str:
    r"""Text normalized as in FiD: lower case, no ASCII punctuation, no articles (a, an, the), white space collapsed.

    In this order, so that "U.S.A." is "usa" and "the-end" is "theend". FiD removes articles by `regex.sub(r"\b(a|an|the)\b", " ", text)`
    with the package `regex`, where a combining mark is a word character and a superscript digit is not; the standard `re` does the
    opposite. This function follows `regex` without the package.
    """
    text = text.lower().translate(_PUNCTUATION)
    runs = ("".join(run) for _, run in itertools.groupby(text, key=_is_word_character))
    return " ".join("".join(" " if run in _ARTICLES else run for run in runs).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether the normalized prediction equals one of the normalized answers; False without answers.

    Raises:
        TypeError: If `answers` is one string, whose letters would count as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers: wanted a list of strings, got the one string {answers!r}")
    normalized = normalize_answer(prediction)
    return any(normalize_answer(answer) == normalized for answer in answers)


def f1_score(prediction: str, answers: Iterable[str]) -> float:
    """The best F1, 0 to 1, of the normalized prediction's words against each answer's, as SQuAD and FiD compute it; 0 without answers.

    A word counts as often as it stands in both. Where the prediction or the answer has no words, it is 1 if neither has, else 0.

    Raises:
        TypeError: If `answers` is one string, whose letters would count as answers.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers: wanted a list of strings, got the one string {answers!r}")
    predicted = normalize_answer(prediction).split()
    return max((_f1(predicted, normalize_answer(answer).split()) for answer in answers), default=0.0)


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation between the two nearest ranks, as `numpy.percentile` does by default.

    For example, percentile([10, 20, 30, 40], 50) is 25 and percentile([10, 20], 99) is 19.9.

    Args:
        values: At least one, in any order.
        percent: 0 to 100.

    Raises:
        ValueError: If there are no values, or `percent` is out of range.
    """
    if not values:
        raise ValueError("values: wanted at least one, got none")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent: wanted 0 to 100, got {percent}")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    common = sum((collections.Counter(predicted) & collections.Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))


def _is_word_character(character: str) -> bool:
    if character.isascii():
        return character.isalnum() or character == "_"
    if unicodedata.category(character) in _WORD_CATEGORIES or character in _JOINERS:
        return True
    return any(ord(character) in letters for letters in _CIRCLED_LETTERS)
