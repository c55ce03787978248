"""Retries: what is sent again, how often, with which pauses, and that the deadline holds; over real gRPC, of both clients."""

import threading
import time
from typing import Any

import grpc
import pytest

from fido_client import AsyncReaderClient, ReaderClient, ReaderError, ReaderRequest, ReaderTimeout, ReaderUnavailable, RequestRefused
from fido_client.connection.retry import RetryPolicy
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer


def _failing(times: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, message: str = "512 questions in flight") -> Any:
    """Fails the first attempts of each question."""
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def script(received: Any, context: Any) -> Any:
        with lock:
            seen[received.question] = seen.get(received.question, 0) + 1
            attempt = seen[received.question]
        if attempt <= times:
            raise Refusal(message, code)
        return WHOLE | {"answer": received.question}

    return script


def test_a_server_that_is_full_is_asked_again(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = _failing(2)
    assert reader.answer(server.url, "q", ["p"], client={"retries": 2}).text == "q"
    assert len(server.received) == 3


def test_nothing_is_retried_by_default_and_no_more_often_than_wanted(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = _failing(9)
    for settings, attempts in (({}, 1), ({"retries": 2}, 3)):
        server.received.clear()
        with pytest.raises(ReaderUnavailable, match="512 questions in flight"):
            reader.answer(server.url, "q", ["p"], client=settings)
        assert len(server.received) == attempts


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, RequestRefused),
        (grpc.StatusCode.NOT_FOUND, ReaderUnavailable),
        (grpc.StatusCode.INTERNAL, ReaderError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ReaderTimeout),
    ],
)
def test_other_failures_are_not_retried(server: ScriptedServer, reader: Any, code: grpc.StatusCode, kind: type[ReaderError]) -> None:
    server.on_infer = _failing(9, code)
    with pytest.raises(kind):
        reader.answer(server.url, "q", ["p"], client={"retries": 5})
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'fido' has no available versions"),
        (grpc.StatusCode.INTERNAL, "Failed to process the request(s): fido_encoder: Server not ready"),
    ],
)
def test_a_server_that_shuts_down_is_asked_again(server: ScriptedServer, reader: Any, code: grpc.StatusCode, message: str) -> None:
    server.on_infer = _failing(1, code, message)
    assert reader.answer(server.url, "q", ["p"], client={"retries": 1}).text == "q"


def test_several_servers_are_asked_in_turn_and_a_dead_one_costs_no_answer(reader: Any) -> None:
    servers = [ScriptedServer(), ScriptedServer()]
    urls = ",".join(server.url for server in servers)
    questions = [ReaderRequest(f"q{index}", ["p"]) for index in range(20)]
    try:
        for form in (urls, f"ipv4:{urls}"):
            for server in servers:
                server.received.clear()
            answers = reader.answer_many(form, questions, client={"retries": 3}, concurrency=4)
            assert [answer.text for answer in answers] == ["Paris"] * 20
            assert min(len(server.received) for server in servers) >= 5, "round robin"
        servers[0].stop()
        servers[1].received.clear()
        answers = reader.answer_many(urls, questions, client={"retries": 5}, concurrency=4)
        assert [answer.text for answer in answers] == ["Paris"] * 20
        assert len(servers[1].received) == 20
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("kind", [ReaderClient, AsyncReaderClient])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("one:8001,two:8001", "wanted ipv4 addresses with their ports, got 'one:8001' in .*dns:///NAME:PORT"),
        ("127.0.0.1:8001,127.0.0.1", "got '127.0.0.1' in"),
        ("ipv6:127.0.0.1:8001,[::1]:8001", "wanted ipv6 addresses with their ports, got '127.0.0.1:8001'"),
        ("dns:///readers", "wanted a name and a port, such as dns:///readers:8001, got 'readers' in"),
    ],
)
def test_addresses_that_grpc_would_not_understand_are_refused(kind: Any, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(url)


def test_over_http_there_is_one_server() -> None:
    with pytest.raises(ValueError, match="url: wanted one server over HTTP"):
        ReaderClient("127.0.0.1:8000,127.0.0.1:8010", transport="http")


def test_deadline_covers_all_attempts(server: ScriptedServer, reader: Any) -> None:
    server.on_infer = _failing(10**9)
    start_s = time.monotonic()
    with pytest.raises(ReaderUnavailable):
        reader.answer(server.url, "q", ["p"], timeout_s=0.5, client={"retries": 1000})
    assert time.monotonic() - start_s < 3
    assert 2 <= len(server.received) < 20


def test_a_server_that_starts_late_is_waited_for(reader: Any) -> None:
    first = ScriptedServer()
    port = first.port
    first.stop()
    started: list[ScriptedServer] = []
    timer = threading.Timer(0.3, lambda: started.append(ScriptedServer(port=port)))
    timer.start()
    try:
        assert reader.answer(f"127.0.0.1:{port}", "q", ["p"], client={"retries": 20}).text == "Paris"
    finally:
        timer.join()
        for scripted in started:
            scripted.stop()


def test_answer_many_retries_each_question_and_keeps_the_order(server: ScriptedServer) -> None:
    server.on_infer = _failing(1)
    with ReaderClient(server.url, retries=1) as client:
        results = list(client.answer_many([ReaderRequest(f"q{index}", ["p"]) for index in range(12)], concurrency=4))
    assert [result.text for result in results if not isinstance(result, ReaderError)] == [f"q{index}" for index in range(12)]
    assert len(server.received) == 24
    assert server.most_in_flight <= 4


def test_answer_many_ends_with_the_error_where_retries_do_not_help(server: ScriptedServer) -> None:
    server.on_infer = _failing(2)
    with ReaderClient(server.url, retries=1) as client:
        (result,) = client.answer_many([ReaderRequest("q", ["p"])])
    assert isinstance(result, ReaderUnavailable)


def test_closing_the_results_drops_a_question_that_waits_for_its_next_attempt(server: ScriptedServer) -> None:
    server.on_infer = lambda received, context: WHOLE if received.question == "q0" else _failing(9)(received, context)
    with ReaderClient(server.url, retries=1000, timeout_s=60) as client:
        results = client.answer_many([ReaderRequest(f"q{index}", ["p"]) for index in range(2)], concurrency=2)
        next(results)
        results.close()  # type: ignore[attr-defined]
        time.sleep(0.1)
        attempts = len(server.received)
        time.sleep(0.5)
        assert len(server.received) == attempts


def test_pauses_grow_to_five_seconds_and_are_not_all_equal() -> None:
    policy, error = RetryPolicy(100), ReaderUnavailable("full", status="UNAVAILABLE")
    for failures, longest_s in ((1, 0.1), (2, 0.2), (3, 0.4), (20, 5.0), (99, 5.0)):
        pauses = [policy.pause_s(error, failures=failures, remaining_s=float("inf")) for _ in range(50)]
        assert all(pause is not None and longest_s / 2 <= pause <= longest_s for pause in pauses)
        assert len(set(pauses)) > 10
    assert policy.pause_s(error, failures=5, remaining_s=0.7) is None


@pytest.mark.parametrize("kind", [ReaderClient, AsyncReaderClient])
@pytest.mark.parametrize("retries", [-1, 1.5, True, None])
def test_retries_that_are_no_count_are_refused(kind: Any, retries: Any) -> None:
    with pytest.raises(ValueError, match="retries: wanted a whole number from 0"):
        kind(retries=retries)
