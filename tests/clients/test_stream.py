"""Answers in pieces: over real gRPC, of both clients."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from fido_client.reader_client import AsyncReaderClient, ReaderClient, ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused
from tests.clients.conftest import SyncFace
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer

TOTALS = WHOLE | {"answer": ""}


def test_pieces_come_in_order_and_join_to_the_answer(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([{"answer": "New"}, {"answer": " Yörk"}, TOTALS])
    pieces, answer = reader.stream(server.url, "q", ["p"])
    assert [piece.text for piece in pieces] == ["New", " Yörk"]
    assert (answer.text, answer.log_prob, answer.tokens) == ("New Yörk", -0.5, 3)


def test_stream_asks_the_streaming_model_or_the_one_that_is_named(server: ScriptedServer, reader: Any) -> None:
    for client in ({"model": "fid"}, {"model": "fid_stream"}, {"model": "fid", "stream_model": "canary"}):
        reader.stream(server.url, "q", [{"title": "t", "text": "p"}], max_new_tokens=4, client=client)
    assert [received.model for received in server.received] == ["fid_stream", "fid_stream", "canary"]
    assert server.received[0].tensors == {"question": ["q"], "passages": ["p"], "titles": ["t"], "max_new_tokens": [4]}


def test_times_are_of_the_responses(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Iterator[Any]:
        for piece in ("a", "b"):
            time.sleep(0.1)
            yield {"answer": piece}
        time.sleep(0.2)
        yield TOTALS

    server.on_stream = script
    pieces, answer = reader.stream(server.url, "q", ["p"])
    first_s, second_s = (piece.elapsed_s for piece in pieces)
    assert 0.1 <= first_s and 0.2 <= second_s and 0.4 <= answer.latency_s < 5
    assert answer.time_to_first_token_s == first_s
    assert answer.inter_token_times_s == pytest.approx((second_s - first_s, answer.latency_s - second_s))
    assert answer.mean_inter_token_s == pytest.approx((answer.latency_s - first_s) / 2)


def test_answer_in_one_response_has_no_time_between_tokens(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([WHOLE])
    pieces, answer = reader.stream(server.url, "q", ["p"])
    assert [piece.text for piece in pieces] == ["Paris"]
    assert (answer.text, answer.inter_token_times_s, answer.mean_inter_token_s) == ("Paris", (), None)


def test_empty_answer_has_no_pieces_and_yet_totals(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([TOTALS | {"tokens": 1}])
    pieces, answer = reader.stream(server.url, "q", ["p"])
    assert (pieces, answer.text, answer.tokens) == ([], "", 1)


def test_text_kept_back_until_the_last_response_is_not_lost(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([{"answer": "Par"}, {"answer": ""}, WHOLE | {"answer": "is"}])
    pieces, answer = reader.stream(server.url, "q", ["p"])
    assert [piece.text for piece in pieces] == ["Par", "is"]
    assert answer.text == "Paris"


def test_bare_final_flag_behind_the_totals_says_nothing(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([{"answer": "Paris"}, TOTALS, {}])
    pieces, answer = reader.stream(server.url, "q", ["p"])
    assert [piece.text for piece in pieces] == ["Paris"]
    assert len(answer.inter_token_times_s) == 1


def test_header_that_kills_triton_is_not_sent(server: ScriptedServer, reader: Any) -> None:
    reader.stream(server.url, "q", ["p"])
    assert "triton_grpc_error" not in server.received[0].metadata


def test_refusal_with_a_status_has_its_class(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: _refuse("too many passages", grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(RequestRefused, match=r"fido_stream at .* refused the request") as caught:
        reader.stream(server.url, "q", ["p"])
    assert (caught.value.message, caught.value.model, caught.value.status) == ("too many passages", "fido_stream", "INVALID_ARGUMENT")


def _refuse(message: str, code: grpc.StatusCode | None) -> Iterator[Any]:
    raise Refusal(message, code)
    yield


def test_error_in_words_alone_as_triton_sends_it_is_an_error_without_status(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: _refuse("engine is on fire", None)
    with pytest.raises(ReaderError, match=r"fido_stream at .* failed: engine is on fire") as caught:
        reader.stream(server.url, "q", ["p"])
    assert (type(caught.value), caught.value.message, caught.value.status) == (ReaderError, "engine is on fire", None)


def test_error_after_some_pieces_is_raised_after_them(server: ScriptedServer) -> None:
    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": "Pa"}
        raise Refusal("slot lost", grpc.StatusCode.INTERNAL)

    server.on_stream = script
    with ReaderClient(server.url) as client:
        stream = client.stream("q", ["p"])
        assert next(stream).text == "Pa"
        with pytest.raises(ReaderError, match="slot lost"):
            next(stream)
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="the answer is incomplete"):
            _ = stream.answer


def test_a_refused_stream_is_read_to_its_end(server: ScriptedServer, reader: Any) -> None:
    """One that is cancelled at its error stays in Triton's (2.51) memory for good."""

    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": "Pa"}
        raise Refusal("slot lost", None)

    server.on_stream, server.end_of_refused_stream_s = script, 0.2
    with pytest.raises(ReaderError, match="slot lost"):
        reader.stream(server.url, "q", ["p"])
    assert server.streams_read_out.acquire(timeout=5)


def test_error_behind_the_totals_takes_nothing_away(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Iterator[Any]:
        yield WHOLE
        raise Refusal("connection torn", grpc.StatusCode.UNAVAILABLE)

    server.on_stream = script
    assert reader.stream(server.url, "q", ["p"])[1].text == "Paris"


def test_stream_without_totals_is_not_an_answer(server: ScriptedServer, reader: Any) -> None:
    server.on_stream = lambda received, context: iter([{"answer": "Pa"}])
    with pytest.raises(ReaderError, match="ended after 1 responses without log_prob and tokens"):
        reader.stream(server.url, "q", ["p"])
    server.on_stream = lambda received, context: iter([{}])
    with pytest.raises(ReaderError, match="ended after 0 responses without log_prob and tokens"):
        reader.stream(server.url, "q", ["p"])


def test_timeout_is_for_the_whole_answer(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": "Pa"}
        yield server.wait_until_stopped(received)

    server.on_stream = script
    with pytest.raises(ReaderTimeout, match=r"fido_stream at .* within 0\.2 s"):
        reader.stream(server.url, "q", ["p"], timeout_s=0.2)
    assert server.stopped.acquire(timeout=5)
    assert server.streams_read_out.acquire(timeout=5)


def test_no_server_is_unavailable(reader: Any) -> None:
    with pytest.raises(ReaderUnavailable):
        reader.stream("127.0.0.1:9", "q", ["p"])


def test_bad_request_is_refused_before_a_stream_opens(server: ScriptedServer, reader: Any) -> None:
    with pytest.raises(RequestRefused, match="passages: wanted at least one"):
        reader.stream(server.url, "q", [])
    assert server.received == []


def _endless(server: ScriptedServer) -> Any:
    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": received.question}
        yield server.wait_until_stopped(received)

    return script


@pytest.mark.parametrize("leave", ["close", "with", "drop"])
def test_leaving_a_stream_early_stops_it_on_the_server(server: ScriptedServer, leave: str) -> None:
    server.on_stream = _endless(server)
    with ReaderClient(server.url) as client:
        stream = client.stream("q", ["p"])
        if leave == "with":
            with stream:
                next(stream)
        else:
            next(stream)
            if leave == "close":
                stream.close()
                stream.close()
                assert list(stream) == []
            del stream
        assert server.stopped.acquire(timeout=5)


def test_leaving_an_asyncio_stream_early_stops_it_on_the_server(server: ScriptedServer) -> None:
    server.on_stream = _endless(server)

    async def run() -> None:
        async with AsyncReaderClient(server.url) as client:
            async with client.stream("q", ["p"]) as stream:
                await anext(stream)
            assert await asyncio.to_thread(server.stopped.acquire, timeout=5)
            assert [piece async for piece in stream] == []

            stream = client.stream("q", ["p"])
            await anext(stream)
            waiting = asyncio.create_task(stream.read_to_end())
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await asyncio.to_thread(server.stopped.acquire, timeout=5)

    asyncio.run(run())


@pytest.mark.parametrize("ends_first", [True, False], ids=["stream dropped", "client closed"])
def test_a_stream_left_early_is_read_to_its_end_and_not_cancelled(server: ScriptedServer, reader: Any, ends_first: bool) -> None:
    def script(received: Any, context: Any) -> Iterator[Any]:
        yield {"answer": received.question}
        yield server.wait_until_stopped(received)

    server.on_stream, server.end_of_refused_stream_s = script, 0.3
    reader.stream_first_piece(server.url, "q", ["p"], leave=ends_first)
    assert server.stopped.acquire(timeout=5)
    for _ in ("the stream", "the request that stops it"):
        assert server.streams_read_out.acquire(timeout=5)


def test_the_answer_is_there_at_its_totals_and_the_end_is_read_behind(server: ScriptedServer, reader: Any) -> None:
    ended = threading.Event()

    def script(received: Any, context: Any) -> Iterator[Any]:
        yield WHOLE
        ended.wait(5)

    server.on_stream = script
    if isinstance(reader, SyncFace):
        with ReaderClient(server.url) as client, client.stream("q", ["p"]) as stream:
            assert stream.read_to_end().text == "Paris"
    else:

        async def run() -> None:
            async with AsyncReaderClient(server.url) as client:
                async with client.stream("q", ["p"]) as stream:
                    assert (await stream.read_to_end()).text == "Paris"
                assert not server.streams_read_out.acquire(blocking=False)
                ended.set()

        asyncio.run(run())
    ended.set()
    assert server.streams_read_out.acquire(timeout=5)
    assert len(server.received) == 1  # nothing was stopped


def test_a_server_that_knows_no_stops_has_its_streams_cancelled(server: ScriptedServer, reader: Any) -> None:
    server.knows_stops = False

    def script(received: Any, context: Any) -> Iterator[Any]:
        if not received.question:
            raise Refusal("question: wanted text, got an empty string", None)
        yield {"answer": received.question}
        yield server.wait_until_cancelled(context)

    server.on_stream = script
    reader.stream_first_piece(server.url, "q", ["p"], leave=True)
    assert server.cancelled.acquire(timeout=5)


def test_one_client_reads_several_streams_at_once(server: ScriptedServer) -> None:
    turn = threading.Barrier(2)

    def script(received: Any, context: Any) -> Iterator[Any]:
        turn.wait(5)  # neither goes on before both are there
        yield {"answer": received.question}
        yield TOTALS

    server.on_stream = script
    with ReaderClient(server.url) as client:
        first, second = client.stream("one", ["p"]), client.stream("two", ["p"])
        assert (second.read_to_end().text, first.read_to_end().text) == ("two", "one")


def test_streams_left_early_leave_no_threads_behind(server: ScriptedServer) -> None:
    server.on_stream = _endless(server)
    with ReaderClient(server.url) as client:
        with client.stream("q", ["p"]) as stream:
            next(stream)
        assert server.stopped.acquire(timeout=5)
        before = _client_threads()
        for _ in range(10):
            with client.stream("q", ["p"]) as stream:
                next(stream)
            assert server.stopped.acquire(timeout=5)
        deadline_s = time.monotonic() + 5
        while _client_threads() > before and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert _client_threads() <= before


def _client_threads() -> int:
    return sum(not thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


def test_a_stream_that_the_collector_frees_while_another_opens_blocks_nothing(server):
    client = ReaderClient(server.url)
    channel, message = client._transport._streams, service_pb2.ModelInferRequest(model_name="fido_stream")
    dropped = channel.open(message, 60.0, time.perf_counter())

    class Calls(type(channel._calls)):  # the collector may run at any allocation inside `open`
        def add(self, item: Any) -> None:
            dropped.leave()
            super().add(item)

    channel._calls.__class__ = Calls
    opened = threading.Thread(target=channel.open, args=(message, 60.0, time.perf_counter()), daemon=True)
    opened.start()
    opened.join(10)
    assert not opened.is_alive()
    client.close()


def test_an_asyncio_stream_that_is_dropped_is_stopped(server):
    async def drop() -> None:
        async with AsyncReaderClient(server.url) as client:
            stream = client.stream("q", ["p"])
            call, left = stream._call, []
            call.leave = lambda: left.append(True)  # type: ignore[method-assign]
            del stream
            gc.collect()
            await asyncio.sleep(0.05)
            assert left

    asyncio.run(drop())
