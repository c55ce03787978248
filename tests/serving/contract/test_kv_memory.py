"""Memory of keys and values: the engine reserves what the arithmetic says, and a budget is kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.contract.kv_memory import GpuMemory, cache_capacities, cache_length, decoder_memory, plan, self_cache_length
from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import Manifest
from serving.contract.tensors import EngineSizes
from serving.engines.load import kv_budget, load_decoder
from tests.conftest import WITHOUT_BF16, WITHOUT_OPENVINO

# FiD-base and FiDO-base (LSA-6, MQ) at 40 x 256 tokens in fp16: 377 and 5.2 MB a question, the arithmetic of the FiDO paper
FID_BASE = EngineSizes(768, 768, 12, tuple(range(12)), 12, 12, 64, 32128)
FIDO_BASE = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)


@pytest.mark.parametrize(("sizes", "megabytes"), [(FID_BASE, 377.5), (FIDO_BASE, 5.2)])
def test_cross_attention_cache_of_the_base_size(sizes, megabytes):
    assert 40 * 256 * sizes.cross_kv_bytes_per_token(2) / 1e6 == pytest.approx(megabytes, abs=0.1)


@given(st.integers(1, 200_000))
def test_reserved_lengths_cover_and_waste_at_most_a_quarter(tokens):
    assert tokens <= cache_length(tokens) <= max(tokens + 63, tokens * 1.25)
    assert cache_length(tokens) % 64 == 0


def test_lengths_of_similar_questions_are_the_same():
    assert len({cache_length(tokens) for tokens in range(1024, 2048)}) <= 5
    assert [cache_length(tokens) for tokens in (1, 64, 65, 512, 513, 1024, 1025, 2049)] == [64, 64, 128, 512, 640, 1024, 1280, 2560]


@given(st.integers(1, 200_000))
def test_a_self_attention_cache_is_the_smallest_power_of_two_that_holds_the_tokens(tokens):
    length = self_cache_length(tokens)
    assert tokens <= length and length in [2**n for n in range(4, 19)]
    assert length == 16 or length // 2 < tokens


def test_only_a_budget_lowers_the_slots():
    limits = Limits(max_passages=40, max_new_tokens=32, slots=16)
    free = plan(FID_BASE, limits, 256, 4)
    assert free.slots == 16
    tight = plan(FID_BASE, Limits(max_passages=40, max_new_tokens=32, slots=16, kv_cache_bytes=3 * free.bytes_per_question + 1), 256, 4)
    assert tight.slots == 3
    exact = dataclasses.replace(limits, kv_cache_bytes=free.bytes_per_question)
    assert plan(FID_BASE, exact, 256, 4) == dataclasses.replace(free, slots=1)
    with pytest.raises(LimitsError, match="kv_cache_bytes"):
        plan(FID_BASE, dataclasses.replace(exact, kv_cache_bytes=exact.kv_cache_bytes - 1), 256, 4)
    assert plan(FID_BASE, dataclasses.replace(exact, kv_cache_bytes=1000 * exact.kv_cache_bytes), 256, 4) == free
    assert str(free).startswith("16 slots, ") and str(free).endswith(f", {16 * free.bytes_per_question:,} in all")
    assert f"{free.bytes_per_question:,} bytes of keys and values a question" in str(free)


def test_a_budget_too_small_for_one_question_says_how_much_is_needed():
    with pytest.raises(LimitsError, match=r"kv_cache_bytes: wanted at least [\d,]+ for one question of 40 passages x 256 tokens"):
        plan(FID_BASE, Limits(kv_cache_bytes=1000), 256, 4)


ENGINES = [("onnxruntime", "float32"), pytest.param("openvino", "bfloat16", marks=[WITHOUT_OPENVINO, WITHOUT_BF16])]


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_the_engine_never_reserves_more_than_planned(engines, engine, precision):
    _, directory = engines["fid"]
    manifest = dataclasses.replace(Manifest.load(directory), engine=engine, precision=precision)
    limits = Limits(max_passages=6, max_new_tokens=20, default_max_new_tokens=20, slots=3)
    budget = kv_budget(manifest, limits)
    halves = 2 if precision == "bfloat16" else 1
    assert budget.bytes_per_question * halves == kv_budget(Manifest.load(directory), limits).bytes_per_question
    decoder: Any = load_decoder(directory, manifest, limits)
    longest = limits.max_passages * manifest.prompt.passage_length
    for slot in range(limits.slots):
        hidden = np.zeros((longest, manifest.sizes.d_model_encoder), np.float32)
        decoder.admit(slot, slot, hidden, np.zeros(longest, np.int32))
    for step in range(limits.max_new_tokens):
        decoder.step(np.zeros(3, np.int32), np.full(3, step, np.int32), np.zeros(3, np.float32))
    assert decoder.reserved_bytes() == budget.slots * budget.bytes_per_question
    decoder.admit(0, 0, np.zeros((10, manifest.sizes.d_model_encoder), np.float32), np.zeros(10, np.int32))
    assert decoder.reserved_bytes() < budget.slots * budget.bytes_per_question, "the memory of a long question is freed once it has left"


def test_cross_attention_in_one_byte_lets_nearly_twice_as_many_questions_in() -> None:
    limits = Limits(max_passages=40, max_new_tokens=32, slots=100)
    half = plan(FID_BASE, limits, 256, 2)
    budget = dataclasses.replace(limits, kv_cache_bytes=20 * half.bytes_per_question)
    assert plan(FID_BASE, budget, 256, 2).slots == 20
    narrow = plan(FID_BASE, budget, 256, 2, 1)
    assert narrow.slots == 39  # not 40: the generated tokens' keys and values stay in half precision
    assert half.bytes_per_question - narrow.bytes_per_question == 10240 * 12 * 2 * 768
    memory = [decoder_memory(FID_BASE, 24, (10240, 32), 0, 0, width) for width in (2, 1)]
    assert memory[0].cross_kv == 2 * memory[1].cross_kv and memory[0].self_kv == memory[1].self_kv


def test_gpu_memory_is_that_of_the_slots_and_lengths() -> None:
    limits = Limits(slots=24, max_passages=40, max_new_tokens=512)
    capacities = cache_capacities(limits, 256)
    assert capacities == (10240, 512)
    memory = decoder_memory(FID_BASE, 24, capacities, 1000, 10)
    # 377 MB of cross-attention keys and values a question: 10,240 tokens, 12 layers, key and value, 768 halves
    assert memory.cross_kv == 24 * 10240 * 12 * 2 * 768 * 2 and memory.self_kv == 24 * 512 * 12 * 2 * 768 * 2
    assert memory.total == memory.cross_kv + memory.self_kv + 1010
    assert str(GpuMemory(1_000_000, 2_000_000, 3_000_000_000, 499_999)) == (
        "3,003 MB of GPU memory (weights 1 MB, scratch 2 MB, cross_kv 3,000 MB, self_kv 0 MB)"
    )
    assert decoder_memory(FIDO_BASE, 24, capacities, 0, 0).cross_kv == 24 * 10240 * 2 * 2 * 64 * 2
