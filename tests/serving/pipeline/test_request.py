"""What a client may send: every fault is named, with what is allowed."""

from __future__ import annotations

import numpy as np
import pytest

from serving.contract.limits import Limits, LimitsError
from serving.pipeline.request import ReaderRequest, RequestError, checked_new_tokens, read_request

LIMITS = Limits(max_passages=3, max_question_characters=20, max_passage_characters=30, max_new_tokens=8, default_max_new_tokens=4)


def texts(*values: str | bytes) -> np.ndarray:
    return np.array([v if isinstance(v, bytes) else v.encode() for v in values], np.object_)


def number(value: int) -> np.ndarray:
    return np.array([value], np.int32)


GOOD = {"question": texts("who?"), "passages": texts("a", "b")}


def test_defaults_fill_what_is_left_out():
    assert read_request(GOOD, LIMITS) == ReaderRequest("who?", ["a", "b"], None, 4, 0)


def test_everything_given_is_taken():
    tensors = {**GOOD, "titles": texts("x", "ÿ"), "max_new_tokens": number(8), "min_new_tokens": number(2)}
    assert read_request(tensors, LIMITS) == ReaderRequest("who?", ["a", "b"], ["x", "ÿ"], 8, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": texts("")}, "question: wanted text, got an empty string"),
        ({"question": texts(" \n")}, "question: wanted text, got an empty string"),
        ({"question": texts("x" * 21)}, "question: wanted at most 20 characters, got 21"),
        ({"question": texts(b"ab\xff")}, "question: wanted UTF-8, got byte 0xff at 2"),
        ({"passages": texts()}, "passages: wanted 1 to 3, got 0"),
        ({"passages": texts("a", "b", "c", "d")}, "passages: wanted 1 to 3, got 4"),
        ({"passages": texts("a", "x" * 31)}, "passages[1]: wanted at most 30 characters, got 31"),
        ({"passages": texts(b"\x80", "b")}, "passages[0]: wanted UTF-8, got byte 0x80 at 0"),
        ({"titles": texts("a")}, "titles: wanted one for each of the 2 passages or none at all, got 1"),
        ({"max_new_tokens": number(0)}, "max_new_tokens: wanted 1 to 8, got 0"),
        ({"max_new_tokens": number(9)}, "max_new_tokens: wanted 1 to 8, got 9"),
        ({"min_new_tokens": number(-1)}, "min_new_tokens: wanted 0 to 8, got -1"),
        ({"min_new_tokens": number(5)}, "min_new_tokens: wanted at most max_new_tokens=4, got 5"),
    ],
)
def test_each_fault_is_named_alone(change, message):
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, **change}, LIMITS)
    assert str(caught.value) == message


def test_what_is_as_large_as_it_may_be_is_taken():
    tensors = {"question": texts("x" * 20), "passages": texts("a" * 30, "b", "c"), "titles": texts("t" * 30, "", "")}
    found = read_request({**tensors, "max_new_tokens": number(8), "min_new_tokens": number(8)}, LIMITS, {"timeout": 0})
    assert found == ReaderRequest("x" * 20, ["a" * 30, "b", "c"], ["t" * 30, "", ""], 8, 8)
    least = {"question": texts("x"), "passages": texts("a"), "max_new_tokens": number(1), "min_new_tokens": number(0)}
    assert read_request(least, LIMITS) == ReaderRequest("x", ["a"], None, 1, 0)


def test_texts_may_come_decoded_and_in_any_shape():
    tensors = {"question": np.array([["who?"]], np.object_), "passages": np.array([["ä"], ["b"]], np.object_)}
    assert read_request(tensors, LIMITS) == ReaderRequest("who?", ["ä", "b"], None, 4, 0)


def test_a_request_without_its_tensors_is_refused_by_their_names():
    with pytest.raises(RequestError, match=r"^question: wanted text, got an empty string; passages: wanted 1 to 3, got 0$"):
        read_request({"question": None}, LIMITS)


def test_every_bad_text_is_named_and_bounds_that_cannot_be_compared_are_not():
    with pytest.raises(RequestError, match=r"^passages\[0\]: wanted UTF-8, .*; passages\[1\]: wanted UTF-8, [^;]*$"):
        read_request({**GOOD, "passages": texts(b"\xff", b"\xff")}, LIMITS)
    with pytest.raises(RequestError, match=r"^max_new_tokens: wanted 1 to 8, got 0; min_new_tokens: wanted 0 to 8, got 9$"):
        read_request({**GOOD, "max_new_tokens": number(0), "min_new_tokens": number(9)}, LIMITS)
    with pytest.raises(RequestError, match=r"^max_new_tokens: wanted 1 to 8, got 0$"):
        read_request({**GOOD, "max_new_tokens": number(0), "min_new_tokens": number(3)}, LIMITS)


def test_all_faults_are_named_at_once():
    with pytest.raises(RequestError) as caught:
        read_request({"question": texts(""), "passages": texts(), "titles": texts("a"), "max_new_tokens": number(0)}, LIMITS)
    assert [part.split(":")[0] for part in str(caught.value).split("; ")] == ["question", "passages", "titles", "max_new_tokens"]


def test_the_number_of_passages_is_checked_before_any_is_decoded():
    class Undecodable(bytes):
        def decode(self, *_):
            raise AssertionError("a passage of a request with too many was decoded")

    many = np.empty(1_000_000, np.object_)
    many[:] = Undecodable(b"x")
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": many, "titles": many}, LIMITS)
    assert str(caught.value) == "passages: wanted 1 to 3, got 1000000"


def test_a_refusal_lists_a_bounded_number_of_faults():
    limits = Limits(max_passages=1000, max_passage_characters=3)
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": texts(*["long"] * 1000)}, limits)
    assert str(caught.value).endswith("passages[9]: wanted at most 3 characters, got 4; and 990 more")
    with pytest.raises(RequestError) as caught:
        read_request({**GOOD, "passages": texts(*["long"] * 10)}, limits)
    assert str(caught.value).endswith("passages[9]: wanted at most 3 characters, got 4")


def test_contradicting_limits_are_refused():
    with pytest.raises(LimitsError, match="default_max_new_tokens: wanted at most max_new_tokens=8, got 9"):
        Limits(max_new_tokens=8, default_max_new_tokens=9)
    with pytest.raises(LimitsError, match="slots: wanted an integer of at least 1, got 0"):
        Limits(slots=0)
    assert Limits(max_new_tokens=8, default_max_new_tokens=8, slots=1, kv_cache_bytes=0) is not None
    with pytest.raises(LimitsError, match=r"slots: .*at least 1, got 1\.5\n  kv_cache_bytes: wanted an integer of at least 0, got -1$"):
        Limits(slots=1.5, kv_cache_bytes=-1)  # type: ignore[arg-type]
    with pytest.raises(LimitsError, match=r"parameter slots in config\.pbtxt: wanted a whole number, got 'many'"):
        Limits.from_parameters({"slots": {"string_value": "many"}})


def test_limits_are_read_from_a_configuration_by_their_names_and_by_one_former_name():
    def parameters(**values: int) -> dict[str, dict[str, str]]:
        return {name: {"string_value": str(value)} for name, value in values.items()}

    assert Limits.from_parameters({}) == Limits()
    assert Limits.from_parameters(parameters(slots=3, reader=7)) == Limits(slots=3)
    assert Limits.from_parameters(parameters(max_in_hand=5)) == Limits(max_in_flight=5)
    assert Limits.from_parameters(parameters(max_in_flight=6, max_in_hand=5)) == Limits(max_in_flight=6)
    assert Limits(slots=3).to_parameters(("slots", "log_text")) == {"slots": "3", "log_text": "0"}


def test_the_timeout_is_read_and_every_other_parameter_is_refused_by_name():
    assert read_request(GOOD, LIMITS, {"timeout": 7, "id": "a", "triton_enable_empty_final_response": True}) == ReaderRequest(
        "who?", ["a", "b"], None, 4, 0, 7, "a"
    )
    for parameters, fault in (
        ({"max_tokens": 3}, r"^max_tokens: unknown; did you mean max_new_tokens\? known are question, .*, timeout \(microseconds\)$"),
        ({"zzz": 3}, "^zzz: unknown; known are question"),
        ({"triton_own": 1, "titles": "a", "zzz": 3}, "^titles: .*; zzz: unknown"),
        ({"titles": "a"}, "^titles: wanted an input tensor, got a request parameter$"),
        ({"timeout": -1}, "^timeout: wanted a whole number of microseconds, got -1$"),
        ({"timeout": True}, "^timeout: wanted a whole number of microseconds, got True$"),
    ):
        with pytest.raises(RequestError, match=fault):
            read_request(GOOD, LIMITS, parameters)


def test_bounds_of_new_tokens_hold_without_triton_too():
    limits = Limits(max_new_tokens=9, default_max_new_tokens=4)
    assert checked_new_tokens(None, None, limits) == (4, 0)
    for maximum, minimum, fault in (
        (10, 0, "max_new_tokens: wanted 1 to 9, got 10"),
        (0, 0, "max_new_tokens: wanted 1 to 9, got 0"),
        (2, 3, "min_new_tokens: wanted at most max_new_tokens=2, got 3"),
    ):
        with pytest.raises(RequestError, match=fault):
            checked_new_tokens(maximum, minimum, limits)
