"""Sizes of calls on a GPU: buckets and captured sizes waste little, every passage and query is covered once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from serving.contract.call_sizes import (
    TILE,
    attention_tiles,
    batch_buckets,
    bucket_of,
    calls_of_tokens,
    captured_calls,
    encoder_batch,
    encoder_tokens,
    max_tiles,
)
from serving.contract.limits import Limits


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 9, 16, 24, 30, 64])
def test_buckets_end_with_the_slots_and_waste_little(slots: int) -> None:
    buckets = batch_buckets(slots)
    assert buckets == tuple(sorted(set(buckets))) and buckets[-1] == slots
    for rows in range(1, slots + 1):
        bucket = bucket_of(rows, buckets)
        assert rows <= bucket < 2 * rows + 1 and bucket <= slots
        assert rows <= 8 or bucket - rows < 8
    assert all(bucket % 8 == 0 for bucket in buckets if 8 < bucket < slots)  # rows of a tensor core's tile
    assert len(buckets) <= 4 + max(slots // 8, 1)  # each is a CUDA graph, which takes memory


def test_captured_calls_are_no_larger_than_a_call_and_are_at_most_a_step_apart() -> None:
    assert captured_calls(96) == () and captured_calls(700) == (128, 256, 512)
    calls = captured_calls(30_720)
    assert calls == tuple(sorted(set(calls))) and calls[-1] == 10_240  # a question of 40 passages of 256 tokens
    assert len(calls) == 22 and captured_calls(10_239) == calls[:-1] and captured_calls(128) == (128,)
    assert all(later - earlier <= 512 for earlier, later in itertools.pairwise(calls))


@pytest.mark.parametrize("lengths", [[1] * 40, [65] * 39, [64] * 8, [256] * 40, [63, 65, 1, 128, 129]])
def test_max_tiles_bounds_the_tiles_of_a_call(lengths: list[int]) -> None:
    assert len(attention_tiles(np.array(lengths))) <= max_tiles(sum(lengths), len(lengths))


def test_max_tiles_is_reached_where_every_last_tile_holds_one_token() -> None:
    for lengths in ([1] * 40, [65] * 39, [129, 1, 65]):
        assert len(attention_tiles(np.array(lengths))) == max_tiles(sum(lengths), len(lengths))
    assert max_tiles(3, 40) == 3  # no passage is empty


@pytest.mark.parametrize("seed", range(20))
def test_calls_hold_every_passage_once_and_not_too_many_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 256, rng.integers(1, 50))
    max_tokens = int(rng.integers(256, 2000))
    calls = list(calls_of_tokens(lengths, max_tokens))
    assert np.concatenate([of_call for _, of_call in calls]).tolist() == lengths.tolist()
    assert [tokens.start for tokens, _ in calls] == [0, *(tokens.stop for tokens, _ in calls[:-1])]
    for (tokens, of_call), following in zip(calls, [*calls[1:], None], strict=True):
        assert tokens.stop - tokens.start == of_call.sum() <= max_tokens
        assert following is None or of_call.sum() + following[1][0] > max_tokens  # the next passage would not have fitted
    assert not list(calls_of_tokens(lengths[:0], max_tokens))


def test_tiles_cover_every_query_of_every_passage_once() -> None:
    lengths = np.array([256, 1, 64, 65, 130])
    covered = [[] for _ in lengths]  # type: list[list[int]]
    firsts = (np.cumsum(lengths) - lengths).tolist()
    for first, length, start in attention_tiles(lengths).tolist():
        passage = firsts.index(first)
        assert length == lengths[passage]
        covered[passage] += range(start, min(start + TILE, length))
    assert [sorted(queries) for queries in covered] == [list(range(length)) for length in lengths]


def test_an_encoder_call_holds_the_largest_question() -> None:
    assert encoder_batch(Limits(max_passages=40, encoder_batch=120)) == 120
    assert encoder_batch(Limits(max_passages=40, encoder_batch=8)) == encoder_batch(Limits(max_passages=40)) == 40
    assert encoder_tokens(Limits(max_passages=40), 256) == 10_240
