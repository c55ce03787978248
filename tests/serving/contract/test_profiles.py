"""Optimization profiles cover what the limits allow, the smallest one is chosen, and limits beyond them are refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

from serving.contract.gemms import StackSizes, decoder_gemms, encoder_gemms, gemm_tensors, packed_cross_kv_tensors
from serving.contract.limits import Limits, LimitsError
from serving.contract.profiles import choose_profile, fits, profile_ranges, profile_shapes, require_covered
from serving.contract.tensors import EngineSizes, GraphTensors, encoder_tensors

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
    ],
)
def test_a_limit_beyond_the_profiles_is_refused_by_name(name: str, raised: dict[str, int], said: str) -> None:
    with pytest.raises(LimitsError, match=re.escape(f"fid/{name}.plan: ") + said):
        check(name, GRAPHS[name], dataclasses.replace(BUILT, **raised))
