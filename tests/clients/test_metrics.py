import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fido_client.metrics import exact_match, normalize_answer, percentile


# the right-hand sides are what FiD's own normalize_answer gives (src/evaluation.py, with regex 2026.11.15)
@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  a  B\tc\n", "b c"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),
        ("The. End", "end"),
        ("an", ""),
        ("A.N.", ""),
        ("theatre another cat", "theatre another cat"),
        ("a an the", ""),
        ("thé a", "thé"),
        ("the\u0301 a", "the\u0301"),
        ("a\u200d b", "a\u200d b"),
        ("the² b", "² b"),
        ("a½", "½"),
        ("the\u24b6", "the\u24d0"),
        ("“the” end", "“ ” end"),
        ("rock_and_the_roll", "rockandtheroll"),
        ("12,000 km²", "12000 km²"),
        ("İstanbul", "i̇stanbul"),
        ("a\u00a0b", "b"),
        ("", ""),
    ],
)
def test_normalize_answer_equals_fids(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_exact_match_is_of_any_answer_after_normalising() -> None:
    assert exact_match("The  Eiffel Tower!", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel", ["eiffel tower"])
    assert not exact_match("", ["x"])
    assert exact_match("the", ["a"])
    assert not exact_match("anything", [])


def test_exact_match_of_one_string_for_the_answers_is_refused() -> None:
    with pytest.raises(TypeError, match="answers: wanted a list of strings, got the one string 'Paris'"):
        exact_match("P", "Paris")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_equals_numpys_linear_one(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_percentile_by_hand() -> None:
    assert percentile([40, 10, 30, 20], 50) == 25
    assert percentile([10, 20], 99) == pytest.approx(19.9)
    assert percentile([7], 99) == 7
    assert [percentile([1, 2, 3], percent) for percent in (0, 50, 100)] == [1, 2, 3]


def test_percentile_of_nothing_or_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="values: wanted at least one"):
        percentile([], 50)
    for percent in (-1, 101):
        with pytest.raises(ValueError, match="percent: wanted 0 to 100"):
            percentile([1], percent)


def test_articles_go_only_as_whole_words() -> None:
    for before, after in itertools.product("xz9é", repeat=2):
        assert normalize_answer(f"{before}the{after}") == f"{before}the{after}"
