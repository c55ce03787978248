"""Kept encoder states: those of the encoder, within their bytes, under eviction and from many threads; and served."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient, ReaderError, ReaderRequest
from serving.contract.limits import Limits
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.encoder_cache import EncoderStateCache

WIDTH = 4


class Encoder:
    """States that say whose they are, and a record of the prompts that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        with self._lock:
            self.asked += input_ids[:, 0].tolist()
        rows = [np.repeat(ids[:length, None], WIDTH, 1) for ids, length in zip(input_ids, attention_mask.sum(1), strict=True)]
        return np.concatenate(rows).astype(np.float32) * 0.5


def prompts(*firsts: int, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A prompt for each number: it begins with it and is 1 to 5 tokens long, padded to `width` with another prompt's tokens."""
    ids = np.array([[first, *range(first + 1, first + width)] for first in firsts], np.int32)
    mask = (np.arange(width)[None, :] < np.array([1 + first % 5 for first in firsts])[:, None]).astype(np.int32)
    return ids, mask


def test_states_are_those_of_the_encoder_and_only_new_prompts_are_encoded():
    encoder, cache = Encoder(), EncoderStateCache(1 << 20, WIDTH)
    for firsts, new in (((10, 21, 32), [10, 21, 32]), ((32, 43, 10, 43), [43]), ((21, 21), []), ((10,), [])):
        asked = len(encoder.asked)
        for width in (6, 9):  # padding is not part of a prompt
            np.testing.assert_array_equal(cache.encode(*prompts(*firsts, width=width), encoder), Encoder()(*prompts(*firsts)))
        assert encoder.asked[asked:] == new
    # a prompt that begins as another does, and is longer, is another
    ids, mask = prompts(10)
    mask[0, :3] = 1
    assert len(cache.encode(ids, mask, encoder)) == 3 and encoder.asked[-1] == 10


def test_without_bytes_nothing_is_kept_or_counted():
    encoder, cache = Encoder(), EncoderStateCache(0, WIDTH)
    for _ in range(2):
        cache.encode(*prompts(10, 10), encoder)
    assert encoder.asked == [10, 10] * 2 and cache.counts().misses == 0


def test_states_stay_exact_under_eviction_and_from_many_threads():
    encoder, cache = Encoder(), EncoderStateCache(2_000, WIDTH)

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            firsts = [rng.randrange(100) for _ in range(rng.randint(1, 4))]
            np.testing.assert_array_equal(cache.encode(*prompts(*firsts), encoder), Encoder()(*prompts(*firsts)))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(6)))
    counts = cache.counts()
    assert 0 < counts.bytes <= 2_000 and counts.hits > 0 and counts.misses > counts.entries


LENGTH: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9}
REPEATED = [ReaderRequest(f"w{i % 3} w7", [f"w{j} w{i % 3}" for j in range(i % 4 + 1)], **LENGTH) for i in range(24)]


def counters(server: TritonServer) -> dict[str, float]:
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = [line.split('{model="fido"} ') for line in response.read().decode().splitlines() if '{model="fido"} ' in line]
    return {name: float(value) for name, value in lines}


@pytest.mark.server
def test_served_answers_are_equal_with_kept_states_and_dropped_tokens_beside_them(engines, tmp_path):
    answers = []
    dropping = [{}, {"keep_encoder_tokens": 0.4}, {"keep_passages": 1, "drop_after": 3}]
    requests = [ReaderRequest(**{**vars(request), **dropping[i % 3]}) for i, request in enumerate(REPEATED)]
    for kept in (0, 1 << 20, 3_000):
        limits = Limits(slots=3, max_new_tokens=40, encoder_cache_bytes=kept)
        repository_from_engines(engines["fido"][1], tmp_path / str(kept), "fido", limits)
        with TritonServer(models_of(["fido"], stream=True), tmp_path / str(kept)) as server:
            with ReaderClient(server.grpc_url, "fido") as client:
                answers.append(list(client.answer_many(requests, 8)))
                with client.stream("w0 w7", ["w0 w0", "w1"], max_new_tokens=9, min_new_tokens=9, keep_passages=1) as stream:
                    pieces = "".join(piece.text for piece in stream)
                same = client.answer("w0 w7", ["w0 w0", "w1"], max_new_tokens=9, min_new_tokens=9, keep_passages=1)
                assert pieces == same.text
                with pytest.raises(ReaderError, match="keep_passages: wanted none beside num_beams"):
                    client.answer("w0", ["w1"], num_beams=2, keep_passages=1)
            deadline = time.monotonic() + 10
            while counters(server)["reader_dropped_encoder_tokens_total"] == 0 and time.monotonic() < deadline:
                time.sleep(0.1)
            found = counters(server)
            assert found["reader_dropped_encoder_tokens_total"] > 0
            assert found["reader_encoder_cache_bytes"] <= kept and (found["reader_encoder_cache_hits_total"] > 0) == (kept > 0)
    for first, *others in zip(*answers, strict=True):
        for other in others:
            assert other.text == first.text
            np.testing.assert_allclose(other.token_log_probs, first.token_log_probs, atol=2e-4)
