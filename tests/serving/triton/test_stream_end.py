"""How a stream ends: the final flag alone and late, a stop by another request, and what a client sees of both."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.triton import fake_backend
from tests.serving.triton.fake_backend import Request, Sender


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], types.ModuleType]]:
    fake_backend.forget_models()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_backend.module())
    yield lambda name: importlib.import_module(f"serving.triton.{name}")
    fake_backend.forget_models()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 10 s"
        time.sleep(0.005)


@pytest.fixture
def flags(load, monkeypatch) -> Iterator[Any]:
    module = load("final_flag")
    monkeypatch.setattr(module, "DELAY_S", 0.1)
    monkeypatch.setattr(module, "CANCELLED_DELAY_S", 0.2)
    errors: list[Exception] = []
    flags = module.FinalFlags(errors.append)
    flags.errors = errors
    yield flags
    flags.close()


def caller_of(load, sender: Sender) -> Any:
    return load("response").Caller(Request({}, "a"), sender)


def test_the_flag_comes_alone_and_not_before_its_time(load, flags):
    sender, start_s = Sender(), time.monotonic()
    flags.send_later(caller_of(load, sender))
    assert sender.responses == []
    wait_for(lambda: bool(sender.responses))
    assert sender.responses == [(None, 1)] and time.monotonic() - start_s >= 0.1


def test_a_stream_whose_client_has_cancelled_ends_later_still(load, flags):
    sender, start_s = Sender(), time.monotonic()
    sender.cancelled = True
    flags.send_later(caller_of(load, sender))
    wait_for(lambda: bool(sender.responses))
    assert sender.responses == [(None, 1)] and time.monotonic() - start_s >= 0.3


def test_triton_is_not_asked_about_a_stream_that_has_ended(load, flags):
    sender = Sender()
    caller = caller_of(load, sender)
    flags.send_later(caller)
    wait_for(lambda: bool(sender.responses))
    sender.cancelled = RuntimeError("freed memory")
    assert caller.poll_cancelled() is False


def test_a_flag_that_cannot_be_sent_holds_up_no_other(load, flags):
    broken, good = Sender(), Sender()
    broken.cancelled = RuntimeError("the request is gone")
    flags.send_later(caller_of(load, broken))
    flags.send_later(caller_of(load, good))
    wait_for(lambda: bool(good.responses))
    assert [str(error) for error in flags.errors] == ["the request is gone"]


def test_closing_sends_the_waiting_flags_at_once(load, flags, monkeypatch):
    monkeypatch.setattr(load("final_flag"), "DELAY_S", 60.0)
    senders = [Sender() for _ in range(3)]
    senders[1].cancelled = True
    for sender in senders:
        flags.send_later(caller_of(load, sender))
    flags.close()
    assert [sender.responses for sender in senders] == [[(None, 1)]] * 3


class Prompt:
    """Texts of tokens, as the writers need them."""

    def text(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def writer_of(load, sender: Sender, ends: list[Any], finished: list[Any]) -> Any:
    response = load("response")
    request = types.SimpleNamespace(question="q", passages=["p"])
    writer = response.StreamWriter(
        response.Caller(Request({}, "a"), sender),
        request,
        Prompt(),
        {"answer", "tokens", "log_prob"},
        lambda call, *args: call(*args),
        finished.append,
        end_later=ends.append,
    )
    writer._detokenizer = types.SimpleNamespace(add=str, flush=lambda: "")
    return writer


@pytest.mark.parametrize("error", [None, RuntimeError("no")])
def test_a_stream_gives_its_place_back_at_its_last_response_and_ends_later(load, error):
    sender, ends, finished = Sender(), [], []
    writer = writer_of(load, sender, ends, finished)
    writer.on_token(5, -0.5)
    writer.finish(error)
    assert [flags for _, flags in sender.responses] == [0, 0]
    last = sender.responses[-1][0]
    assert last is not None and last.has_error() == (error is not None)
    assert finished == [writer] and ends == [writer.caller]


def test_a_stream_whose_last_response_cannot_be_sent_ends_all_the_same(load):
    sender, ends, finished = Sender(), [], []
    writer = writer_of(load, sender, ends, finished)

    def fails(response: Any = None, flags: int = 0) -> None:
        raise RuntimeError("no shared memory")

    sender.send = fails
    writer.finish(None)
    assert finished == [writer] and ends == [writer.caller] and writer.outcome == "failed"


STREAM_ID = "0123456789abcdef"


@pytest.fixture
def model(load) -> Iterator[Any]:
    module = load("reader_model")
    model = module.ReaderModel()
    model._name, model._streams, model._in_flight = "fid_stream", True, set()
    model._early_stops, model._metrics = module.EarlyStops(), types.SimpleNamespace(refused=lambda: None)
    model._final_flags = module.FinalFlags(print)
    model._stop_relay = types.SimpleNamespace(forward=lambda request_id: None)
    yield model
    model._final_flags.close()


def in_flight(load, model: Any, request_id: str) -> Any:
    writer = types.SimpleNamespace(caller=load("response").Caller(Request({}, request_id), Sender()))
    model._in_flight |= {FrozenWriter(writer.caller)}
    return writer.caller


class FrozenWriter:
    """A writer in flight, which a set can hold."""

    def __init__(self, caller: Any):
        self.caller = caller


@pytest.mark.parametrize("streams", [True, False])
def test_a_request_stops_the_one_that_it_names_and_no_other(load, model, streams):
    model._streams = streams
    named, other = in_flight(load, model, STREAM_ID), in_flight(load, model, STREAM_ID[::-1])
    stop = Request({}, f"stop:{STREAM_ID}")
    model.execute([stop])
    assert str(named.cancel_reason()) == "stopped by the client" and other.cancel_reason() is None
    response, flag = stop.sender.responses[0]
    assert response is not None and not response.has_error() and flag == (0 if streams else 1)


def test_an_id_that_others_could_guess_stops_nothing(load, model):
    caller = in_flight(load, model, "1")
    model.execute([Request({}, "stop:1")])
    assert caller.cancel_reason() is None


def test_a_stop_that_overtakes_its_request_ends_it_when_it_comes(model):
    late, again = Request({}, STREAM_ID), Request({}, STREAM_ID)
    model.execute([Request({}, f"stop:{STREAM_ID}"), late])
    assert late.sender.responses[0][0].error().message() == "stopped by the client"
    model._limits = types.SimpleNamespace()
    model.execute([again])  # one stop ends one request
    assert again.sender.responses[0][0].error().message() != "stopped by the client"


def test_early_stops_are_forgotten_in_time_and_bounded(load, monkeypatch):
    module = load("stop")
    stops = module.EarlyStops()
    for index in range(module.MAX_REMEMBERED + 5):
        stops.add(str(index))
    assert stops.take("0") and not stops.take(str(module.MAX_REMEMBERED + 1))
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e12)
    assert not stops.take("1")


def test_a_stream_whose_totals_cannot_be_made_ends_with_an_error(load):
    sender, ends, finished = Sender(), [], []
    writer = writer_of(load, sender, ends, finished)

    def flush() -> str:
        raise ValueError("no text")

    writer._detokenizer = types.SimpleNamespace(add=str, flush=flush)
    writer.finish(None)
    ((response, flags),) = sender.responses
    assert response.error().message() == "no text" and flags == 0
    assert (ends, finished, writer.outcome) == ([writer.caller], [writer], "failed")


@pytest.mark.parametrize(
    ("parameters", "found"), [('{"id": "abc"}', "abc"), ('{"id": 7}', ""), ('{"other": "\\"id\\""}', ""), ("", ""), ("{}", "")]
)
def test_a_request_s_id_is_read_where_http_generate_puts_it(load, parameters, found):
    response = load("response")
    assert response.Caller(Request({}, parameters=parameters), Sender()).id == found
    assert response.Caller(Request({}, "own", parameters=parameters), Sender()).id == "own"


def test_a_flag_is_sent_though_triton_cannot_say_whether_the_client_cancelled(load):
    sender, errors = Sender(), []
    sender.cancelled = RuntimeError("the request is gone")
    flags = load("final_flag").FinalFlags(errors.append)
    flags._push(0.0, load("response").Caller(Request({}, "a"), sender), is_second=False)
    for _ in range(500):
        if sender.responses:
            break
        time.sleep(0.01)
    flags.close()
    assert [flag for _, flag in sender.responses] == [1] and "the request is gone" in str(errors[0])


@pytest.fixture(scope="module")
def server(engines, tmp_path_factory) -> Iterator[Any]:
    from export.repository import repository_from_engines
    from serving.contract.limits import Limits
    from serving.launcher.server import TritonServer, models_of

    path: Path = tmp_path_factory.mktemp("repository")
    limits = Limits(max_passages=8, max_new_tokens=10_000, default_max_new_tokens=12, slots=2)
    repository_from_engines(engines["fido"][1], path, "fido", limits)
    with TritonServer(models_of(["fido"], stream=True), path) as server:
        yield server


def gauge(server: Any, name: str, model: str = "fido_stream") -> float:
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f'{name}{{model="{model}"'))


LONG = {"max_new_tokens": 10_000, "min_new_tokens": 10_000}


@pytest.mark.server
def test_the_client_has_its_answer_well_before_the_stream_ends(server):
    from fido_client.reader_client import ReaderClient
    from serving.triton.final_flag import DELAY_S

    with ReaderClient(server.grpc_url, "fido") as client:
        client.stream("w1", ["w2"]).read_to_end()
        seconds = []
        for _ in range(5):
            start_s = time.perf_counter()
            client.stream("w1", ["w2"], max_new_tokens=4).read_to_end()
            seconds.append(time.perf_counter() - start_s)
    assert min(seconds) < DELAY_S / 2


@pytest.mark.server
def test_http_events_come_before_the_end_and_the_last_has_the_totals(server):
    from serving.triton.final_flag import DELAY_S

    body = json.dumps({"question": "w1", "passages": ["w2"], "max_new_tokens": 4, "min_new_tokens": 4}).encode()
    request = urllib.request.Request(f"{server.http_url}/v2/models/fido_stream/generate_stream", body)
    with urllib.request.urlopen(request) as response:
        times = {}
        for line in response:
            if line.startswith(b"data:"):
                last, times["last"] = json.loads(line.removeprefix(b"data: ")), time.monotonic()
        assert last["tokens"] == 4 and time.monotonic() - times["last"] >= DELAY_S / 2


@pytest.mark.server
@pytest.mark.parametrize("way", ["close", "deadline"])
def test_a_stream_left_early_frees_its_slot_and_is_not_cancelled(server, way):
    from fido_client.reader_client import ReaderClient, ReaderTimeout

    with ReaderClient(server.grpc_url, "fido") as client:
        tokens = gauge(server, "reader_generated_tokens_total")
        if way == "close":
            with client.stream("w1", ["w2"], **LONG) as stream:
                next(stream)
        else:
            with pytest.raises(ReaderTimeout):
                client.stream("w1", ["w2"], **LONG, timeout_s=0.15).read_to_end()
        wait_for(lambda: gauge(server, "reader_in_flight_questions") == gauge(server, "reader_active_slots") == 0)
        time.sleep(0.6)  # the metrics of its end are published by now
        assert gauge(server, "reader_generated_tokens_total") - tokens < LONG["max_new_tokens"] / 2
        assert client.stream("w1", ["w2"], max_new_tokens=4).read_to_end().tokens <= 4


@pytest.mark.server
def test_a_stop_reaches_the_process_that_holds_the_stream(engines, tmp_path):
    from export.repository import repository_from_engines
    from fido_client.reader_client import ReaderClient
    from serving.contract.limits import Limits
    from serving.launcher.server import TritonServer, models_of

    repository_from_engines(engines["fido"][1], tmp_path / "r", "fido", Limits(max_new_tokens=10_000, slots=8, reader_instances=2))
    with TritonServer(models_of(["fido"], stream=True), tmp_path / "r") as server, ReaderClient(server.grpc_url, "fido") as client:
        streams = [client.stream("w1", ["w2"], **LONG) for _ in range(8)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()
        wait_for(lambda: gauge(server, "reader_in_flight_questions") == gauge(server, "reader_active_slots") == 0)
        time.sleep(0.6)  # the metrics of its end are published by now
        assert gauge(server, "reader_generated_tokens_total") < 8 * LONG["max_new_tokens"] / 2


@pytest.mark.server
def test_a_stopped_stream_says_so_and_a_stop_frees_a_unary_request_too(server):
    import tritonclient.grpc as grpcclient
    from tritonclient.utils import InferenceServerException

    from fido_client.connection.stop import stop_id, stop_tensors
    from fido_client.request import ReaderRequest, infer_inputs_from_tensors, tensors_from_request

    inputs = infer_inputs_from_tensors(tensors_from_request(ReaderRequest("w1", ["w2"], **LONG)))
    errors: list[Any] = []
    over = threading.Event()
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.async_infer("fido", inputs, lambda result, error: (errors.append(error), over.set()), request_id=STREAM_ID)
        client.infer("fido", infer_inputs_from_tensors(stop_tensors()), request_id=stop_id(STREAM_ID))
        assert over.wait(5)
    assert isinstance(errors[0], InferenceServerException) and "stopped by the client" in str(errors[0])


def post(server: Any, path: str, **fields: Any) -> tuple[int, str]:
    request = urllib.request.Request(f"{server.http_url}/v2/models/{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.server
@pytest.mark.parametrize("path", ["fido/generate", "fido_stream/generate_stream"])
@pytest.mark.parametrize("way", ["timeout", "stop"])
def test_over_http_a_timeout_or_a_stop_ends_an_answer_that_nobody_waits_for(server, path, way):
    if way == "timeout":
        answer = post(server, path, question="w1", passages=["w2"], **LONG, timeout=100_000)
        assert "timeout of 100 ms passed" in answer[1]
    else:
        stop = threading.Timer(0.1, post, (server, path), {"id": f"stop:{STREAM_ID}", "question": "", "passages": [""]})
        stop.start()
        answer = post(server, path, question="w1", passages=["w2"], **LONG, id=STREAM_ID)
        stop.join()
        assert "stopped by the client" in answer[1]
    wait_for(lambda: gauge(server, "reader_in_flight_questions", path.split("/")[0]) == 0)


@pytest.mark.server
def test_shutdown_does_not_wait_for_a_flag(engines, tmp_path):
    from export.repository import repository_from_engines
    from fido_client.reader_client import ReaderClient
    from serving.contract.limits import Limits
    from serving.launcher.server import TritonServer, models_of

    repository_from_engines(engines["fido"][1], tmp_path / "r", "fido", Limits())
    with TritonServer(models_of(["fido"], stream=True), tmp_path / "r") as server:
        with ReaderClient(server.grpc_url, "fido") as client:
            client.stream("w1", ["w2"]).read_to_end()
            processes = server.model_processes()
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 10
    assert not [pid for pid in processes.values() if Path(f"/proc/{pid}").exists()]
