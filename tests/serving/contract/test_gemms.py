"""A reader's GEMMs: every projection is one, their shapes chain, and narrow ones are split."""

from __future__ import annotations

import dataclasses

from serving.contract.gemms import StackSizes, decoder_gemms, encoder_gemms, gemm_tensors, split_k_of
from serving.contract.tensors import EngineSizes

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
