"""The real thing: tritonserver, gRPC and HTTP, tiny readers with random weights whose answers are compared with torch, token for token."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient, ReaderError
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.launcher.installation import ServerError, find_installation, prepared_backends
from serving.launcher.server import SHM, TritonServer, models_of, tls_arguments
from serving.pipeline.prompt import PASSAGES_PER_CHUNK, PromptEncoder

pytestmark = pytest.mark.server

MANY = 2 * PASSAGES_PER_CHUNK + 5  # of a question that is encoded in pieces when it comes alone
LIMITS = Limits(max_passages=MANY, max_question_characters=200, max_new_tokens=40, default_max_new_tokens=12, slots=3)


@pytest.fixture(scope="module")
def repository(engines, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    repository_from_engines(engines["released_fid"][1], path, "fid", LIMITS)
    repository_from_engines(engines["fido"][1], path, "fido", LIMITS)
    return path


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(models_of(["fid", "fido"], stream=True), repository) as server:
        yield server


class Case:
    """A random question with the answer that the torch reader gives."""

    def __init__(self, checkpoint, directory: Path, seed: int):
        rng = np.random.default_rng(seed)

        def words(most: int) -> str:
            return " ".join(f"w{i}" for i in rng.integers(0, 80, rng.integers(1, most)))

        self.question, n = words(8), MANY if seed % 8 == 3 else int(rng.integers(1, 7))
        self.passages, self.titles = [words(30) for _ in range(n)], [words(3) for _ in range(n)]
        self.most = int(rng.integers(1, 30))
        self.least = int(rng.integers(0, self.most + 1))
        prompt = PromptEncoder(Tokenizer.from_file(str(directory / "tokenizer.json")), Manifest.load(directory))
        tokens = prompt.encode(self.question, self.passages, self.titles)
        # as facebookresearch/FiD pads: every passage to the full length, which its cross-attention bias can tell
        padding = checkpoint.reader.config.passage_length - tokens.input_ids.shape[1]
        ids, mask = (torch.from_numpy(np.pad(a, ((0, 0), (0, padding)))).long()[None] for a in (tokens.input_ids, tokens.attention_mask))
        wanted = checkpoint.reader.generate(ids, mask, self.most, self.least)
        self.text, self.tokens, self.log_prob = prompt.text(wanted.tokens[0]), len(wanted.tokens[0]), sum(wanted.log_probs[0])

    def tensors(self) -> dict[str, np.ndarray]:
        return {"question": texts(self.question), "passages": texts(*self.passages), "titles": texts(*self.titles)}

    def ask(self, client: ReaderClient):
        return client.answer(self.question, self.passages, self.titles, max_new_tokens=self.most, min_new_tokens=self.least)

    def check(self, answer) -> None:
        assert (answer.text, answer.tokens) == (self.text, self.tokens)
        assert answer.log_prob == pytest.approx(self.log_prob, abs=1e-3)


@pytest.fixture(scope="module")
def cases(engines) -> dict[str, list[Case]]:
    names = {"fid": "released_fid", "fido": "fido"}
    return {reader: [Case(engines[name][0], engines[name][1], seed) for seed in range(24)] for reader, name in names.items()}


@pytest.mark.parametrize("model", ["fid", "fido"])
def test_served_answers_equal_torch_one_at_a_time_and_eight_at_once(server, cases, model):
    with ReaderClient(server.grpc_url, model) as client:
        for case in cases[model][:8]:
            case.check(case.ask(client))
        with ThreadPoolExecutor(8) as pool:
            for case, answer in zip(cases[model], pool.map(lambda c: c.ask(client), cases[model]), strict=True):
                case.check(answer)


@pytest.mark.parametrize("model", ["fid", "fido"])
def test_streamed_pieces_join_to_the_unary_answer(server, cases, model):
    with ReaderClient(server.grpc_url, f"{model}_stream") as client:
        for case in cases[model][:6]:
            stream = client.stream(case.question, case.passages, case.titles, max_new_tokens=case.most, min_new_tokens=case.least)
            pieces = [piece.text for piece in stream]
            assert "".join(pieces) == case.text


def infer(server, tensors: dict[str, np.ndarray], model: str = "fid"):
    inputs = []
    for name, array in tensors.items():
        kind = {"O": "BYTES", "i": "INT32", "f": "FP32"}[array.dtype.kind]
        inputs.append(grpcclient.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        return client.infer(model, inputs)


def texts(*values: str | bytes) -> np.ndarray:
    return np.array([v if isinstance(v, bytes) else v.encode() for v in values], np.object_)


GOOD = {"question": texts("w1"), "passages": texts("w2", "w3")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": texts("")}, "question: wanted text, got an empty string"),
        ({"question": texts(b"\xff\xfe")}, "question: wanted UTF-8, got byte 0xff at 0"),
        ({"question": texts("x" * 201)}, "question: wanted at most 200 characters, got 201"),
        ({"question": texts(" ".join(["w1"] * 30))}, "question: 32 tokens with its prompt, but a passage holds 24"),
        ({"passages": np.empty(0, np.object_)}, f"passages: wanted 1 to {MANY}, got 0"),
        ({"passages": texts(*["w1"] * (MANY + 1))}, f"passages: wanted 1 to {MANY}, got {MANY + 1}"),
        ({"titles": texts("one")}, "titles: wanted one for each of the 2 passages or none at all, got 1"),
        ({"max_new_tokens": np.array([41], np.int32)}, "max_new_tokens: wanted 1 to 40, got 41"),
        ({"max_new_tokens": np.array([1.0], np.float32)}, "data-type is 'FP32', but model 'fid' expects 'INT32'"),
        ({"question": texts("a", "b")}, r"unexpected shape for input 'question' for model 'fid'. Expected [1], got [2]"),
        ({"nonsense": texts("a")}, "unexpected inference input 'nonsense' for model 'fid'"),
    ],
)
def test_bad_requests_are_told_what_is_wrong_and_harm_no_other(server, cases, change, message):
    case = cases["fid"][0]
    with ReaderClient(server.grpc_url, "fid") as client, ThreadPoolExecutor(2) as pool:
        beside = pool.submit(case.ask, client)
        with pytest.raises(InferenceServerException) as caught:
            infer(server, {**GOOD, **change})
        assert message in str(caught.value)
        case.check(beside.result())


@pytest.mark.parametrize("path", ["fido/generate", "fid_stream/generate_stream"])
def test_a_field_of_http_that_is_not_utf8_is_refused(server, path):
    """Triton passes it on as a parameter; without an answer the client would wait for ever."""
    body = b'{"question": "w1", "passages": ["w2"], "max_\xffnew_tokens": 3}'
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/models/{path}", body, timeout=20) as response:
            said = response.read()
    except urllib.error.HTTPError as error:
        said = error.read()
    assert b"parameters: wanted names and values in UTF-8, got " in said


def test_http_generate_takes_the_same_names(server, cases):
    case = cases["fido"][1]
    body = {"question": case.question, "passages": case.passages, "titles": case.titles}
    body |= {"max_new_tokens": case.most, "min_new_tokens": case.least}
    request = urllib.request.Request(f"{server.http_url}/v2/models/fido/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    assert (answer["answer"], answer["tokens"]) == (case.text, case.tokens)


@pytest.mark.parametrize("model", ["fid", "fido"])
def test_beams_beside_greedy_answers_over_grpc_and_http(server, cases, model):
    """Three slots: three beams fill them, and the greedy questions beside them wait or share their steps."""
    some = cases[model][:6]
    with ReaderClient(server.grpc_url, model) as client, ThreadPoolExecutor(12) as pool:
        beams = [
            pool.submit(client.answer, c.question, c.passages, c.titles, max_new_tokens=c.most, num_beams=3, num_answers=n)
            for c, n in zip(some, (1, 2, 3, 1, 2, 3), strict=True)
        ]
        greedy = [pool.submit(case.ask, client) for case in some]
        for case, answer in zip(some, greedy, strict=True):
            case.check(answer.result())
            assert answer.result().answers == ()
        found = [answer.result() for answer in beams]
        for case, answer, count in zip(some, found, (1, 2, 3, 1, 2, 3), strict=True):
            assert len(answer.answers) == len(answer.answer_log_probs) == count
            assert (answer.text, answer.log_prob) == (answer.answers[0], answer.answer_log_probs[0])
            assert answer.log_prob == pytest.approx(sum(answer.token_log_probs), abs=1e-4)
            assert sum(answer.passage_scores) == pytest.approx(1, abs=1e-3)
            assert len(answer.passage_scores) == len(case.passages)
    body = {"question": some[2].question, "passages": some[2].passages, "titles": some[2].titles, "max_new_tokens": some[2].most}
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/{model}/generate", json.dumps({**body, "num_beams": 3, "num_answers": 3}).encode()
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    assert tuple(answer["answers"]) == found[2].answers
    assert answer["answer_log_probs"] == pytest.approx(found[2].answer_log_probs, abs=1e-3)


def test_beams_that_do_not_fit_and_beams_of_a_stream_are_refused_by_name(server):
    with ReaderClient(server.grpc_url, "fid") as client, pytest.raises(ReaderError, match="num_beams: wanted 1 to 3, got 4"):
        client.answer("w1", ["w2"], num_beams=4)
    # ReaderClient.stream has no beams, so the request is made by hand
    body = json.dumps({"question": "w1", "passages": ["w2"], "num_beams": 2}).encode()
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/models/fid_stream/generate_stream", body) as response:
            found = response.read().decode()
    except urllib.error.HTTPError as error:
        found = error.read().decode()
    assert "num_beams: wanted none, or 1, in a stream" in found


def test_http_generate_stream_sends_the_pieces(server, cases):
    case = cases["fido"][1]
    body = {"question": case.question, "passages": case.passages, "titles": case.titles}
    body |= {"max_new_tokens": case.most, "min_new_tokens": case.least}
    request = urllib.request.Request(f"{server.http_url}/v2/models/fido_stream/generate_stream", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in response.read().decode().splitlines() if line.startswith("data:")]
    assert "".join(event["answer"] for event in events) == case.text
    assert events[-1]["tokens"] == case.tokens


def test_evidence_has_a_score_for_each_passage_and_a_log_prob_for_each_token(server, cases, engines):
    case = cases["fido"][2]
    answer = infer(server, {**case.tensors(), "max_new_tokens": np.array([9], np.int32), "min_new_tokens": np.array([9], np.int32)}, "fido")
    scores, log_probs = answer.as_numpy("passage_scores"), answer.as_numpy("token_log_probs")
    assert scores.shape == (len(case.passages),) and log_probs.shape == (9,)
    assert scores.sum() == pytest.approx(1, abs=1e-5)
    assert log_probs.sum() == pytest.approx(answer.as_numpy("log_prob")[0], abs=1e-4)


def metric(server, name: str, **labels: str) -> float:
    """Value of one of our metrics; the sum over labels that are not given."""
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and all(w in line for w in wanted))


def wait_for(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_metrics_count_answers_tokens_and_refusals(server, cases):
    names = ("answered", "refused")

    def counted() -> list[float]:
        return [metric(server, "reader_questions_total", model="fido", outcome=name) for name in names]

    assert wait_for(lambda: metric(server, "reader_in_flight_questions") == 0)
    time.sleep(0.6)  # what came before is published by now
    before, tokens = counted(), metric(server, "reader_generated_tokens_total", model="fido")
    with ReaderClient(server.grpc_url, "fido") as client:
        answers = [case.ask(client) for case in cases["fido"][:3]]
    with pytest.raises(InferenceServerException):
        infer(server, {**GOOD, "question": texts("")}, "fido")
    assert wait_for(lambda: counted() == [before[0] + 3, before[1] + 1])
    assert metric(server, "reader_generated_tokens_total", model="fido") == tokens + sum(answer.tokens for answer in answers)
    assert metric(server, "reader_step_seconds_total", model="fido") > 0


def test_a_cancelled_question_frees_its_slot_and_its_place(server):
    before = metric(server, "reader_questions_total", model="fid", outcome="cancelled")
    inputs = []
    for name, array in {**GOOD, "max_new_tokens": np.array([40], np.int32), "min_new_tokens": np.array([40], np.int32)}.items():
        inputs.append(grpcclient.InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "BYTES"))
        inputs[-1].set_data_from_numpy(array)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        calls = [client.async_infer("fid", inputs, callback=lambda result, error: None) for _ in range(400)]
        time.sleep(0.1)  # some are being decoded now, and far more wait
        for call in calls:
            call.cancel()
    assert wait_for(lambda: metric(server, "reader_in_flight_questions", model="fid") == 0)
    assert wait_for(lambda: metric(server, "reader_questions_total", model="fid", outcome="cancelled") > before)
    assert wait_for(lambda: metric(server, "reader_kv_cache_bytes", model="fid") == 0)


def test_a_requests_own_timeout_ends_it_in_the_queue_or_in_the_loop(server):
    inputs = []
    for name, array in {**GOOD, "max_new_tokens": np.array([40], np.int32), "min_new_tokens": np.array([40], np.int32)}.items():
        inputs.append(grpcclient.InferInput(name, list(array.shape), "INT32" if array.dtype == np.int32 else "BYTES"))
        inputs[-1].set_data_from_numpy(array)
    with (
        grpcclient.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="timeout of 1 ms passed"),
    ):
        client.infer("fid", inputs, timeout=1000)


def test_only_the_outputs_asked_for_are_sent(server):
    tensors = [grpcclient.InferInput(name, [len(array)], "BYTES") for name, array in GOOD.items()]
    for tensor, array in zip(tensors, GOOD.values(), strict=True):
        tensor.set_data_from_numpy(array)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        result = client.infer("fid", tensors, outputs=[grpcclient.InferRequestedOutput("tokens")])
    assert [output.name for output in result.get_response().outputs] == ["tokens"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "fid/1/decoder_step.onnx").unlink(), "decoder_step.onnx: missing"),
        (lambda r: (r / "fid/1/cross_kv.onnx").write_bytes(b"no engine"), "cross_kv.onnx: SHA-256 wanted"),
        (lambda r: (r / "fid_encoder/1/manifest.json").unlink(), "manifest.json: missing; `make export`"),
        (lambda r: shutil.copy(r / "fido/1/manifest.json", r / "fid/1/manifest.json"), "hold engines of different checkpoints"),
    ],
)
def test_missing_or_mismatching_engines_are_refused_by_name(repository, tmp_path, damage, message):
    shutil.copytree(repository, tmp_path / "repository")
    damage(tmp_path / "repository")
    with pytest.raises(ServerError) as caught, TritonServer(models_of(["fid"], stream=False), tmp_path / "repository"):
        pass
    assert message in str(caught.value)


def test_a_model_that_is_not_there_is_named(repository):
    with pytest.raises(ServerError, match=r"model nobody_encoder: not in .*, which has fid, fid_encoder"):
        TritonServer(["nobody_encoder"], repository).__enter__()


def test_stopping_leaves_no_process_and_no_shared_memory(repository):
    with TritonServer(models_of(["fido"], stream=False), repository) as server:
        infer(server, GOOD, "fido")
        processes = server.model_processes()
        assert set(processes) == {"tritonserver", "fido", "fido_encoder"}
        assert list(SHM.glob(f"{server.shm_prefix}*"))
    assert not [pid for pid in processes.values() if Path(f"/proc/{pid}").exists()]
    assert not list(SHM.glob(f"{server.shm_prefix}*"))


def test_a_server_given_by_path_serves_from_the_backends_beside_it(repository, cases, tmp_path, monkeypatch):
    """The wheel's server laid out as NVIDIA's builds are. No file says its version: the running server does."""
    wheel = find_installation()
    shutil.copytree(prepared_backends(wheel, tmp_path / "prepared"), tmp_path / "opt" / "backends")
    (tmp_path / "opt" / "bin").mkdir()
    shutil.copy(wheel.binary, tmp_path / "opt" / "bin")
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "opt" / "bin" / "tritonserver"))
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(map(str, wheel.libraries)))
    with TritonServer(models_of(["fid"], stream=False), repository) as server, ReaderClient(server.grpc_url, "fid") as client:
        assert server.triton == (2, 51, 0)
        cases["fid"][0].check(cases["fid"][0].ask(client))


def test_grpc_over_tls_answers_who_trusts_its_certificate_and_nobody_in_the_clear(repository):
    certificates = Path(__file__).parents[2] / "clients" / "testdata"
    certificate, key = certificates / "tls_certificate.pem", certificates / "tls_key.pem"
    with TritonServer(models_of(["fido"], stream=False), repository, extra=tls_arguments(certificate, key, None)) as server:
        url = f"localhost:{server.grpc_port}"
        with ReaderClient(url, "fido", ssl=True, root_certificates=str(certificate)) as client:
            assert client.answer("w1", ["w2"]).tokens > 0
        with ReaderClient(url, "fido", timeout_s=5) as client, pytest.raises(ReaderError):
            client.answer("w1", ["w2"])


def gauges(server) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url) as response:
        found = re.findall(r'^(reader_[a-z_]+)\{model="fido"(?:,outcome="answered")?\} (\S+)$', response.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_two_reader_processes_share_the_questions_and_the_metrics(engines, cases, tmp_path):
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", dataclasses.replace(LIMITS, reader_instances=2))
    with TritonServer(models_of(["fido"], stream=False), tmp_path / "repository") as server:
        processes = server.model_processes()
        assert {"fido", "fido 2"} < set(processes)
        with ReaderClient(server.grpc_url, "fido") as client, ThreadPoolExecutor(12) as pool:
            for case, answer in zip(cases["fido"], pool.map(lambda c: c.ask(client), cases["fido"]), strict=True):
                case.check(answer)
        deadline = time.monotonic() + 5
        while (found := gauges(server))["reader_questions_total"] < len(cases["fido"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found["reader_questions_total"] == len(cases["fido"])
        assert found["reader_generated_tokens_total"] == sum(case.tokens for case in cases["fido"])
        assert not any(found[name] for name in ("reader_active_slots", "reader_in_flight_questions", "reader_kv_cache_bytes"))
        assert server.failure() is None
        os.kill(processes["fido"], signal.SIGKILL)
        while server.failure() is None and time.monotonic() < deadline + 5:
            time.sleep(0.05)
        assert server.failure() == "the process of fido 2 has died"  # one of two: which is which nobody can tell


def test_every_metric_on_the_dashboard_is_one_that_is_served(server):
    dashboard = (Path(__file__).parents[3] / "deploy/monitoring/grafana.json").read_text()
    with urllib.request.urlopen(server.metrics_url) as response:
        served = response.read().decode()
    for name in set(re.findall(r"(?:reader|nv_inference)_[a-z_]+", dashboard)):
        assert f"# TYPE {name} " in served, name
