"""Shapes, profiles and memory of GPU engines, and the refusal of engines built for elsewhere: all of it plain arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from serving.contract.gemms import StackSizes, decoder_gemms, encoder_gemms, gemm_tensors, packed_cross_kv_tensors, split_k_of
from serving.contract.gpu_profiles import (
    TILE,
    attention_tiles,
    batch_buckets,
    bucket_of,
    cache_capacities,
    calls_of_tokens,
    captured_calls,
    choose_profile,
    decoder_memory,
    fits,
    max_tiles,
    profile_ranges,
    profile_shapes,
)
from serving.contract.limits import Limits
from serving.contract.manifest import EngineBuild, EngineError
from serving.contract.tensors import EngineSizes, encoder_tensors

STACK = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6)
FID_BASE = EngineSizes(768, 768, 12, tuple(range(12)), 12, 12, 64, 32128)
FIDO_BASE = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 9, 16, 24, 30, 64])
def test_buckets_end_with_the_slots_and_waste_little(slots: int) -> None:
    buckets = batch_buckets(slots)
    assert buckets == tuple(sorted(set(buckets))) and buckets[-1] == slots
    for rows in range(1, slots + 1):
        bucket = bucket_of(rows, buckets)
        assert rows <= bucket < 2 * rows + 1 and bucket <= slots


def test_captured_calls_are_no_larger_than_a_call_and_waste_less_than_a_step() -> None:
    assert captured_calls(96) == () and captured_calls(700) == (128, 256, 512)
    calls = captured_calls(30_720)
    assert calls == tuple(sorted(set(calls))) and calls[-1] == 10_240  # a question of 40 passages of 256 tokens
    assert all(later - earlier <= 512 for earlier, later in itertools.pairwise(calls))


@pytest.mark.parametrize("lengths", [[1] * 40, [65] * 39, [64] * 8, [256] * 40, [63, 65, 1, 128, 129]])
def test_a_captured_call_has_room_for_all_tiles(lengths: list[int]) -> None:
    assert len(attention_tiles(np.array(lengths))) <= max_tiles(sum(lengths), len(lengths))


def test_every_projection_of_a_reader_is_one_product() -> None:
    assert len(encoder_gemms(STACK)) == 12 * 4
    for sizes, count in ((FID_BASE, 12 * 6), (FIDO_BASE, 12 * 4 + 2 * 2)):
        gemms = decoder_gemms(sizes)
        assert len(gemms) == count == len({p.weight for p in gemms}) and gemms[-1].kind == "wo"
        assert sorted({p.layer for p in gemms if p.kind == "cross_q"}) == list(sizes.cross_attention_layers)
    for given, made in zip(encoder_gemms(STACK), encoder_gemms(STACK)[1:], strict=False):
        # what one makes is what the next takes, once attention and the gate have been there
        shrunk = {"qkv": 3, "wi": 2}.get(given.kind, 1)
        wide = gemm_tensors(STACK, given, "float16").outputs[0]
        narrow = gemm_tensors(STACK, made, "float16").inputs[0]
        assert wide.axes[1] == shrunk * narrow.axes[1]


def test_profiles_cover_what_the_limits_allow_and_no_more() -> None:
    limits = Limits(slots=24, max_passages=40, encoder_batch=120)
    (whole,) = (profile_shapes(encoder_tensors(FID_BASE, "float16"), r) for r in profile_ranges("encoder", limits, 256))
    assert whole["input_ids"] == whole["attention_mask"] == ((1, 1), (120, 256), (120, 256))
    (_, o, wi, _) = encoder_gemms(STACK)[4:8]
    for gemm, columns in ((o, 768), (wi, 768)):
        (shapes,) = (profile_shapes(gemm_tensors(STACK, gemm, "float16"), r) for r in profile_ranges(gemm.engine, limits, 256))
        assert shapes["x"] == ((1, columns), (120 * 256, columns), (120 * 256, columns))
        assert len(set(shapes["weight"])) == 1  # of one shape, whatever the rows
    (cross_kv,) = (profile_shapes(packed_cross_kv_tensors(FID_BASE), r) for r in profile_ranges("cross_kv", limits, 256))
    assert cross_kv["encoder_hidden_states"] == ((1, 768), (10240, 768), (10240, 768))
    wi = decoder_gemms(FID_BASE)[-2]
    tensors = gemm_tensors(STACK, wi, "bfloat16")
    (step,) = (profile_shapes(tensors, r) for r in profile_ranges(wi.engine, limits, 256))
    assert all(fits((rows, 768), step["x"]) for rows in (1, 24))
    assert not fits((25, 768), step["x"])
    # many slots have a profile of their own, so that a few answers are not slower for them
    few, many = (profile_shapes(tensors, r) for r in profile_ranges(wi.engine, dataclasses.replace(limits, slots=96), 256))
    assert fits((32, 768), few["x"]) and not fits((33, 768), few["x"]) and fits((96, 768), many["x"])


def test_narrow_products_of_a_step_are_made_in_parts_that_fill_a_card() -> None:
    multi_query = dataclasses.replace(STACK, num_kv_heads=1)
    xl = dataclasses.replace(STACK, d_model=2048, num_heads=32, num_kv_heads=1, d_kv=64, d_ff=5120)
    for stack, wanted in (
        (STACK, {"qkv": 1, "o": 4, "cross_q": 1, "cross_o": 4, "wi": 1, "wo": 4}),
        (multi_query, {"qkv": 4, "o": 4, "cross_q": 1, "cross_o": 4, "wi": 1, "wo": 4}),
        (xl, {"qkv": 1, "o": 2, "cross_q": 1, "cross_o": 2, "wi": 1, "wo": 2}),
    ):
        gemms = {p.kind: p for p in decoder_gemms(FID_BASE)}
        assert {kind: split_k_of(stack, gemm) for kind, gemm in gemms.items()} == wanted
        for kind, k_splits in wanted.items():
            x, weight = gemm_tensors(stack, gemms[kind], "float16").inputs
            columns, rows_of_weight = x.shape({"batch": 5})[-1], weight.shape({})[-2]
            assert columns == rows_of_weight and len(x.axes) == len(weight.axes) == (3 if k_splits > 1 else 2)
    assert {split_k_of(STACK, gemm) for gemm in encoder_gemms(STACK)} == {1}  # thousands of rows fill a card as they are


@pytest.mark.parametrize("seed", range(20))
def test_calls_hold_every_passage_once_and_not_too_many_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 256, rng.integers(1, 50))
    most = int(rng.integers(256, 2000))
    calls = list(calls_of_tokens(lengths, most))
    assert np.concatenate([part for _, part in calls]).tolist() == lengths.tolist()
    assert [tokens.start for tokens, _ in calls] == [0, *(tokens.stop for tokens, _ in calls[:-1])]
    for (tokens, part), following in zip(calls, [*calls[1:], None], strict=True):
        assert tokens.stop - tokens.start == part.sum() <= most
        assert following is None or part.sum() + following[1][0] > most  # filled up
    assert not list(calls_of_tokens(lengths[:0], most))


def test_tiles_cover_every_query_of_every_passage_once() -> None:
    lengths = np.array([256, 1, 64, 65, 130])
    covered = [[] for _ in lengths]  # type: list[list[int]]
    firsts = (np.cumsum(lengths) - lengths).tolist()
    for first, length, start in attention_tiles(lengths).tolist():
        passage = firsts.index(first)
        assert length == lengths[passage]
        covered[passage] += range(start, min(start + TILE, length))
    assert [sorted(queries) for queries in covered] == [list(range(length)) for length in lengths]


def test_the_tightest_profile_is_chosen() -> None:
    profiles = [{"x": ((1, 4), (40, 4), (40, 4))}, {"x": ((1, 4), (120, 4), (120, 4))}, {"x": ((1, 4), (8, 4), (8, 4))}]
    assert [choose_profile(profiles, {"x": (rows, 4)}) for rows in (1, 8, 9, 40, 41, 120)] == [2, 2, 0, 0, 1, 1]
    assert choose_profile(profiles, {"x": (121, 4)}) is None and choose_profile(profiles, {"x": (1, 5)}) is None


def test_memory_is_what_slots_and_lengths_make_it() -> None:
    limits = Limits(slots=24, max_passages=40, max_new_tokens=512)
    capacities = cache_capacities(limits, 256)
    assert capacities == (10240, 512)
    memory = decoder_memory(FID_BASE, 24, capacities, 1000, 10)
    # 377 MB of cross-attention keys and values a question: 10,240 tokens, 12 layers, key and value, 768 halves
    assert memory.cross_kv == 24 * 10240 * 12 * 2 * 768 * 2 and memory.self_kv == 24 * 512 * 12 * 2 * 768 * 2
    assert memory.total == memory.cross_kv + memory.self_kv + 1010
    assert decoder_memory(FIDO_BASE, 24, capacities, 0, 0).cross_kv == 24 * 10240 * 2 * 2 * 64 * 2


def test_engines_of_elsewhere_are_refused_by_name() -> None:
    build = EngineBuild("NVIDIA H200", "9.0", "8.6.0", {}, {})
    build.require_here("fid/encoder.plan", "NVIDIA H200", "9.0", "8.6.0")
    with pytest.raises(EngineError) as caught:
        build.require_here("fid/encoder.plan", "NVIDIA L4", "8.9", "10.4.0")
    for wanted in ("fid/encoder.plan", "NVIDIA H200", "NVIDIA L4", "8.9", "10.4.0", "make export ENGINE=tensorrt"):
        assert wanted in str(caught.value)


def test_a_build_survives_its_json() -> None:
    build = EngineBuild("GPU", "9.0", "8.6.0", {"encoder.plan": [{"input_ids": ((1, 1), (4, 8), (4, 8))}]}, {"encoder.plan": 1.5})
    assert EngineBuild.from_dict(json.loads(json.dumps(dataclasses.asdict(build)))) == build
