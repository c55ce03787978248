"""What is sent, and what is refused before it is sent."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import deserialize_bytes_tensor

from fido_client.errors import RequestRefused
from fido_client.request import ReaderRequest, infer_inputs_from_tensors, infer_message_from_tensors, tensors_from_request

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def _fault(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestRefused) as caught:
        tensors_from_request(ReaderRequest(*args, **kwargs), model="fido")
    assert (caught.value.model, caught.value.status) == ("fido", None)
    return str(caught.value)


@given(TEXT.filter(lambda text: text.strip()), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_text_survives_encoding_byte_for_byte(question: str, pairs: list[tuple[str, str]]) -> None:
    request = ReaderRequest(question, [{"title": title, "text": text} for title, text in pairs])
    message = infer_message_from_tensors("fido", tensors_from_request(request))
    sent = {
        tensor.name: [value.decode("utf-8") for value in deserialize_bytes_tensor(raw)]
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    }
    assert sent == {"question": [question], "passages": [text for _, text in pairs], "titles": [title for title, _ in pairs]}


def test_streamed_message_equals_the_one_that_tritonclient_makes() -> None:
    tensors = tensors_from_request(ReaderRequest("q?", ["p\0q", "", "é" * 1000], ["t", "", "u"], 7, 0))
    theirs = _get_inference_request("fido", infer_inputs_from_tensors(tensors), "", "", None, 0, False, False, 0, None, None)
    assert infer_message_from_tensors("fido", tensors) == theirs


def test_tensors_are_one_axis_bytes_and_int32() -> None:
    tensors = tensors_from_request(ReaderRequest("q", ["p", "r", "s"], max_new_tokens=np.int64(5), min_new_tokens=0))  # type: ignore[arg-type]
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == {
        "question": (np.dtype(object), (1,)),
        "passages": (np.dtype(object), (3,)),
        "max_new_tokens": (np.dtype(np.int32), (1,)),
        "min_new_tokens": (np.dtype(np.int32), (1,)),
    }


def test_passages_and_titles_may_be_any_iterable() -> None:
    tensors = tensors_from_request(ReaderRequest("q", (text for text in ("p", "r")), iter(("t", "u"))))
    assert tensors["passages"].tolist() == [b"p", b"r"]
    assert tensors["titles"].tolist() == [b"t", b"u"]


def test_title_of_none_is_no_title() -> None:
    assert "titles" not in tensors_from_request(ReaderRequest("q", [{"title": None, "text": "p"}, "r"]))
    assert tensors_from_request(ReaderRequest("q", [{"title": None, "text": "p"}, {"title": "t", "text": "r"}]))["titles"].tolist() == [
        b"",
        b"t",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("", ["p"]), "question: wanted some text, got ''"),
        ((" \n", ["p"]), "question: wanted some text, got ' \\n'"),
        ((7, ["p"]), "question: wanted a string, got int"),
        (("q\ud800", ["p"]), "question: wanted text that UTF-8 can hold, got a lone surrogate '\\ud800' at index 1"),
        (("q", []), "passages: wanted at least one, got none"),
        (("q", "one passage"), "passages: wanted a list of them, got one str"),
        (("q", {"text": "p"}), "passages: wanted a list of them, got one dict"),
        (("q", None), "passages: wanted a list of them, got one NoneType"),
        (("q", ["p", b"r"]), 'passages[1]: wanted a string or a mapping with "text" and "title", got bytes'),
        (("q", [{"body": "p"}]), "passages[0]: wanted the key \"text\", got the keys ['body']"),
        (("q", [{"text": 3}]), 'passages[0]["text"]: wanted a string, got int'),
        (("q", [{"text": "p", "title": 3}]), 'passages[0]["title"]: wanted a string, got int'),
        (("q", ["p"], "t"), "titles: wanted a list of them, got one str; titles: wanted one per passage (1), got 0"),
        (("q", ["p"], ["t", "u"]), "titles: wanted one per passage (1), got 2"),
        (("q", ["p"], [None]), "titles[0]: wanted a string, got NoneType"),
        (("q", [{"text": "p", "title": "t"}], ["t"]), "titles: the passages carry their own titles; give them in one place or the other"),
        (("q", ["p"], None, 0), "max_new_tokens: wanted 1 to 2147483647, got 0"),
        (("q", ["p"], None, 2**31), "max_new_tokens: wanted 1 to 2147483647, got 2147483648"),
        (("q", ["p"], None, 2.0), "max_new_tokens: wanted a whole number, got 2.0"),
        (("q", ["p"], None, True), "max_new_tokens: wanted a whole number, got True"),
        (("q", ["p"], None, None, -1), "min_new_tokens: wanted 0 to 2147483647, got -1"),
        (("q", ["p"], None, 3, 4), "min_new_tokens: wanted at most max_new_tokens (3), got 4"),
    ],
)
def test_fault_is_named_with_what_was_wanted(args: tuple[Any, ...], message: str) -> None:
    assert _fault(*args) == message


def test_all_faults_are_named_at_once_and_the_many_are_counted() -> None:
    assert _fault("", [], ["t"], "3") == (
        "question: wanted some text, got ''; titles: wanted one per passage (0), got 1; max_new_tokens: wanted a whole number, got '3'"
    )
    message = _fault("q", [None] * 100)
    assert message.startswith("passages[0]: wanted a string")
    assert message.endswith("; and 95 more")
