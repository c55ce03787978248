"""A reader's GEMMs: every projection is one, their shapes chain, and narrow ones are split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from serving.contract.gemms import StackSizes, decoder_gemms, encoder_gemms, gemm_tensors, split_k_of
from serving.contract.library_kernels import EncoderKernel, Tiling, narrow_order, sum_tiles
from serving.contract.tensors import EngineSizes, ShapeError, TensorSpec, cross_kv_tensors, decoder_step_tensors

STACK = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6)
FID_BASE = EngineSizes(768, 768, 12, tuple(range(12)), 12, 12, 64, 32128)
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
