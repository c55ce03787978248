"""Optimization profiles cover what the limits allow, the smallest one is chosen, and limits beyond them are refused."""

from __future__ import annotations

import dataclasses
import itertools
import re

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
from serving.contract.gemms import StackSizes, decoder_gemms, encoder_gemms, gemm_tensors, packed_cross_kv_tensors, split_k_of
from serving.contract.library_kernels import EncoderKernel, Tiling, narrow_order, sum_tiles
from serving.contract.limits import Limits, LimitsError
from serving.contract.profiles import choose_profile, fits, profile_ranges, profile_shapes, require_covered
from serving.contract.tensors import (
    EngineSizes,
    GraphTensors,
    ShapeError,
    TensorSpec,
    cross_kv_tensors,
    decoder_step_tensors,
    encoder_tensors,
)

STACK = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6)
FID_BASE = EngineSizes(768, 768, 12, tuple(range(12)), 12, 12, 64, 32128)


def test_profiles_cover_what_the_limits_allow_and_no_more() -> None:
    limits = Limits(slots=24, max_passages=40, encoder_batch=120)
    (whole,) = (profile_shapes(encoder_tensors(FID_BASE, "float16"), r) for r in profile_ranges("encoder", limits, 256))
    assert whole["input_ids"] == whole["attention_mask"] == ((1, 1), (120, 256), (120, 256))
    (_, o, wi, _) = encoder_gemms(STACK)[4:8]
    for gemm, columns in ((o, 768), (wi, 768)):
        (shapes,) = (profile_shapes(gemm_tensors(STACK, gemm, "float16"), r) for r in profile_ranges(gemm.engine, limits, 256))
        assert shapes["x"] == ((1, columns), (120 * 256, columns), (120 * 256, columns))
        assert len(set(shapes["weight"])) == 1  # the same for any number of rows
    (cross_kv,) = (profile_shapes(packed_cross_kv_tensors(FID_BASE), r) for r in profile_ranges("cross_kv", limits, 256))
    assert cross_kv["encoder_hidden_states"] == ((1, 768), (10240, 768), (10240, 768))
    wi = decoder_gemms(FID_BASE)[-2]
    tensors = gemm_tensors(STACK, wi, "bfloat16")
    (step,) = (profile_shapes(tensors, r) for r in profile_ranges(wi.engine, limits, 256))
    assert all(fits((rows, 768), step["x"]) for rows in (1, 24))
    assert not fits((25, 768), step["x"])
    # few rows have a profile of their own, so that many slots do not slow them
    few, many = (profile_shapes(tensors, r) for r in profile_ranges(wi.engine, dataclasses.replace(limits, slots=96), 256))
    assert fits((32, 768), few["x"]) and not fits((33, 768), few["x"]) and fits((96, 768), many["x"])


def test_the_smallest_covering_profile_is_chosen() -> None:
    profiles = [{"x": ((1, 4), (40, 4), (40, 4))}, {"x": ((1, 4), (120, 4), (120, 4))}, {"x": ((1, 4), (8, 4), (8, 4))}]
    assert [choose_profile(profiles, {"x": (rows, 4)}) for rows in (1, 8, 9, 40, 41, 120)] == [2, 2, 0, 0, 1, 1]
    assert choose_profile(profiles, {"x": (121, 4)}) is None and choose_profile(profiles, {"x": (1, 5)}) is None


BUILT = Limits(slots=24, max_passages=40, encoder_batch=60)
GRAPHS = {
    "encoder.wi": gemm_tensors(STACK, encoder_gemms(STACK)[2], "float16"),
    "cross_kv": packed_cross_kv_tensors(FID_BASE),
    "decoder.wo": gemm_tensors(STACK, decoder_gemms(FID_BASE)[-1], "float16"),  # split-K: rows are the second axis
    "decoder_step": decoder_step_tensors(FID_BASE),
}


def check(name: str, tensors: GraphTensors, limits: Limits) -> None:
    profiles = [profile_shapes(tensors, ranges) for ranges in profile_ranges(name, BUILT, 256)]
    require_covered(f"fid/{name}.plan", name, tensors, profiles, limits, 256)


@pytest.mark.parametrize("name", GRAPHS)
def test_limits_up_to_those_of_the_build_are_accepted(name: str) -> None:
    for limits in (BUILT, Limits(slots=1, max_passages=1), Limits(slots=24, max_passages=40)):
        check(name, GRAPHS[name], limits)


@pytest.mark.parametrize(
    ("name", "raised", "said"),
    [
        ("encoder.wi", {"encoder_batch": 61}, "tokens: wanted at most 15360, .* allow 15616; lower max_passages or encoder_batch"),
        ("encoder.wi", {"max_passages": 61}, "tokens: wanted at most 15360, .* allow 15616; lower max_passages or encoder_batch"),
        ("cross_kv", {"max_passages": 41}, "encoder_sequence_length: wanted at most 10240, .* allow 10496; lower max_passages in"),
        ("decoder.wo", {"slots": 25}, "batch: wanted at most 24, .* allow 25; lower slots in config.pbtxt, or build"),
        ("decoder.wo", {"slots": 96}, "batch: wanted at most 24, .* allow 96; lower slots in config.pbtxt, or build"),
        ("decoder_step", {"max_new_tokens": 10_000}, "past_length: wanted at most [0-9]+, .* lower max_new_tokens"),
    ],
)
def test_a_limit_beyond_the_profiles_is_refused_by_name(name: str, raised: dict[str, int], said: str) -> None:
    with pytest.raises(LimitsError, match=re.escape(f"fid/{name}.plan: ") + said):
        check(name, GRAPHS[name], dataclasses.replace(BUILT, **raised))


# Sizes of calls on a GPU: buckets and captured sizes waste little, every passage and query is covered once.


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


# A reader's GEMMs: every projection is one, their shapes chain, and narrow ones are split.

FIDO_BASE = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)


def test_every_projection_of_a_reader_is_one_gemm() -> None:
    assert len(encoder_gemms(STACK)) == 12 * 4
    for sizes, count in ((FID_BASE, 12 * 6), (FIDO_BASE, 12 * 4 + 2 * 2)):
        gemms = decoder_gemms(sizes)
        assert len(gemms) == count == len({p.weight for p in gemms}) and gemms[-1].kind == "wo"
        assert sorted({p.layer for p in gemms if p.kind == "cross_q"}) == list(sizes.cross_attention_layers)
    for gemm, following in zip(encoder_gemms(STACK), encoder_gemms(STACK)[1:], strict=False):
        # an output is the next input, after attention (which keeps a third of qkv) and the gate (half of wi)
        factor = {"qkv": 3, "wi": 2}.get(gemm.kind, 1)
        output = gemm_tensors(STACK, gemm, "float16").outputs[0]
        x = gemm_tensors(STACK, following, "float16").inputs[0]
        assert output.axes[1] == factor * x.axes[1]


def test_narrow_gemms_of_a_step_are_split_to_fill_a_gpu() -> None:
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
    assert {split_k_of(STACK, gemm) for gemm in encoder_gemms(STACK)} == {1}  # thousands of rows fill a GPU without


def test_max_tiles_is_reached_where_every_last_tile_holds_one_token() -> None:
    for lengths in ([1] * 40, [65] * 39, [129, 1, 65]):
        assert len(attention_tiles(np.array(lengths))) == max_tiles(sum(lengths), len(lengths))
    assert max_tiles(3, 40) == 3  # no passage is empty


def test_an_array_is_checked_against_its_tensor() -> None:
    spec = TensorSpec("hidden", "float16", ("tokens", 8))
    assert str(spec) == "hidden: float16[tokens, 8]"
    spec.check(np.zeros((5, 8), np.float16))
    spec.check(np.zeros((0, 8), np.float16))
    for wrong in (np.zeros((5, 7), np.float16), np.zeros((5, 8), np.float32), np.zeros((1, 5, 8), np.float16), np.zeros(8, np.float16)):
        with pytest.raises(ShapeError, match=r"wanted hidden: float16\[tokens, 8\], got float"):
            spec.check(wrong)
    assert spec.triton(batched=False) == {"name": "hidden", "data_type": "TYPE_FP16", "dims": [-1, 8]}
    assert spec.triton(batched=True) == {"name": "hidden", "data_type": "TYPE_FP16", "dims": [8]}
    assert dataclasses.replace(spec, optional=True).triton(batched=True)["optional"] is True


def test_a_step_reads_positions_only_where_the_reader_has_a_bias_for_them() -> None:
    def names(sizes: EngineSizes) -> list[str]:
        return [spec.name for spec in decoder_step_tensors(sizes).inputs]

    biased = dataclasses.replace(FIDO_BASE, reads_encoder_positions=True)
    assert set(names(biased)) - set(names(FIDO_BASE)) == {"encoder_positions"}
    assert [name for name in names(FIDO_BASE) if ".encoder." in name] == [
        f"past_key_values.{layer}.encoder.{part}" for layer in (5, 11) for part in ("key", "value")
    ]
    assert [spec.name for spec in cross_kv_tensors(FIDO_BASE).outputs] == [
        f"present.{layer}.encoder.{part}" for layer in (5, 11) for part in ("key", "value")
    ]


def test_a_library_kernel_is_called_by_all_that_tells_it_from_others() -> None:
    plain, other = Tiling(128, 192), Tiling(128, 192, 2, 4, pingpong=True, epilogue_n=32)
    assert (str(plain), str(other)) == ("128x192-1x1", "128x192-2x4-pingpong-out32")
    assert (plain.cluster_size, other.cluster_size) == (1, 8)
    assert EncoderKernel("wo", "float8", other, narrow=True).file == "encoder.wo.float8.narrow.128x192-2x4-pingpong-out32.so"
    assert EncoderKernel("wo", "float8", plain).file == "encoder.wo.float8.128x192-1x1.so"
    assert [sum_tiles(dataclasses.replace(STACK, d_model=width), plain) for width in (192, 193, 768)] == [1, 2, 4]


def test_the_stream_in_8_bits_has_the_four_channels_of_a_thread_side_by_side() -> None:
    """A thread of Hopper's tensor cores makes channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of sixteen."""
    order = narrow_order("sm_90a")
    assert [order[4 * thread : 4 * thread + 4] for thread in range(4)] == [
        (2 * thread, 2 * thread + 1, 2 * thread + 8, 2 * thread + 9) for thread in range(4)
    ]
    assert narrow_order("sm_100a") == (0,)  # as they come
