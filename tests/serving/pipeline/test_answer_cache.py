"""Kept answers: equal to what was put, within their bytes, under eviction and from many threads; and served, with choices beside them."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.repository import repository_from_engines
from fido_client.reader_client import Answer, ReaderClient, ReaderError, ReaderRequest
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.answer_cache import ENTRY_BYTES, AnswerCache, key_of
from serving.pipeline.elimination import EliminationOptions
from serving.pipeline.prompt import PromptEncoder
from serving.pipeline.request import BeamOptions, Choices
from serving.pipeline.request import ReaderRequest as Checked
from tests.serving.pipeline.test_beam_search import by_full_passes

ASKED = Checked("q", ["a", "b"], None, 5, 0)
ENTRY = ENTRY_BYTES + 32  # of an answer of no bytes


def test_requests_that_differ_in_anything_that_matters_have_keys_of_their_own():
    others = [
        {"question": "Q"},
        {"passages": ["ab"]},
        {"passages": ["a", "b", ""]},
        {"passages": ["b", "a"]},
        {"titles": ["", ""]},
        {"titles": ["a", "b"]},
        {"max_new_tokens": 6},
        {"min_new_tokens": 1},
        {"beams": BeamOptions(2, 1, 1.0)},
        {"beams": BeamOptions(2, 2, 1.0)},
        {"beams": BeamOptions(2, 1, 0.5)},
        {"choices": Choices(["a", "b"], 1)},
        {"choices": Choices(["a", "b"], 2)},
        {"choices": Choices(["b", "a"], 1)},
        {"elimination": EliminationOptions(1, 0.5)},
        {"elimination": EliminationOptions(2, 0.5)},
        {"elimination": EliminationOptions(1, 0.5, 3)},
    ]
    keys = {key_of(ASKED), *(key_of(dataclasses.replace(ASKED, **change)) for change in others)}
    assert len(keys) == len(others) + 1
    assert {field.name for field in dataclasses.fields(Checked)} - {name for change in others for name in change} == {"timeout_us", "id"}
    assert key_of(dataclasses.replace(ASKED, timeout_us=7, id="x")) == key_of(ASKED)


def asked(number: int) -> Checked:
    return dataclasses.replace(ASKED, question=f"q{number}")


@settings(deadline=None)
@given(
    room=st.integers(0, 12 * ENTRY),
    calls=st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 900)), max_size=60),
)
def test_what_is_kept_is_what_was_put_and_the_least_recently_used_leave_first(room, calls):
    cache, kept = AnswerCache(room), collections.OrderedDict[int, tuple[bytes, int]]()
    hits = misses = 0
    for is_put, number, length in calls:
        if is_put:
            answer = bytes([number]) * length
            cache.put(asked(number), answer)
            alone = AnswerCache(1 << 20)
            alone.put(asked(number), answer)
            size = alone.counts().bytes
            if size <= room:
                kept.pop(number, None)
                kept[number] = answer, size
                while sum(size for _, size in kept.values()) > room:
                    kept.popitem(last=False)
        else:
            found = cache.get(asked(number))
            assert found == (kept[number][0] if number in kept else None)
            if number in kept:
                kept.move_to_end(number)
            hits, misses = hits + (found is not None), misses + (found is None and room > 0)
        counts = cache.counts()
        assert (counts.entries, counts.bytes) == (len(kept), sum(size for _, size in kept.values()))
        assert counts.bytes <= room and (counts.hits, counts.misses) == (hits, misses)


def test_an_answer_that_is_changed_after_it_was_given_stays_as_it_was_put():
    cache, answer = AnswerCache(10_000), [1, 2]
    cache.put(ASKED, answer)
    answer.append(3)
    cache.get(ASKED).append(4)
    assert cache.get(ASKED) == [1, 2]


def test_threads_get_the_answer_of_their_own_request_or_none_while_others_push_it_out():
    cache = AnswerCache(4 * (ENTRY + 120))

    def work(seed: int) -> int:
        rng, found = random.Random(seed), 0
        for _ in range(1500):
            number = rng.randrange(6)
            answer = cache.get(asked(number))
            assert answer in (None, [number] * (20 + number))
            found += answer is not None
            cache.put(asked(number), [number] * (20 + number))
        return found

    with ThreadPoolExecutor(8) as pool:
        hits = sum(pool.map(work, range(8)))
    counts = cache.counts()
    assert 0 < counts.bytes <= 4 * (ENTRY + 120) and counts.entries < 6
    assert (counts.hits, counts.hits + counts.misses) == (hits, 8 * 1500) and 0 < hits < 8 * 1500


# Served: kept answers and choices over gRPC and HTTP.

TITLES = ["w1", "", "w3"]
KINDS: list[dict] = [
    {},
    {"max_new_tokens": 5, "min_new_tokens": 5},
    {"num_beams": 3, "num_answers": 3},
    {"allowed_answers": ["w7 w8", "w7", "w40 w41 w42", "w3"], "num_answers": 4},
    {"allowed_answers": ["w3", "w9", "w7"]},
    {"allowed_answers": ["w7 w8", "w7", "w40 w41 w42"], "num_beams": 2, "num_answers": 2},
    {"allowed_answers": ["w9  w8", "w5"], "num_beams": 1},
]
QUESTIONS = [ReaderRequest(f"w{i} w{i + 1}", [f"w{j} w{i}" for j in range(3)], TITLES, **KINDS[i % len(KINDS)]) for i in range(21)]


def without_time(answer: Answer | ReaderError) -> dict:
    assert isinstance(answer, Answer), answer
    return {name: value for name, value in dataclasses.asdict(answer).items() if name != "latency_s"}


def counters(server: TritonServer, model: str) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    start, end = "reader_answer_cache_", f'{{model="{model}"}} '
    found = [line.split(end) for line in lines if line.startswith(start) and end in line]
    return {name.removeprefix(start): float(value) for name, value in found}


def served(engines, path, **limits) -> TritonServer:
    repository_from_engines(engines["fido"][1], path, "fido", Limits(slots=4, max_new_tokens=40, default_max_new_tokens=12, **limits))
    return TritonServer(models_of(["fido"], stream=True), path)


@pytest.mark.server
def test_served_answers_are_kept_and_equal_to_the_last_bit(engines, tmp_path):
    with served(engines, tmp_path, answer_cache_bytes=1 << 20) as server, ReaderClient(server.grpc_url, "fido") as client:
        first = [without_time(answer) for answer in client.answer_many(QUESTIONS, 1)]
        deadline = time.monotonic() + 10
        while counters(server, "fido")["misses_total"] < len(QUESTIONS) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert counters(server, "fido")["hits_total"] == 0 and counters(server, "fido")["bytes"] > 0
        for transport, url in (("grpc", server.grpc_url), ("http", server.http_url.removeprefix("http://"))):
            with ReaderClient(url, "fido", transport=transport) as again:
                assert [without_time(answer) for answer in again.answer_many(QUESTIONS, 8)] == first
        for _ in range(2):
            with client.stream("w0 w1", ["w2"], max_new_tokens=30, min_new_tokens=30) as stream:
                pieces = "".join(piece.text for piece in stream)
                last = stream.answer.token_log_probs
            assert pieces == stream.answer.text and len(last) == 30
        deadline = time.monotonic() + 20
        while counters(server, "fido_stream")["hits_total"] < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert counters(server, "fido")["hits_total"] == 2 * len(QUESTIONS)
        assert counters(server, "fido_stream")["hits_total"] == 1


@pytest.mark.server
def test_served_choices_are_those_of_full_passes_while_kept_answers_are_pushed_out(engines, tmp_path):
    checkpoint, directory = engines["fido"]
    prompt = PromptEncoder(Tokenizer.from_file(str(directory / "tokenizer.json")), Manifest.load(directory))
    with served(engines, tmp_path, answer_cache_bytes=2_500) as server, ReaderClient(server.grpc_url, "fido") as client:
        wanted = [client.answer(**{f.name: getattr(q, f.name) for f in dataclasses.fields(q)}) for q in QUESTIONS]
        for question, answer in zip(QUESTIONS, wanted, strict=True):
            if not question.allowed_answers:
                assert answer.answers == () or question.num_beams
                continue
            assert answer.text == answer.answers[0] and set(answer.answers) <= set(question.allowed_answers)
            allowed = prompt.answer_ids(question.allowed_answers)
            tokens = prompt.encode(question.question, question.passages, question.titles)
            ids, mask = (torch.from_numpy(array)[None].long() for array in (tokens.input_ids, tokens.attention_mask))
            totals = by_full_passes(checkpoint.reader, ids, mask, allowed)
            of = dict(zip(question.allowed_answers, totals.tolist(), strict=True))
            assert answer.log_prob == pytest.approx(of[answer.text], abs=1e-3)
            shares = 0.0 if question.num_beams else np.logaddexp.reduce(totals)
            assert answer.answer_log_probs == pytest.approx([of[text] - shares for text in answer.answers], abs=1e-3)
            if not question.num_beams:
                best = sorted(question.allowed_answers, key=lambda text: -of[text])
                assert answer.answers == tuple(best[: question.num_answers or 1])
        rng = random.Random(0)
        order = [rng.randrange(len(QUESTIONS)) for _ in range(200)]
        for number, answer in zip(order, client.answer_many([QUESTIONS[n] for n in order], 12), strict=True):
            assert (answer.text, answer.tokens, answer.answers) == (wanted[number].text, wanted[number].tokens, wanted[number].answers)
            assert answer.answer_log_probs == pytest.approx(wanted[number].answer_log_probs, abs=1e-3)
        body = {"question": "w1", "passages": ["w2"], "allowed_answers": ["w7", "w7"]}
        with pytest.raises(ReaderError, match=r"allowed_answers\[1\]: wanted an answer of its own, got the tokens of allowed_answers\[0\]"):
            client.answer(**body)
        body |= {"allowed_answers": "w7", "num_answers": 1}
        request = urllib.request.Request(f"{server.http_url}/v2/models/fido/generate", json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        assert (answer["answer"], answer["answers"], answer["answer_log_probs"]) == ("w7", "w7", 0.0)
        time.sleep(0.6)
        assert counters(server, "fido")["bytes"] <= 2_500 and counters(server, "fido")["hits_total"] > 0
