"""Many questions over one connection: order, concurrency, failures, laziness and cancelling, of both clients."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fido_client.ordered_window import OrderedWindow
from fido_client.reader_client import Answer, AsyncReaderClient, ReaderClient, ReaderError, ReaderRequest, ReaderTimeout, RequestRefused
from tests.clients.scripted_server import WHOLE, Refusal, ScriptedServer


def _echo(received: Any, context: Any) -> Any:
    return WHOLE | {"answer": received.question}


def _requests(count: int) -> list[ReaderRequest]:
    return [ReaderRequest(f"q{index}", ["p"]) for index in range(count)]


def test_results_keep_the_order_of_requests_that_finish_in_another(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Any:
        time.sleep(0.1 if received.question in ("q0", "q5") else 0)
        return _echo(received, context)

    server.on_infer = script
    results = reader.answer_many(server.url, _requests(12), concurrency=4)
    assert [result.text for result in results] == [f"q{index}" for index in range(12)]


def test_concurrency_is_reached_and_not_exceeded(server: ScriptedServer, reader: Any) -> None:
    together = threading.Barrier(4)

    def script(received: Any, context: Any) -> Any:
        together.wait(5)  # breaks unless four are in flight at a time
        return _echo(received, context)

    server.on_infer = script
    results = reader.answer_many(server.url, _requests(12), concurrency=4)
    assert all(isinstance(result, Answer) for result in results)
    assert server.most_in_flight == 4


def test_slow_request_does_not_starve_those_behind_it(server: ScriptedServer, reader: Any) -> None:
    others_done = threading.Semaphore(0)

    def script(received: Any, context: Any) -> Any:
        if received.question == "q0":
            assert all(others_done.acquire(timeout=5) for _ in range(9))
        else:
            others_done.release()
        return _echo(received, context)

    server.on_infer = script
    results = reader.answer_many(server.url, _requests(10), concurrency=2)
    assert [getattr(result, "text", result) for result in results] == [f"q{index}" for index in range(10)]


def test_failure_stands_in_its_place_and_the_others_are_answered(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Any:
        if received.question == "q1":
            raise Refusal("passages: too long")
        if received.question == "q2":
            return server.wait_until_cancelled(context)
        return {"answer": "no totals"} if received.question == "q3" else _echo(received, context)

    server.on_infer = script
    requests: list[Any] = _requests(4)
    requests[2] = ReaderRequest("q2", ["p"], timeout_s=0.1)
    requests += [
        {"question": "q4", "passages": [], "titles": None},
        {"question": "q5"},
        {"question": "q6", "passages": ["p"], "n_beams": 4},
        "q7",
        ReaderRequest("q8", ["p"], timeout_s=-1),
        {"question": "q9", "passages": ["p"], "max_new_tokens": 3},
    ]
    results = reader.answer_many(server.url, requests, concurrency=3)
    kinds = [Answer, RequestRefused, ReaderTimeout, ReaderError] + [RequestRefused] * 5 + [Answer]
    assert [type(result) for result in results] == kinds
    for result, words in zip(
        results[1:9],
        [
            "passages: too long",
            "within 0.1 s",
            "output log_prob",
            "passages: wanted at least one, got none",
            "lacks passages",
            "has unknown n_beams",
            "wanted a ReaderRequest or a mapping",
            "timeout_s: wanted seconds above 0",
        ],
        strict=True,
    ):
        assert words in str(result)
    assert [received.tensors.get("max_new_tokens") for received in server.received if received.question == "q9"] == [[3]]


def test_no_requests_give_no_results(server: ScriptedServer, reader: Any) -> None:
    assert reader.answer_many(server.url, []) == []


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True])
def test_concurrency_below_one_is_refused(server: ScriptedServer, reader: Any, concurrency: Any) -> None:
    with pytest.raises(ValueError, match="concurrency: wanted a whole number from 1"):
        reader.answer_many(server.url, _requests(1), concurrency=concurrency)


def test_latency_is_of_the_request_and_not_of_waiting_for_its_turn(server: ScriptedServer, reader: Any) -> None:
    def script(received: Any, context: Any) -> Any:
        time.sleep(0.5 if received.question == "q0" else 0.05)
        return _echo(received, context)

    server.on_infer = script
    results = reader.answer_many(server.url, _requests(4), concurrency=2)
    assert results[0].latency_s >= 0.5
    assert all(0.05 <= result.latency_s < 0.45 for result in results[1:])


def test_requests_are_taken_from_an_endless_generator_as_needed(server: ScriptedServer) -> None:
    taken = 0

    def endless() -> Iterator[ReaderRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield ReaderRequest(f"q{taken}", ["p"])

    server.on_infer = _echo
    with ReaderClient(server.url) as client:
        results = client.answer_many(endless(), concurrency=2)
        assert taken == 0
        assert [next(results).text for _ in range(5)] == ["q1", "q2", "q3", "q4", "q5"]  # type: ignore[union-attr]
        assert taken <= 5 + 16 * 2
        results.close()  # type: ignore[attr-defined]


def test_error_of_the_generator_comes_after_the_results_before_it(server: ScriptedServer) -> None:
    def broken() -> Iterator[ReaderRequest]:
        yield from _requests(3)
        raise OSError("data file vanished")

    server.on_infer = _echo
    with ReaderClient(server.url) as client:
        results = client.answer_many(broken(), concurrency=8)
        assert [next(results).text for _ in range(3)] == ["q0", "q1", "q2"]  # type: ignore[union-attr]
        with pytest.raises(OSError, match="data file vanished"):
            next(results)

    async def run() -> list[Any]:
        seen: list[Any] = []
        async with AsyncReaderClient(server.url) as client:
            with pytest.raises(OSError, match="data file vanished"):
                async for result in client.answer_many(broken(), concurrency=8):
                    seen.append(result)
        return seen

    assert len(asyncio.run(run())) == 3


def _answers_first_only(server: ScriptedServer) -> Any:
    def script(received: Any, context: Any) -> Any:
        return _echo(received, context) if received.question == "q0" else server.wait_until_cancelled(context)

    return script


def test_closing_the_results_cancels_what_is_in_flight(server: ScriptedServer) -> None:
    server.on_infer = _answers_first_only(server)
    with ReaderClient(server.url) as client:
        results = client.answer_many(_requests(3), concurrency=3)
        next(results)
        while len(server.received) < 3:
            time.sleep(0.01)
        results.close()  # type: ignore[attr-defined]
        assert all(server.cancelled.acquire(timeout=5) for _ in range(2))


def test_closing_the_asyncio_results_cancels_what_is_in_flight(server: ScriptedServer) -> None:
    server.on_infer = _answers_first_only(server)

    async def run() -> None:
        async with AsyncReaderClient(server.url) as client:
            results = client.answer_many(_requests(3), concurrency=3)
            await anext(results)
            while len(server.received) < 3:
                await asyncio.sleep(0.01)
            await results.aclose()  # type: ignore[attr-defined]
            assert await asyncio.to_thread(lambda: all(server.cancelled.acquire(timeout=5) for _ in range(2)))

    asyncio.run(run())


def test_threads_share_one_client(server: ScriptedServer) -> None:
    server.on_infer = _echo
    texts: dict[int, str] = {}
    with ReaderClient(server.url) as client:
        threads = [
            threading.Thread(target=lambda index=index: texts.update({index: client.answer(f"q{index}", ["p"]).text})) for index in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert texts == {index: f"q{index}" for index in range(8)}


@given(st.integers(0, 60), st.integers(1, 5), st.randoms())
def test_every_completion_order_gives_results_in_request_order(count: int, concurrency: int, random: object) -> None:
    window: OrderedWindow[int, int] = OrderedWindow(range(count), concurrency)
    running: dict[int, int] = {}
    results: list[int] = []
    while not window.is_exhausted:
        running.update(window.start())
        assert len(running) == window.in_flight <= concurrency
        results += window.due()
        if running:
            index = random.choice(sorted(running))  # type: ignore[attr-defined]
            window.finish(index, running.pop(index) * 10)
    assert results == [index * 10 for index in range(count)]


def test_read_ahead_of_a_stuck_request_is_bounded() -> None:
    window: OrderedWindow[int, int] = OrderedWindow(iter(range(10_000)), 2)
    started = dict(window.start())
    for _ in range(10_000):
        for index in sorted(set(started) - {0}):
            window.finish(index, started.pop(index))
        assert list(window.due()) == []
        more = dict(window.start())
        if not more:
            break
        started |= more
    assert window.in_flight == 1
    window.finish(0, 0)
    assert len(list(window.due())) == 32  # 16 * concurrency
