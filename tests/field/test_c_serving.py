"""Section C of the field list: what people ran into while serving. One test a row; C5 to C7 and C11 are the client's and the streams'."""

from __future__ import annotations

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.endpoints import PortError
from serving.launcher.installation import ServerError
from serving.launcher.server import TritonServer, free_ports, models_of
from serving.pipeline.scheduler import CancelledError
from serving.pipeline.tokenizer_pool import TokenizerPool
from serving.pipeline.truncation import TruncatingTokenizer

ROOT = Path(__file__).parents[2]
QUESTION = {"question": "w1", "passages": ["w2", "w3"]}


@pytest.fixture(scope="module")
def repository(engines, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    repository_from_engines(engines["fido"][1], path, "fido", Limits(max_new_tokens=40, default_max_new_tokens=12, slots=3))
    return path


@pytest.fixture(scope="module")
def server(repository):
    with TritonServer(models_of(["fido"], stream=False), repository) as server:
        yield server


def generate(server, **changes) -> dict:
    body = json.dumps({**QUESTION, **changes}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{server.http_url}/v2/models/fido/generate", body)) as response:
        return json.load(response)


def refusal(server, **changes) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate(server, **changes)
    return json.load(caught.value)["error"]


def series(server) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name.startswith("reader_")}


def test_c1_a_taken_port_is_named_with_its_option_before_the_start(repository):
    """The server is started where another one answers."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = (port, *free_ports(2))
        with pytest.raises(PortError, match=f"^--http-port {port}: another process listens"):
            TritonServer(models_of(["fido"], stream=False), repository, ports=ports).__enter__()


@pytest.mark.parametrize("unit", ["ﷺ", "a long passage of words, ", ".,", "a</s> ", "x" * 7])
def test_c2_tokenizing_costs_by_the_tokens_kept_and_stops_when_the_client_leaves(unit, monkeypatch):
    """Forty passages of fifty thousand characters each."""
    tokenizer = Tokenizer.from_file(str(ROOT / "checkpoints/fid/tokenizer.json"))
    text, given = unit * (50_000 // len(unit)), []
    prefix, whole = TruncatingTokenizer.prefix, TruncatingTokenizer.whole
    monkeypatch.setattr(TruncatingTokenizer, "prefix", lambda self, text, n: given.append(n) or prefix(self, text, n))
    monkeypatch.setattr(TruncatingTokenizer, "whole", lambda self, texts: given.extend(map(len, texts)) or whole(self, texts))
    pool = TokenizerPool(tokenizer, 128, threads=1)
    assert pool.truncated_ids([text] * 4) == [tokenizer.encode(text, add_special_tokens=False).ids[:128]] * 4
    assert sum(given) < 4 * 4_000
    given.clear()
    with pytest.raises(CancelledError):
        pool.truncated_ids([text] * 40, lambda: CancelledError("left") if len(given) >= 3 else None)
    assert len(given) == 3


@pytest.mark.server
def test_c3_answer_time_has_a_histogram_that_counts_answers_only(server):
    """Triton's own request duration ends before the answer is sent."""
    time.sleep(0.6)  # what came before is published by now
    before = series(server)
    started = time.monotonic()
    for _ in range(3):
        generate(server)
    elapsed = time.monotonic() - started
    refusal(server, passages=[])
    refusal(server, timeout=1)

    def change(name: str, **labels: str) -> float:
        text = ",".join(f'{key}="{value}"' for key, value in sorted({"model": "fido", **labels}.items()))
        (key,) = [key for key in before if key.startswith(f"{name}{{") and sorted(key[len(name) + 1 : -1].split(",")) == text.split(",")]
        return series(server)[key] - before[key]

    deadline = time.monotonic() + 5
    while change("reader_questions_total", outcome="cancelled") < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [change("reader_questions_total", outcome=o) for o in ("answered", "refused", "cancelled", "failed")] == [3, 1, 1, 0]
    for name in ("reader_answer_seconds", "reader_queue_seconds"):
        assert change(f"{name}_count") == change(f"{name}_bucket", le="+Inf") == 3
    assert 0 < change("reader_queue_seconds_sum") < change("reader_answer_seconds_sum") < elapsed
    dashboard = json.loads((ROOT / "deploy/monitoring/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for name in ("reader_answer_seconds", "reader_queue_seconds"):
        assert {q.split(",")[0] for q in queries if f"{name}_bucket" in q} == {"histogram_quantile(0.5", "histogram_quantile(0.99"}


@pytest.mark.server
def test_c4_a_timeout_over_http_is_kept_and_a_misspelt_key_is_refused_by_name(server):
    """Keys of the JSON body that name no tensor."""
    assert generate(server, timeout=60_000_000)["tokens"] > 0
    assert "timeout of 1 ms passed" in refusal(server, timeout=1000, max_new_tokens=40, min_new_tokens=40, passages=["w1"] * 40)
    assert refusal(server, max_tokens=5).startswith("max_tokens: unknown; did you mean max_new_tokens? known are question, passages,")
    assert refusal(server, timeout="soon") == "timeout: wanted a whole number of microseconds, got 'soon'"
    both = refusal(server, temperature=1, top_k=2)
    assert "temperature: unknown" in both and "top_k: unknown" in both


WARMUP = 'model_warmup {{ name: "zeros" batch_size: 1 {} }}\n'
ZEROS = 'inputs {{ key: "{}" value {{ data_type: {} dims: {} zero_data: true }} }}'


def warmed_up(repository: Path, tmp_path: Path, model: str, *inputs: tuple[str, str, int]) -> Path:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    with (copy / model / "config.pbtxt").open("a") as config:
        config.write(WARMUP.format(" ".join(ZEROS.format(*each) for each in inputs)))
    return copy


@pytest.mark.server
def test_c8_the_encoder_warms_up_and_a_reader_says_where_to_put_model_warmup(repository, tmp_path):
    """model_warmup in config.pbtxt."""
    for name, model in (("encoder", "fido_encoder"), ("reader", "fido")):
        (tmp_path / name).mkdir()
        inputs = [("input_ids", "TYPE_INT32", 16), ("attention_mask", "TYPE_INT32", 16)]
        if model == "fido":
            inputs = [("question", "TYPE_STRING", 1), ("passages", "TYPE_STRING", 2)]
        chosen = warmed_up(repository, tmp_path / name, model, *inputs)
        if model == "fido_encoder":
            with TritonServer(models_of(["fido"], stream=False), chosen) as server:
                assert generate(server)["tokens"] > 0
            continue
        with pytest.raises(ServerError, match="fido: model_warmup: wanted none"):
            TritonServer(models_of(["fido"], stream=False), chosen).__enter__()


@pytest.mark.server
def test_c9_the_request_log_is_json_lines(server):
    """One JSON object a line, as jq reads them."""
    generate(server, id="c9")
    deadline = time.monotonic() + 5
    while '"c9"' not in server.request_log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = [json.loads(line) for line in server.request_log.read_text().splitlines()]
    assert [line["outcome"] for line in lines if line["request"] == "c9"] == ["answered"]


@pytest.mark.server
def test_c10_passage_scores_sum_to_one_and_one_passage_has_a_scalar(server):
    """Evidence, over HTTP."""
    several = generate(server, passages=["w2", "w3 w4", "w5"])["passage_scores"]
    assert len(several) == 3 and min(several) > 0 and sum(several) == pytest.approx(1, abs=1e-5)
    assert generate(server, passages=["w2"])["passage_scores"] == pytest.approx(1)
