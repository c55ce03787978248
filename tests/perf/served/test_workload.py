"""Workloads: exact lengths with a real tokenizer, the same requests for the same seed, perf_analyzer's format."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from fido_client.data.examples import Context, Example
from fido_client.request import ReaderRequest, tensors_from_request
from perf.served.workload import (
    WORKLOADS,
    Request,
    RequestMaker,
    Uniform,
    WorkloadError,
    WorkloadSpec,
    exactly,
    main,
    requests_from,
    uniform,
)
from serving.contract.manifest import Manifest
from serving.pipeline.prompt import PromptEncoder

SPEC = WorkloadSpec(Uniform(1, 5), Uniform(20, 24), Uniform(1, 8))


@pytest.fixture(scope="module")
def reader(engines):
    """Version directory of an exported reader, with its tokenizer and manifest."""
    directory = engines["fido"][1]
    return directory, Tokenizer.from_file(str(directory / "tokenizer.json")), Manifest.load(directory)


def test_every_row_is_as_long_as_drawn(reader):
    _, tokenizer, manifest = reader
    maker, encoder = RequestMaker(tokenizer, manifest), PromptEncoder(tokenizer, manifest)
    longest = manifest.prompt.passage_length
    for length in {16, longest - 1, longest}:
        spec = WorkloadSpec(exactly(3), exactly(length), exactly(7))
        for request in maker.make(spec, 5, seed=1):
            mask = encoder.encode(request.question, request.passages).attention_mask
            assert mask.sum(axis=1).tolist() == [length] * 3 == maker.lengths(request)
            assert request.new_tokens == 7


def test_draws_stay_in_their_bounds_and_reach_them(reader):
    _, tokenizer, manifest = reader
    maker = RequestMaker(tokenizer, manifest)
    requests = list(maker.make(SPEC, 200, seed=0))
    rows = [length for request in requests for length in maker.lengths(request)]
    assert {len(request.passages) for request in requests} == set(range(1, 6))
    assert set(rows) == set(range(20, 25))
    assert {request.new_tokens for request in requests} == set(range(1, 9))


def test_the_seed_decides(reader):
    _, tokenizer, manifest = reader
    maker = RequestMaker(tokenizer, manifest)
    first, again, other = (list(maker.make(SPEC, 4, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len({request.passages for request in first}) == 4


@pytest.mark.parametrize(
    ("tokens", "message"), [(exactly(10_000), "wanted at most the reader's passage_length"), (exactly(2), "wanted more than the")]
)
def test_lengths_that_the_reader_cannot_have_are_refused(reader, tokens, message):
    _, tokenizer, manifest = reader
    spec = dataclasses.replace(SPEC, passage_tokens=tokens)
    with pytest.raises(WorkloadError, match=message):
        list(RequestMaker(tokenizer, manifest).make(spec, 1, 0))


def test_uniform_is_uniform():
    numbers = random.Random(0)
    counts = [0] * 4
    for _ in range(8000):
        counts[Uniform(3, 6).draw(numbers) - 3] += 1
    assert all(abs(count - 2000) < 200 for count in counts)
    assert str(Uniform(3, 6)) == "3..6" and str(exactly(3)) == "3"


@pytest.mark.parametrize("text", ["0", "5..4", "..3", "x", "-1..2"])
def test_what_is_no_range_is_refused(text):
    assert uniform("7") == exactly(7) and uniform("7..9") == Uniform(7, 9)
    with pytest.raises(ValueError, match=r"wanted 1 <=|invalid literal"):
        uniform(text)


def tensors_of(entry: dict) -> dict[str, np.ndarray]:
    """What perf_analyzer sends for an entry of its input data: `{"content": ..., "shape": ...}`, or a flat list of the model's own dims."""
    tensors = {}
    for name, value in entry.items():
        content, shape = (value["content"], value["shape"]) if isinstance(value, dict) else (value, [len(value)])
        values = [item.encode() if isinstance(item, str) else item for item in content]
        tensors[name] = np.array(values, object if isinstance(content[0], str) else np.int32).reshape(shape)
    return tensors


@pytest.mark.parametrize(
    "request_",
    [
        Request("Où?", ("one", "two", "three"), None, 5),
        *requests_from([Example("1", "q", ("x",), (Context("a", "A"), Context("b"))), Example("2", "q", ("x",), (Context("a"),))]),
    ],
    ids=["forced length", "titles", "no titles"],
)
def test_perf_analyzer_sends_the_tensors_that_our_client_sends(request_):
    ours = tensors_from_request(
        ReaderRequest(request_.question, request_.passages, request_.titles, request_.new_tokens, request_.new_tokens)
    )
    sent = tensors_of(request_.as_perf_analyzer())
    assert {name: (array.shape, array.tolist()) for name, array in sent.items()} == {
        name: (array.shape, array.tolist()) for name, array in ours.items()
    }


def test_the_command_writes_a_file_or_says_what_is_wrong(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "paper", SPEC)
    out = tmp_path / "deep" / "input.json"
    assert main(["paper", "--reader", str(reader[0]), "--requests", "3", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())["data"]) == 3
    assert "3 requests: 1..5 passages x 20..24 tokens, answers of 1..8 tokens, seed 0" in capsys.readouterr().out
    assert main(["paper", "--reader", str(reader[0]), "--requests", "1", "--passages", "2", "--new-tokens", "3..3", "--out", str(out)]) == 0
    (entry,) = json.loads(out.read_text())["data"]
    assert entry["passages"]["shape"] == [2] and entry["max_new_tokens"] == [3] == entry["min_new_tokens"]
    capsys.readouterr()
    monkeypatch.setitem(WORKLOADS, "paper", dataclasses.replace(SPEC, passage_tokens=exactly(10_000)))
    assert main(["paper", "--reader", str(reader[0]), "--out", str(out)]) == 1
    assert "error: passage_tokens: wanted at most" in capsys.readouterr().err
