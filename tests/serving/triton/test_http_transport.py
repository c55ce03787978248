"""The client over HTTP against the real server: gRPC's answers, its errors, and what is left of a client that goes."""

from __future__ import annotations

import dataclasses
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from export.repository import repository_from_engines
from fido_client.errors import ReaderTimeout, ReaderUnavailable, RequestRefused
from fido_client.reader_client import Answer, ReaderClient, ReaderError
from serving.contract.limits import Limits
from serving.launcher.endpoints import free_ports
from serving.launcher.server import TritonServer, models_of

pytestmark = pytest.mark.server
LONG = {"max_new_tokens": 10_000, "min_new_tokens": 10_000}
QUESTIONS = [(f"w{i} w{i + 1}", [f"w{j} w{i}" for j in range(1 + i % 5)], i % 2 == 0) for i in range(12)]


@pytest.fixture(scope="module")
def server(engines, tmp_path_factory) -> Iterator[TritonServer]:
    path = tmp_path_factory.mktemp("repository")
    limits = Limits(max_passages=8, max_new_tokens=10_000, default_max_new_tokens=12, slots=2)
    repository_from_engines(engines["fido"][1], path, "fido", limits)
    with TritonServer(models_of(["fido"], stream=True), path) as server:
        yield server


@pytest.fixture
def http(server) -> Iterator[ReaderClient]:
    with over_http(server) as client:
        yield client


def over_http(server: TritonServer, model: str = "fido", **options: Any) -> ReaderClient:
    return ReaderClient(server.http_url.removeprefix("http://"), model, transport="http", **options)


def without_times(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(answer).items() if not name.endswith("_s")}


def wait_until_idle(server: TritonServer, model: str) -> None:
    """Until the model holds no question and no slot."""
    deadline = time.monotonic() + 5
    while True:
        with urllib.request.urlopen(server.metrics_url) as response:
            lines = response.read().decode().splitlines()
        names = tuple(f'{name}{{model="{model}"' for name in ("reader_active_slots", "reader_in_flight_questions"))
        held = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(names))
        if not held:
            return
        assert time.monotonic() < deadline, f"{model}: still held: {held}"
        time.sleep(0.05)


def test_answers_are_those_of_grpc(server, http):
    with ReaderClient(server.grpc_url, "fido") as grpc:
        for question, passages, titled in QUESTIONS:
            titles = [f"w{len(p)} ä" for p in passages] if titled else None
            wanted, got = (client.answer(question, passages, titles, max_new_tokens=9) for client in (grpc, http))
            assert without_times(got) == without_times(wanted)
            streamed = http.stream(question, passages, titles, max_new_tokens=9).read_to_end()
            assert (streamed.text, streamed.tokens) == (wanted.text, wanted.tokens)
            assert streamed.passage_scores == wanted.passage_scores and streamed.token_log_probs == wanted.token_log_probs
    assert http.is_ready() and http.served_model().limits["max_passages"] == 8


def test_many_at_once_are_answered_in_order(server, http):
    requests = [{"question": question, "passages": passages, "max_new_tokens": 6} for question, passages, _ in QUESTIONS]
    alone = [http.answer(**request) for request in requests]
    assert [a.text for a in http.answer_many(requests * 3, concurrency=8)] == [a.text for a in alone] * 3
    with ThreadPoolExecutor(6) as pool:
        assert [a.text for a in pool.map(lambda request: http.answer(**request), requests)] == [a.text for a in alone]


def test_errors_are_those_of_grpc(server, http):
    with pytest.raises(RequestRefused, match=r"passages: wanted 1 to 8, got 9"):
        http.answer("w1", ["w2"] * 9)
    with pytest.raises(ReaderError, match="passages: wanted 1 to 8, got 9"):
        http.stream("w1", ["w2"] * 9).read_to_end()
    with over_http(server, "nobody") as wrong, pytest.raises(ReaderUnavailable, match="nobody"):
        wrong.answer("w1", ["w2"])
    (port,) = free_ports(1)
    with ReaderClient(f"127.0.0.1:{port}", transport="http") as nowhere:
        assert not nowhere.is_ready()
        for ask in (nowhere.answer, lambda *question: nowhere.stream(*question).read_to_end()):
            with pytest.raises(ReaderUnavailable, match="refused") as caught:
                ask("w1", ["w2"])
            assert caught.value.status == "UNAVAILABLE"
    with pytest.raises(ValueError, match='transport: wanted "grpc" or "http"'):
        ReaderClient(transport="carrier pigeon")


@pytest.mark.parametrize("way", ["unary", "stream"])
def test_a_deadline_ends_the_answer_on_the_server_too(server, http, way):
    with pytest.raises(ReaderTimeout):
        if way == "unary":
            http.answer("w1", ["w2"], **LONG, timeout_s=0.3)
        else:
            http.stream("w1", ["w2"], **LONG, timeout_s=0.3).read_to_end()
    wait_until_idle(server, "fido" if way == "unary" else "fido_stream")
    assert http.answer("w1", ["w2"], max_new_tokens=3).tokens <= 3


def test_a_stream_that_is_left_frees_its_slot(server, http):
    for _ in range(4):
        with http.stream("w1", ["w2"], **LONG) as stream:
            next(stream)
    wait_until_idle(server, "fido_stream")


def test_a_client_that_is_closed_stops_its_answers(server, http):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(http.answer, "w1", ["w2"], **LONG)
        time.sleep(0.3)
        http.close()
        with pytest.raises(ReaderError, match="stopped by the client"):
            waiting.result(5)


def test_answers_that_nobody_fetches_any_more_are_stopped(server, http):
    requests = [{"question": "w1", "passages": ["w2"], "max_new_tokens": 2}] + [{"question": "w1", "passages": ["w2"], **LONG}] * 2
    answers = http.answer_many(requests, concurrency=3)
    assert next(answers).tokens <= 2
    answers.close()
    wait_until_idle(server, "fido")


def test_a_request_waits_for_a_server_that_starts(engines, tmp_path):
    repository_from_engines(engines["fido"][1], tmp_path / "r", "fido", Limits())
    ports = tuple(free_ports(3))
    client = ReaderClient(f"127.0.0.1:{ports[0]}", transport="http", retries=100)
    with client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.answer, "w1", ["w2"])
        with TritonServer(models_of(["fido"], stream=False), tmp_path / "r", ports):
            assert waiting.result(60).tokens >= 1
