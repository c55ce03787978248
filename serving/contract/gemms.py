"""The GEMMs of a GPU reader: which there are, their shapes, their files. Arithmetic only.

A GPU reader is not one graph. It is its GEMMs, with small CUDA kernels between them (serving/engines/gpu/cuda):

    encoder layer   norm -> qkv -> attention -> o -> add, norm -> wi -> activate -> wo -> add
    decoder layer   the same; with cross-attention, before wi: cross_q -> attention -> cross_o -> add, norm
    at the end      norm; in the decoder also the choice of the token, by a kernel that multiplies by the LM head itself

A GEMM has rows and no passages or sequences. In the encoder a row is a token: the tokens of all passages are packed, without padding. In a
decoder step a row is a sequence. Attention kernels read keys and values once, from the slots of the cache. The weights are an input of the
GEMM: one engine serves the GEMMs of one kind in all layers.

A decoder step has so few rows that a narrow GEMM gives a GPU too few thread blocks. Such a GEMM is computed by split-K: each split sums
over some of the input features, and the kernel after the GEMM adds the splits. The engine and the skinny GEMM kernel (cuda/skinny_gemm.cu)
have the same inputs and outputs; the latter is faster for few rows.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from .tensors import EngineSizes, GraphTensors, TensorSpec

StackName = Literal["encoder", "decoder"]
# Arrays that the kernels read; their files are in the engines' directory.
EMBEDDING, NORMS, BIAS, CROSS_BIAS, HEAD = ("embedding", "norms", "bias", "cross_bias", "head")
ENCODER_KINDS = ("qkv", "o", "wi", "wo")  # GEMMs of a layer, in order
# Split-K of a step's GEMMs: a thread block computes BLOCK_COLUMNS output features, an H100 or H200 has MAX_BLOCKS multiprocessors, and sums
# of fewer than MIN_K_PER_SPLIT features gain nothing (perf/results/h200/notes.md).
MAX_SPLITS, MAX_BLOCKS, MIN_K_PER_SPLIT, BLOCK_COLUMNS = 4, 132, 192, 32
SPLIT_K_KINDS = ("qkv", "o", "cross_o", "wo")  # the kernels after these can add splits


CROSS_KV_SCALES = "cross_kv_scales"  # float32[layers with cross-attention, 2, num_kv_heads] of FP8 keys and values


def array_file(stack: StackName, array: str) -> str:
    """File name of an array."""
    return f"{stack}_{array}.npy"


@dataclasses.dataclass(frozen=True)
class StackSizes:
    """The sizes that determine the GEMMs and kernels of one stack (encoder or decoder); part of the manifest.

    Attributes:
        gated: the feed-forward layer is gelu(a) * b instead of relu(a).
        epsilon: of the norms, for the residual stream as it is scaled in half precision (export/graphs/gemms.py scales both).
    """

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_kv: int
    d_ff: int
    gated: bool
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One GEMM of a stack.

    Attributes:
        layer: 0-based.
        kind: "qkv", "o", "cross_q", "cross_o", "wi" or "wo".
    """

    stack: StackName
    layer: int
    kind: str

    @property
    def engine(self) -> str:
        """Name of its engine: the file name without suffix."""
        return f"{self.stack}.{self.kind}"

    @property
    def weight(self) -> str:
        """File name of its weights."""
        return f"{self.stack}.{self.layer:02d}.{self.kind}.npy"


def encoder_gemms(stack: StackSizes) -> tuple[Gemm, ...]:
    """All GEMMs of the encoder, in execution order."""
    return tuple(Gemm("encoder", layer, kind) for layer in range(stack.num_layers) for kind in ENCODER_KINDS)


def decoder_gemms(sizes: EngineSizes) -> tuple[Gemm, ...]:
    """All GEMMs of a decoder step, in execution order."""
    gemms = []
    for layer in range(sizes.num_decoder_layers):
        cross = ("cross_q", "cross_o") if layer in sizes.cross_attention_layers else ()
        gemms += [Gemm("decoder", layer, kind) for kind in ("qkv", "o", *cross, "wi", "wo")]
    return tuple(gemms)


def gemm_features(stack: StackSizes, kind: str) -> tuple[int, int]:
    """(in_features, out_features) of a GEMM."""
    queries, keys = stack.num_heads * stack.d_kv, stack.num_kv_heads * stack.d_kv
    return {
        "qkv": (stack.d_model, queries + 2 * keys),
        "o": (queries, stack.d_model),
        "cross_q": (stack.d_model, queries),
        "cross_o": (queries, stack.d_model),
        "wi": (stack.d_model, stack.d_ff * (2 if stack.gated else 1)),
        "wo": (stack.d_ff, stack.d_model),
    }[kind]


def split_k_of(stack: StackSizes, gemm: Gemm) -> int:
    """In how many splits over its input features a GEMM is computed; 1 = it is not split."""
    if gemm.stack == "encoder" or gemm.kind not in SPLIT_K_KINDS:
        return 1
    in_features, out_features = gemm_features(stack, gemm.kind)
    blocks, k_splits = -(-out_features // BLOCK_COLUMNS), 1
    while (
        k_splits < MAX_SPLITS
        and 2 * k_splits * blocks <= MAX_BLOCKS
        and in_features % (2 * k_splits * 64) == 0
        and in_features >= 2 * k_splits * MIN_K_PER_SPLIT
    ):
        k_splits *= 2
    return k_splits


def gemm_tensors(stack: StackSizes, gemm: Gemm, precision: str) -> GraphTensors:
    """Inputs and output of a GEMM's engine: y = x @ weight.

    With split-K all three have a leading axis of splits: x has a split's input features of all rows, weight the matching rows of the
    weights, y a split's sums of all output features.

    Args:
        stack: sizes of the GEMM's stack.
        gemm: any GEMM of the kind.
        precision: dtype of the weights, "float16" or "bfloat16". x and y are float16 with either.
    """
    rows, k_splits = "tokens" if gemm.stack == "encoder" else "batch", split_k_of(stack, gemm)
    in_features, out_features = gemm_features(stack, gemm.kind)
    splits: tuple[int, ...] = (k_splits,) if k_splits > 1 else ()
    inputs = (
        TensorSpec("x", "float16", (*splits, rows, in_features // k_splits)),
        TensorSpec("weight", precision, (*splits, in_features // k_splits, out_features)),
    )
    return GraphTensors(inputs, (TensorSpec("y", "float16", (*splits, rows, out_features)),))


def packed_cross_kv_tensors(sizes: EngineSizes, dtype: str = "float16") -> GraphTensors:
    """Tensors of a GPU reader's cross_kv graph: one output per layer with cross-attention.

    A row of an output is a token: its keys of all heads, then its values of all heads. A question's output is therefore one contiguous
    block, and the engine writes it straight into the question's slot.
    """
    return GraphTensors(
        (TensorSpec("encoder_hidden_states", dtype, ("encoder_sequence_length", sizes.d_model_encoder)),),
        tuple(
            TensorSpec(f"cross_kv.{layer}", dtype, ("encoder_sequence_length", 2 * sizes.num_kv_heads * sizes.d_kv))
            for layer in sizes.cross_attention_layers
        ),
    )
