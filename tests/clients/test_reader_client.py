"""One question, one answer: over real gRPC, of both clients."""

import asyncio
import pathlib
import subprocess
import sys
import time
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import deserialize_bytes_tensor

from fido_client.reader_client import AsyncReaderClient, ReaderClient, ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused
from fido_client.request import ReaderRequest, infer_inputs_from_tensors, infer_message_from_tensors, tensors_from_request
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer

TESTDATA = pathlib.Path(__file__).parent / "testdata"


def _raise(error: Exception) -> Any:
    raise error


def test_answer_carries_text_log_prob_tokens_and_its_latency(server: ScriptedServer, reader: Any) -> None:
    def slow(received: Any, context: Any) -> Any:
        time.sleep(0.05)
        return {"answer": "Tōkyō 東京", "log_prob": -1.25, "tokens": 7}

    server.on_infer = slow
    answer = reader.answer(server.url, "capital of Japan?", ["Tokyo"])
    assert (answer.text, answer.log_prob, answer.tokens) == ("Tōkyō 東京", -1.25, 7)
    assert 0.05 <= answer.latency_s < 5


def test_request_arrives_with_names_types_and_titles_that_triton_expects(server: ScriptedServer, reader: Any) -> None:
    passages = [{"title": "Oslo", "text": "Oslo is…"}, {"text": "untitled", "id": "9", "score": 1.5}]
    beams = {"num_beams": 4, "num_answers": 2, "length_penalty": 0.5, "allowed_answers": (text for text in ("Oslo", "Tōkyō"))}
    reader.answer(server.url, "où?", passages, max_new_tokens=9, min_new_tokens=2, client={"model": "fid"}, **beams)
    (received,) = server.received
    assert received.model == "fid"
    assert received.tensors == {
        "question": ["où?"],
        "passages": ["Oslo is…", "untitled"],
        "titles": ["Oslo", ""],
        "max_new_tokens": [9],
        "min_new_tokens": [2],
        "num_beams": [4],
        "num_answers": [2],
        "length_penalty": [0.5],
        "allowed_answers": ["Oslo", "Tōkyō"],
    }
    texts, numbers = ["question", "passages", "titles", "allowed_answers"], ["max_new_tokens", "min_new_tokens", "num_beams", "num_answers"]
    assert received.datatypes == dict.fromkeys(texts, "BYTES") | dict.fromkeys(numbers, "INT32") | {"length_penalty": "FP32"}


def test_all_answers_of_a_search_are_given_with_their_log_probs(server: ScriptedServer, reader: Any) -> None:
    both = {"answers": ["Oslo", "東京"], "answer_log_probs": [-0.25, -1.5]}
    server.on_infer = lambda received, context: {"answer": "Oslo", "log_prob": -0.5, "tokens": 3} | both
    answer = reader.answer(server.url, "q", ["p"], num_answers=2, allowed_answers=["東京", "Oslo"])
    assert (answer.text, answer.answers, answer.answer_log_probs) == ("Oslo", ("Oslo", "東京"), (-0.25, -1.5))


def test_optional_inputs_left_out_are_not_sent(server: ScriptedServer, reader: Any) -> None:
    reader.answer(server.url, "q", ["p"])
    assert set(server.received[0].tensors) == {"question", "passages"}


def test_titles_beside_plain_passages_are_sent(server: ScriptedServer, reader: Any) -> None:
    reader.answer(server.url, "q", ["p", "r"], ["t", "u"])
    assert server.received[0].tensors["titles"] == ["t", "u"]


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RequestRefused, "INVALID_ARGUMENT"),
        (grpc.StatusCode.NOT_FOUND, ReaderUnavailable, "NOT_FOUND"),
        (grpc.StatusCode.UNAVAILABLE, ReaderUnavailable, "UNAVAILABLE"),
        (grpc.StatusCode.INTERNAL, ReaderError, "INTERNAL"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ReaderError, "RESOURCE_EXHAUSTED"),
    ],
)
def test_server_errors_keep_their_words_and_status(
    server: ScriptedServer, reader: Any, code: grpc.StatusCode, kind: type[ReaderError], status: str
) -> None:
    server.on_infer = lambda received, context: _raise(Refusal("passages: wanted 1 to 40, got 41", code))
    with pytest.raises(ReaderError) as caught:
        reader.answer(server.url, "q", ["p"])
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.model, caught.value.status) == ("passages: wanted 1 to 40, got 41", "fido", status)
    for part in ("fido", server.url, status, "passages: wanted 1 to 40, got 41"):
        assert part in str(caught.value)


def test_bad_request_is_refused_without_being_sent(server: ScriptedServer, reader: Any) -> None:
    with pytest.raises(RequestRefused, match="titles: wanted one per passage") as caught:
        reader.answer(server.url, "q", ["p", "r"], ["t"])
    assert caught.value.status is None
    assert caught.value.model == "fido"
    assert server.received == []


def test_no_server_is_unavailable_at_once(reader: Any) -> None:
    start_s = time.monotonic()
    with pytest.raises(ReaderUnavailable, match=r"127\.0\.0\.1:9 is not available .* is the server running there"):
        reader.answer("127.0.0.1:9", "q", ["p"])
    assert time.monotonic() - start_s < 5


def test_timeout_is_the_requests_own_and_cancels_on_the_server(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = lambda received, context: server.wait_until_cancelled(context)
    start_s = time.monotonic()
    with pytest.raises(ReaderTimeout, match=r"did not answer within 0\.2 s") as caught:
        reader.answer(server.url, "q", ["p"], timeout_s=0.2, client={"timeout_s": 30.0})
    assert 0.2 <= time.monotonic() - start_s < 5
    assert caught.value.status == "DEADLINE_EXCEEDED"
    assert server.cancelled.acquire(timeout=5)


def test_timeout_of_the_client_holds_where_the_request_names_none(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = lambda received, context: server.wait_until_cancelled(context)
    with pytest.raises(ReaderTimeout, match=r"within 0\.15 s"):
        reader.answer(server.url, "q", ["p"], client={"timeout_s": 0.15})


def test_infinite_timeout_sends_no_deadline(server: ScriptedServer, reader: Any) -> None:
    # gRPC tells a server without a deadline that centuries are left
    server.on_infer = lambda received, context: WHOLE | {"log_prob": float(min(context.time_remaining(), 1e9))}
    assert reader.answer(server.url, "q", ["p"], timeout_s=float("inf")).log_prob == 1e9
    assert 5 < reader.answer(server.url, "q", ["p"], timeout_s=9).log_prob < 10


def test_hundred_long_passages_and_a_long_answer_pass_grpcs_message_limits(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = lambda received, context: WHOLE | {"answer": "".join(received.tensors["passages"])}
    passages = ["é" * 50_000] * 100  # 10 MB in UTF-8; gRPC receives 4 MB where it is not told otherwise
    assert reader.answer(server.url, "q", passages).text == "".join(passages)


def test_model_that_is_no_reader_is_named_with_its_outputs(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = lambda received, context: {"encoder_hidden_states": 1.0}
    with pytest.raises(ReaderError, match=r"fido_encoder: wanted one element in the output answer, got .*encoder_hidden_states"):
        reader.answer(server.url, "q", ["p"], client={"model": "fido_encoder"})


def test_answer_that_is_not_utf8_is_an_error(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = lambda received, context: WHOLE | {"answer": b"\xff"}
    with pytest.raises(ReaderError, match="wanted UTF-8 text"):
        reader.answer(server.url, "q", ["p"])


def test_is_ready_says_whether_the_model_is_served(server: ScriptedServer, reader: Any) -> None:
    assert reader.is_ready(server.url, "fido") is True
    assert reader.is_ready(server.url, "other") is False
    assert reader.is_ready("127.0.0.1:9", "fido") is False


@pytest.fixture
def tls_server() -> Any:
    key, certificate = (TESTDATA / name for name in ("tls_key.pem", "tls_certificate.pem"))
    scripted = ScriptedServer(grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]))
    yield scripted
    scripted.stop()


def test_tls_answers_and_streams_where_the_certificate_is_trusted(tls_server: ScriptedServer, reader: Any) -> None:
    client = {"ssl": True, "root_certificates": str(TESTDATA / "tls_certificate.pem")}
    assert reader.answer(tls_server.url, "q", ["p"], client=client).text == "Paris"
    assert reader.stream(tls_server.url, "q", ["p"], client=client)[1].text == "Paris"


def test_tls_server_is_unavailable_where_its_certificate_is_not_trusted(tls_server: ScriptedServer, reader: Any) -> None:
    with pytest.raises(ReaderUnavailable):
        reader.answer(tls_server.url, "q", ["p"], timeout_s=5, client={"ssl": True})


@pytest.mark.parametrize("kind", [ReaderClient, AsyncReaderClient])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://127.0.0.1:8000"}, "url: wanted host:port"),
        ({"url": "localhost"}, "url: wanted host:port"),
        ({"model": ""}, "model: wanted the name"),
        ({"timeout_s": 0}, "timeout_s: wanted seconds above 0"),
        ({"timeout_s": "5"}, "timeout_s: wanted seconds above 0"),
        ({"root_certificates": "ca.pem"}, "need ssl=True"),
        ({"ssl": True, "private_key": "key.pem"}, "go together"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_missing_certificate_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such\.pem"):
        ReaderClient(ssl=True, root_certificates="no_such.pem")


def test_closed_clients_say_so(server: ScriptedServer) -> None:
    client = ReaderClient(server.url)
    client.close()
    client.close()
    for use in (lambda: client.answer("q", ["p"]), lambda: client.stream("q", ["p"]), lambda: client.answer_many([])):
        with pytest.raises(RuntimeError, match="closed"):
            use()

    async def run() -> None:
        reader = AsyncReaderClient(server.url)
        await reader.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await reader.answer("q", ["p"])

    asyncio.run(run())


def test_cancelling_the_waiting_task_cancels_on_the_server(server: ScriptedServer) -> None:
    server.on_infer = lambda received, context: server.wait_until_cancelled(context)

    async def run() -> None:
        async with AsyncReaderClient(server.url) as reader:
            task = asyncio.create_task(reader.answer("q", ["p"]))
            while not server.received:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert server.cancelled.acquire(timeout=5)


def test_proxy_settings_do_not_divert_loopback(server: ScriptedServer, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert reader.answer(server.url, "q", ["p"], timeout_s=5).text == "Paris"


def test_clients_import_neither_torch_nor_the_other_packages() -> None:
    code = """
import pkgutil, sys, fido_client
for module in pkgutil.walk_packages(fido_client.__path__, "fido_client."):
    if not module.name.startswith("fido_client.integrations."): __import__(module.name)  # these are for programs that have the frameworks
heavy = {"torch", "transformers", "onnx", "onnxruntime", "tokenizers", "export", "training", "perf"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2] / "clients")


def test_metrics_and_data_format_need_the_standard_library_alone() -> None:
    code = "import sys, fido_client.metrics, fido_client.data.examples; assert not {'numpy', 'grpc', 'tritonclient'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2] / "clients")


# What is sent, and what is refused before it is sent.

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_answers": []}, "allowed_answers: wanted at least one, got none; leave it out to allow any answer"),
        ({"allowed_answers": "yes"}, "allowed_answers: wanted a list of them, got one str"),
        ({"allowed_answers": ["yes", 3]}, "allowed_answers[1]: wanted a string, got int"),
        ({"allowed_answers": ["yes", "no"], "num_answers": 3}, "num_answers: wanted at most the allowed answers (2), got 3"),
        ({"allowed_answers": ["a", "b", "c"], "num_answers": 3, "num_beams": 2}, "num_answers: wanted at most num_beams (2), got 3"),
        ({"num_answers": 2}, "num_answers: wanted at most num_beams (None), got 2"),
    ],
)
def test_faults_of_beams_and_choices_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        tensors_from_request(ReaderRequest("q", ["p"], **options))
    assert caught.value.message == message


def test_all_faults_are_named_at_once_and_the_many_are_counted() -> None:
    assert _fault("", [], ["t"], "3") == (
        "question: wanted some text, got ''; titles: wanted one per passage (0), got 1; max_new_tokens: wanted a whole number, got '3'"
    )
    message = _fault("q", [None] * 100)
    assert message.startswith("passages[0]: wanted a string")
    assert message.endswith("; and 95 more")
