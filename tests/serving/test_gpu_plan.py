"""Shapes, profiles and memory of GPU engines, and the refusal of engines built for elsewhere: all of it plain arithmetic."""

from __future__ import annotations

import pytest

from serving.gpu_plan import (
    batch_buckets,
    bucket_of,
    cache_capacities,
    choose_profile,
    decoder_memory,
    fits,
    profile_ranges,
    profile_shapes,
)
from serving.limits import Limits
from serving.manifest import EngineBuild, EngineError
from serving.step_parts import attention_sites, packed_cross_kv_tensors, step_part_tensors, step_parts
from serving.tensors import EngineSizes, encoder_tensors

FID_BASE = EngineSizes(768, 768, 12, tuple(range(12)), 12, 12, 64, 32128)
FIDO_BASE = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 9, 16, 24, 30, 64])
def test_buckets_end_with_the_slots_and_waste_little(slots: int) -> None:
    buckets = batch_buckets(slots)
    assert buckets == tuple(sorted(set(buckets))) and buckets[-1] == slots
    for rows in range(1, slots + 1):
        bucket = bucket_of(rows, buckets)
        assert rows <= bucket < 2 * rows + 1 and bucket <= slots


def test_parts_chain_every_attention_of_the_decoder() -> None:
    for sizes, attentions in ((FID_BASE, 24), (FIDO_BASE, 14)):
        parts = step_parts(sizes)
        assert len(attention_sites(sizes)) == attentions and len(parts) == attentions + 1
        assert [part.before for part in parts[:-1]] == [part.after for part in parts[1:]] == list(attention_sites(sizes))
        assert parts[0].after is None and parts[-1].before is None
        assert len({part.name for part in parts}) == len(parts) and [p.name for p in parts] == sorted(p.name for p in parts)


def test_profiles_cover_what_the_limits_allow_and_no_more() -> None:
    limits = Limits(slots=24, max_passages=40, encoder_batch=120)
    full, alone = (profile_shapes(encoder_tensors(FID_BASE, "float16"), r) for r in profile_ranges("encoder", limits, 256))
    assert full["input_ids"] == full["attention_mask"] == ((1, 1), (120, 256), (120, 256))
    assert alone["input_ids"] == alone["attention_mask"] == ((1, 1), (40, 256), (40, 256))
    assert len(profile_ranges("encoder", Limits(max_passages=40, encoder_batch=0), 256)) == 1
    (cross_kv,) = (profile_shapes(packed_cross_kv_tensors(FID_BASE), r) for r in profile_ranges("cross_kv", limits, 256))
    assert cross_kv["encoder_hidden_states"] == ((1, 768), (10240, 768), (10240, 768))
    part = step_parts(FID_BASE)[3]
    (step,) = (profile_shapes(step_part_tensors(FID_BASE, part), r) for r in profile_ranges(part.name, limits, 256))
    assert all(fits(spec.shape({"batch": rows}), step[spec.name]) for spec in step_part_tensors(FID_BASE, part).inputs for rows in (1, 24))
    assert not fits((25, 768), step["residual"])


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
    import dataclasses
    import json

    build = EngineBuild("GPU", "9.0", "8.6.0", {"encoder.plan": [{"input_ids": ((1, 1), (4, 8), (4, 8))}]}, {"encoder.plan": 1.5})
    assert EngineBuild.from_dict(json.loads(json.dumps(dataclasses.asdict(build)))) == build
