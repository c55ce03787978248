"""Retries: what is sent again, how often, with which pauses, and that the deadline holds; over real gRPC, of both clients."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fido_client import (
    Answer,
    AsyncReaderClient,
    ReaderClient,
    ReaderError,
    ReaderRequest,
    ReaderTimeout,
    ReaderUnavailable,
    RequestRefused,
)
from fido_client.connection import endpoint
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
    error = ReaderUnavailable("full", status="UNAVAILABLE")
    for failures, longest_s in ((1, 0.1), (2, 0.2), (3, 0.4), (20, 5.0), (99, 5.0)):
        policy = RetryPolicy(100)
        pauses = [policy.pause_s(error, failures=failures, remaining_s=float("inf")) for _ in range(50)]
        assert all(pause is not None and longest_s / 2 <= pause <= longest_s for pause in pauses)
        assert len(set(pauses)) > 10
    assert policy.pause_s(error, failures=5, remaining_s=0.7) is None


def test_beyond_the_budget_a_retry_waits_for_its_turn_or_fails_by_its_deadline() -> None:
    policy, error = RetryPolicy(100), ReaderUnavailable("full", status="UNAVAILABLE")
    pauses = [policy.pause_s(error, failures=1, remaining_s=60) for _ in range(400)]
    assert max(pause or 0 for pause in pauses[:90]) <= 0.1, "within the budget there is only the usual pause"
    assert all(pause is not None for pause in pauses) and 4 < (pauses[-1] or 0) < 7, "300 retries too many, at 50/s"
    assert policy.pause_s(error, failures=1, remaining_s=1.0) is None
    for _ in range(3000):
        policy.budget.answered()
    assert (policy.pause_s(error, failures=1, remaining_s=1.0) or 9) <= 0.1, "answers earn retries"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'fido' has no available versions"),
        (grpc.StatusCode.INTERNAL, "Failed for execute the inference request. Server not ready"),
        (grpc.StatusCode.INTERNAL, "fido_encoder: Stub process 'fido_encoder_0_0' is not healthy."),
        (grpc.StatusCode.UNAVAILABLE, "the server is shutting down; ask again"),
    ],
)
def test_what_triton_says_while_it_ends_is_retried(server: ScriptedServer, reader: Any, code: grpc.StatusCode, message: str) -> None:
    server.on_infer = _failing(1, code, message)
    assert reader.answer(server.url, "q", ["p"], client={"retries": 1}).text == "q"
    with pytest.raises(ReaderUnavailable) as caught:
        reader.answer(server.url, "another", ["p"])
    assert caught.value.status == "UNAVAILABLE" and message in caught.value.message


@pytest.mark.parametrize("code", [None, grpc.StatusCode.UNAVAILABLE])
@pytest.mark.parametrize(
    ("first", "second", "pieces"),
    [
        ([], ["Pa", "ris"], ["Pa", "ris"]),
        (["Pa"], ["Pa", "ris", " (FR)"], ["Pa", "ris", " (FR)"]),
        (["Pa", "ris"], ["Paris", ""], ["Pa", "ris"]),
        (["P"], ["Pari", "s"], ["P", "ari", "s"]),  # split elsewhere
        (["Pari"], ["Pa", "ris"], ["Pari", "s"]),
        ([""], ["", "Paris"], ["Paris"]),
    ],
)
def test_a_stream_that_breaks_off_goes_on_after_what_has_come(
    server: ScriptedServer, reader: Any, code: grpc.StatusCode | None, first: list[str], second: list[str], pieces: list[str]
) -> None:
    attempts = []

    def script(received: Any, context: Any) -> Any:
        attempts.append(received.id)
        if len(attempts) < 3:
            yield from ({"answer": text} for text in first)
            raise Refusal("the server is shutting down; ask again", code)
        yield from ({"answer": text} for text in second[:-1])
        yield WHOLE | {"answer": second[-1]}

    server.on_stream = script
    got, answer = reader.stream(server.url, "q", ["p"], client={"retries": 2})
    assert [piece.text for piece in got] == pieces and answer.text == "".join(second) and answer.tokens == 3
    assert len(set(attempts)) == 3, "each attempt has an id of its own"
    times_s = [answer.time_to_first_token_s, *answer.inter_token_times_s]
    assert len(times_s) == max(len(first), len(second)) and min(times_s) >= 0 and sum(times_s) == pytest.approx(answer.latency_s)
    attempts.clear()
    with pytest.raises(ReaderUnavailable, match="shutting down"):
        reader.stream(server.url, "q", ["p"], client={"retries": 1})
    assert len(attempts) == 2


def test_a_stream_that_ends_too_early_is_asked_again(server: ScriptedServer, reader: Any) -> None:
    """Over HTTP the death of a server looks like this."""
    server.on_stream = lambda received, context: iter([{"answer": "Pa"}, WHOLE | {"answer": "ris"}][: len(server.received)])
    assert reader.stream(server.url, "q", ["p"], client={"retries": 1})[1].text == "Paris"
    server.received.clear()
    with pytest.raises(ReaderUnavailable, match="ended after 1 responses"):
        reader.stream(server.url, "q", ["p"])


@pytest.mark.parametrize("second", [["Ro", "me"], ["P"]], ids=["another", "shorter"])
def test_a_stream_whose_second_answer_is_another_fails(server: ScriptedServer, reader: Any, second: list[str]) -> None:
    attempts = []

    def script(received: Any, context: Any) -> Any:
        attempts.append(received.id)
        if len(attempts) == 1:
            yield {"answer": "Pa"}
            raise Refusal("the server is shutting down; ask again", None)
        yield from ({"answer": text} for text in second[:-1])
        yield WHOLE | {"answer": second[-1]}

    server.on_stream = script
    with pytest.raises(ReaderError, match=f"broke after 'Pa', and the question, sent again, is answered '{second[0]}'"):
        reader.stream(server.url, "q", ["p"], client={"retries": 5})
    assert len(attempts) == 2


@pytest.fixture
def pair(server: ScriptedServer) -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    other = ScriptedServer()
    yield server, other
    other.stop()


def _urls(pair: tuple[ScriptedServer, ScriptedServer]) -> list[Any]:
    first, second = (server.url for server in pair)
    return [[first, second], f"{first},{second}", f"ipv4:{first},{second}", [f"localhost:{pair[0].port}", second]]


@pytest.mark.parametrize("which", range(4))
def test_several_servers_take_turns(pair: tuple[ScriptedServer, ScriptedServer], which: int) -> None:
    with ReaderClient(_urls(pair)[which]) as client:
        assert client.is_ready()
        for _ in range(6):
            client.answer("q", ["p"])
        assert [len(server.received) for server in pair] == [3, 3]
        assert all(isinstance(result, Answer) for result in client.answer_many([{"question": "q", "passages": ["p"]}] * 8, concurrency=2))
        assert [len(server.received) for server in pair] == [7, 7]
        for _ in range(4):
            with client.stream("q", ["p"]) as stream:
                stream.read_to_end()
        assert [len(server.received) for server in pair] == [9, 9]


def test_several_servers_take_turns_in_asyncio(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    async def ask() -> None:
        async with AsyncReaderClient(_urls(pair)[0]) as client:
            assert await client.is_ready()
            for question in "abcd":
                await client.answer(question, ["p"])
            for question in "abcd":
                await client.stream(question, ["p"]).read_to_end()

    asyncio.run(ask())
    for server in pair:
        assert len(server.received) == 4 and len({(received.model, received.question) for received in server.received}) == 4


def test_a_server_that_shuts_down_or_is_dead_is_passed_over(pair: tuple[ScriptedServer, ScriptedServer], reader: Any) -> None:
    draining, living = pair
    shutting_down = "the server is shutting down; ask again"
    draining.on_infer = _failing(10**9, message=shutting_down)
    draining.on_stream = lambda received, context: (_raise(Refusal(shutting_down, None)) for _ in range(1))
    for _ in range(4):
        assert reader.answer([draining.url, living.url], "q", ["p"], client={"retries": 1}).text == "Paris"
        assert reader.stream([draining.url, living.url], "q", ["p"], client={"retries": 1})[1].text == "Paris"
    with ReaderClient([draining.url, living.url], retries=1) as client:
        draining.received.clear()
        for _ in range(10):
            client.answer("q", ["p"])
        assert len(draining.received) <= 3, "it rests after a failure"
    draining.stop()
    for _ in range(4):
        assert reader.answer([draining.url, living.url], "q", ["p"], client={"retries": 1}).text == "Paris"


def test_a_server_whose_machine_is_gone_is_left_before_the_time_out(server: ScriptedServer, reader: Any, monkeypatch: Any) -> None:
    """Its connection stays open and no byte comes, as after a power cut."""
    monkeypatch.setattr(endpoint, "_KEEPALIVE_MS", 300)
    monkeypatch.setattr(endpoint, "_KEEPALIVE_TIMEOUT_MS", 300)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connections.append(connection)
                connection.sendall(b"\0\0\0\x04\0\0\0\0\0")  # an empty SETTINGS frame of HTTP/2, and never again anything

        connections: list[socket.socket] = []
        threading.Thread(target=greet, daemon=True).start()
        urls = [f"127.0.0.1:{listening.getsockname()[1]}", server.url]
        start_s = time.monotonic()
        assert reader.answer(urls, "q", ["p"], client={"retries": 3, "timeout_s": 20.0}).text == "Paris"
        assert connections and time.monotonic() - start_s < 10
        listening.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_grpc_asks_all_addresses_of_a_name(server: ScriptedServer) -> None:
    """Here each name has one address, so what gRPC is told is looked at."""
    with ReaderClient(f"dns:///localhost:{server.port}") as client:
        assert client.answer("q", ["p"]).text == "Paris"
        assert ("grpc.lb_policy_name", "round_robin") in client.endpoint.channel_args()


@pytest.mark.parametrize("url", ["", ",", [], ["a:1", ""], "a:1,b", "ipv4:", ["a:1,b:2"], "dns:///a"])
def test_addresses_that_are_none_are_refused(url: Any) -> None:
    for kind in (ReaderClient, AsyncReaderClient):
        with pytest.raises(ValueError, match="url: wanted"):
            kind(url)


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("kind", [ReaderClient, AsyncReaderClient])
@pytest.mark.parametrize("retries", [-1, 1.5, True, None])
def test_retries_that_are_no_count_are_refused(kind: Any, retries: Any) -> None:
    with pytest.raises(ValueError, match="retries: wanted a whole number from 0"):
        kind(retries=retries)
