"""The Triton models on a stand-in of the Python backend: what fails alone, what ends the process, what is published."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.contract.limits import Limits
from serving.contract.tensors import EngineSizes, encoder_tensors
from serving.pipeline.request import RequestError
from tests.serving.triton import fake_backend
from tests.serving.triton.fake_backend import Request

SIZES = EngineSizes(4, 4, 1, (0,), 1, 1, 4, vocab_size=10)
GOOD = {"input_ids": np.full((2, 3), 5, np.int32), "attention_mask": np.ones((2, 3), np.int32)}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], types.ModuleType]]:
    fake_backend.forget_models()
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_backend.module())
    yield lambda name: importlib.import_module(f"serving.triton.{name}")
    fake_backend.forget_models()


class Encoder:
    """Doubles ids; fails where an id is 7, as an engine fails on an input that it cannot run."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        self.batches.append(len(batch))
        if any((ids == 7).any() for ids, _ in batch):
            raise RuntimeError("7 breaks the engine")
        return [np.repeat(ids[..., None] * 2.0, 4, axis=2).astype(np.float32) for ids, _ in batch]


@pytest.fixture
def encoder_model(load: Any) -> Any:
    module = load("encoder_model")
    model = module.EncoderModel()
    model._name, model._encoder, model._vocab_size, model._on_gpu = "fid_encoder", Encoder(), SIZES.vocab_size, False
    model._tensors, model._metrics = encoder_tensors(SIZES), module.EncoderMetrics("fid_encoder")
    return model


def changed(**arrays: np.ndarray) -> Request:
    return Request({**GOOD, **arrays})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(attention_mask=np.ones((2, 4), np.int32)), "attention_mask: wanted the shape of input_ids, [2, 3], got [2, 4]"),
        (changed(attention_mask=np.ones((1, 3), np.int32)), "attention_mask: wanted the shape of input_ids, [2, 3], got [1, 3]"),
        (changed(attention_mask=np.array([[0, 1, 1]] * 2, np.int32)), "attention_mask: wanted rows of ones and then zeros"),
        (changed(attention_mask=np.array([[2, 1, 1]] * 2, np.int32)), "attention_mask: wanted rows of ones and then zeros"),
        (changed(attention_mask=np.array([[-1, 1, 1]] * 2, np.int32)), "attention_mask: wanted rows of ones and then zeros"),
        (Request({"input_ids": GOOD["input_ids"]}), "'NoneType' object has no attribute"),
        (changed(input_ids=np.array([[1, 2, 10]] * 2, np.int32)), "input_ids: wanted 0 to 9, got 10"),
        (changed(input_ids=np.array([[1, -1, 3]] * 2, np.int32)), "input_ids: wanted 0 to 9, got -1"),
        (Request({name: array[:0] for name, array in GOOD.items()}), "input_ids: wanted at least one passage of at least one token"),
        (Request({name: array[:, :0] for name, array in GOOD.items()}), "input_ids: wanted at least one passage of at least one token"),
    ],
)
def test_a_bad_request_to_the_encoder_gets_its_own_error_and_the_batch_lives(encoder_model, bad, message):
    first, wrong, last = encoder_model.execute([Request(GOOD), bad, Request(GOOD)])
    assert wrong.error().message().startswith(message) and wrong.error().code() == "INVALID_ARG"
    for response in (first, last):
        assert np.array_equal(response.output_tensors()[0].as_numpy(), np.full((2, 3, 4), 10, np.float32))
    assert encoder_model._encoder.batches == [2]


def test_a_request_that_breaks_the_engine_fails_alone(encoder_model):
    first, broken, last = encoder_model.execute([Request(GOOD), changed(input_ids=np.full((2, 3), 7, np.int32)), Request(GOOD)])
    assert broken.error().message() == "7 breaks the engine" and broken.error().code() == "INTERNAL"
    assert not first.has_error() and not last.has_error()


def test_a_sticky_cuda_error_ends_the_encoders_process_once_all_are_answered(encoder_model, monkeypatch):
    ended = []
    monkeypatch.setattr(sys.modules["serving.triton.encoder_model"], "is_fatal", lambda error: True)
    monkeypatch.setattr(sys.modules["serving.triton.encoder_model"], "end_process", ended.append)
    responses = encoder_model.execute([Request(GOOD), changed(input_ids=np.full((2, 3), 7, np.int32))])
    assert [response.has_error() for response in responses] == [True, True]
    assert ended == ["fid_encoder: 7 breaks the engine"] and encoder_model._encoder.batches == [2]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 10 s"
        time.sleep(0.005)


def test_an_exception_of_is_cancelled_ends_no_other_questions_cancellation(load):
    module, response = load("reader_model"), load("response")
    model = module.ReaderModel()
    model._name, model._stopping, model._warned = "fid", threading.Event(), set()
    broken, cancelled = (types.SimpleNamespace(caller=response.Caller(r, r.sender)) for r in (Request({}, "a"), Request({}, "b")))
    broken.caller.sender.cancelled, cancelled.caller.sender.cancelled = RuntimeError("the request is gone"), True
    model._in_flight = [broken, cancelled]  # polled in this order
    thread = threading.Thread(target=model._poll_cancellations, daemon=True)
    thread.start()
    wait_for(lambda: cancelled.caller.cancel_reason() is not None)
    assert broken.caller.cancel_reason() is None and "the request is gone" in fake_backend.Logger.lines[0]
    model._stopping.set()
    thread.join(10)


def test_a_refusal_that_cannot_be_sent_costs_no_other_request_of_the_batch(load):
    module = load("reader_model")
    model = module.ReaderModel()
    model._name, model._in_flight, model._warned, model._streams = "fid", set(), set(), False
    model._early_stops = module.EarlyStops()
    model._replay = lambda writer: False
    accepted: list[Any] = []
    model._encoding = types.SimpleNamespace(submit=lambda run, writer: accepted.append(writer))
    model._metrics = types.SimpleNamespace(refused=lambda: None)

    def accept(request: Request, sender: Any) -> Any:
        if request.request_id() == "bad":
            raise ValueError("wrong")
        return request

    model._accept = accept
    bad, good = Request({}, "bad"), Request({}, "good")
    bad.sender.send = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the client is gone"))
    model.execute([bad, good])
    assert accepted == [good] and "the client is gone" in fake_backend.Logger.lines[0]


def test_a_stream_that_lost_a_part_ends_with_an_error(load):
    response = load("response")
    prompt = types.SimpleNamespace(incomplete_byte_tokens=set(), text=lambda tokens: "".join(map(str, tokens)))
    request, finished = Request({}, "a"), []
    ended: list[Any] = []
    writer = response.StreamWriter(
        response.Caller(request, request.sender),
        None,
        prompt,
        {"answer"},
        lambda run, *arguments: run(*arguments),
        finished.append,
        end_later=ended.append,
    )
    sent, send = [], request.sender.send

    def send_but_not_the_second(message: Any, flags: int) -> None:
        sent.append(message)
        if len(sent) == 2:
            raise RuntimeError("no room in shared memory")
        send(message, flags)

    request.sender.send = send_but_not_the_second
    for token in (1, 2, 3):
        writer.on_token(token, -0.5)
    writer.finish(None)
    parts, (last, flags) = request.sender.responses[:-1], request.sender.responses[-1]
    assert len(parts) == 1 and last.error().message() == "no room in shared memory" and flags == 0
    assert ended == [writer.caller]
    assert writer.outcome == "failed" and finished == [writer]


def test_metrics_go_on_after_an_exception_and_count_answers_by_time(load, monkeypatch):
    module = load("metrics")
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    calls: list[int] = []

    def counts() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not now")
        return types.SimpleNamespace(running=1, beams=2, waiting=1, tokens=30, steps=10, step_s=0.5, encoder_tokens=7, dropped_tokens=3)

    metrics = module.Metrics("fid", counts, lambda: 4, lambda counts: 99)
    caller = types.SimpleNamespace(arrived_s=100.0)
    times = types.SimpleNamespace(first_token=100.2, ended=100.25)
    metrics.ended(types.SimpleNamespace(outcome="answered", caller=caller, times=times, queue_s=0.015))
    metrics.refused()
    wait_for(lambda: len(calls) > 2)
    metrics.close()
    families = fake_backend.MetricFamily.every

    def value(name: str, **labels: str) -> float:
        return families[name].metrics[tuple(sorted({"model": "fid", **labels}.items()))].value

    assert value("reader_in_flight_questions") == value("reader_in_hand_questions") == 4
    assert value("reader_generated_tokens_total") == 30 and value("reader_active_slots") == 2
    assert value("reader_questions_total", outcome="answered") == value("reader_questions_total", outcome="refused") == 1
    edges = {"0.2": 0, "0.3": 1, "30": 1, "+Inf": 1}
    assert {edge: value("reader_answer_seconds_bucket", le=edge) for edge in edges} == edges
    assert value("reader_answer_seconds_sum") == pytest.approx(0.25) and value("reader_answer_seconds_count") == 1
    assert value("reader_queue_seconds_bucket", le="0.02") == 1 and value("reader_queue_seconds_bucket", le="0.01") == 0
    assert "not now" in fake_backend.Logger.lines[0] and len(fake_backend.Logger.lines) == 1


def test_a_fatal_error_of_the_decoder_ends_the_readers_process(load, monkeypatch):
    module = load("reader_model")
    ended: list[str] = []
    monkeypatch.setattr(module, "end_process", ended.append)
    monkeypatch.setattr(module, "is_fatal", lambda error: "illegal" in str(error))
    model = module.ReaderModel()
    model._name = "fid"
    model._end_if_fatal(RuntimeError("out of memory"))
    model._end_if_fatal(RuntimeError("an illegal memory access"))
    assert ended == ["fid: an illegal memory access"]


def test_a_reader_whose_engine_decodes_greedily_refuses_beams_and_choices_by_name(load):
    module = load("reader_model")
    texts = {name: np.array([b"a", b"b"], np.object_) for name in ("passages", "allowed_answers")} | {
        "question": np.array([b"q"], np.object_)
    }
    greedy = module._with_what_it_can(Limits(), types.SimpleNamespace(has_beams=False, can_drop=False, slots=16))
    with pytest.raises(RequestError, match="allowed_answers: wanted none, as this reader cannot choose among them"):
        module.read_request(texts, greedy)
    del texts["allowed_answers"]
    with pytest.raises(RequestError, match="num_beams: wanted 1 to 1, got 2"):
        module.read_request({**texts, "num_beams": np.array([2], np.int32)}, greedy)
    able = module._with_what_it_can(Limits(), types.SimpleNamespace(has_beams=True, can_drop=True, slots=4))
    assert (able.max_num_beams, able.max_allowed_answers) == (4, Limits().max_allowed_answers)


@pytest.mark.parametrize(("engine", "precision", "fault"), [("tensorrt", "float16", "on a GPU"), ("onnxruntime", "int8", "with ONNX Run")])
def test_encoder_states_that_cannot_be_kept_are_refused_when_the_model_loads(load, engine, precision, fault):
    module, sizes = load("reader_model"), types.SimpleNamespace(d_model_encoder=8)
    manifest = types.SimpleNamespace(engine=engine, precision=precision, on_gpu=engine == "tensorrt", sizes=sizes)
    assert module._encoder_cache(Limits(), manifest) is None
    with pytest.raises(ValueError, match=f"encoder_cache_bytes: wanted 0 {fault}"):
        module._encoder_cache(Limits(encoder_cache_bytes=9), manifest)


def test_passage_scores_are_shares_of_the_attention(load):
    response = load("response")
    request = Request({})
    caller = response.Caller(request, request.sender)
    writer = response.UnaryWriter(caller, None, None, set(), lambda *call: None, lambda writer: None)
    writer.tokenized(np.array([2, 1, 3]))
    writer.on_attribution(np.array([1, 2, 3, 0, 0, 6], np.float32))  # of 12 heads
    assert writer._passage_scores.dtype == np.float32 and writer._passage_scores.tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(("protocol_us", "parameter_us"), [(1, 0), (0, 1), (1, 60_000_000)])
def test_a_timeout_counts_from_the_protocol_or_from_the_parameters(load, protocol_us, parameter_us):
    response = load("response")
    request = Request({}, timeout_us=protocol_us)
    caller = response.Caller(request, request.sender)
    caller.limit(parameter_us)
    wait_for(lambda: caller.cancel_reason() is not None)
    assert str(caller.cancel_reason()).startswith("the request's timeout of 0.001 ms passed")


@pytest.mark.parametrize(
    ("protocol", "parameters", "wanted"),
    [
        ("a", '{"id": "b"}', "a"),
        ("", '{"id": "b"}', "b"),
        ("", '{"id": 5}', ""),
        ("", "", ""),
        ("", b'{"id": "b", "\xff": 1}', ""),
        ("", b'{"id": "\xff"}', ""),
    ],
)
def test_a_request_has_an_id_whatever_its_parameters_hold(load, protocol, parameters, wanted):
    response = load("response")
    request = Request({}, protocol, parameters=parameters)
    assert response.Caller(request, request.sender).id == wanted


def test_a_reader_with_model_warmup_says_where_to_put_it(load):
    module = load("reader_model")
    config = '{"model_warmup": [{"name": "zeros", "batch_size": 1}]}'
    with pytest.raises(sys.modules["triton_python_backend_utils"].TritonModelException, match=r"fid: model_warmup: .* warm up the encoder"):
        module.ReaderModel().initialize({"model_name": "fid", "model_config": config})


# A process that hangs is ended with its stacks; one that must not go on ends itself.

ROOT = Path(__file__).parents[3]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_is_ended_and_shows_where():
    done = run(
        "import threading\nfrom serving.triton.shutdown import arm_watchdog\n"
        "def stuck(): threading.Event().wait()\narm_watchdog(0.2)\nstuck()"
    )
    assert done.returncode == 1 and "stuck" in done.stderr and "Timeout" in done.stderr


def test_a_process_that_ends_in_time_is_left_alone():
    done = run("from serving.triton.shutdown import arm_watchdog\narm_watchdog(30)")
    assert done.returncode == 0 and done.stderr == ""


def test_a_process_that_must_not_go_on_answers_first_and_ends_with_its_reason():
    done = run(
        "import threading\nfrom serving.triton.shutdown import end_process\nend_process('illegal address')\n"
        "print('answered', flush=True)\nthreading.Event().wait()"
    )
    assert done.returncode == 70 and done.stdout == "answered\n" and "FATAL: illegal address" in done.stderr
