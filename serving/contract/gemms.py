"""How a reader is cut for a GPU: into its GEMMs, with small kernels between them (cuda/).

A gemm sees rows and nothing else: tokens of passages that lie one after the other, without padding, or one row a running answer. So it
costs what its rows cost, and what a step's time goes into, the keys and values, is read once, where it lies, by an attention kernel. The
weights are an input as well: one engine serves the gemms of a kind in all layers. Narrow gemms of a step are made in k_splits, each of
some of the columns that go in: a row or two dozen give a card too few blocks otherwise. The kernel behind sums the k_splits. A step of few
rows multiplies by a kernel as well (cuda/skinny_gemm.cu), which takes and makes what the engine would.

    encoder layer   norm -> qkv -> attention -> o -> add, norm -> wi -> activate -> wo -> add
    decoder layer   the same; in the cross-attending ones, before wi: cross_q -> attention -> cross_o -> add, norm
    at the end      norm, and in the decoder the choice of the token, whose kernel multiplies by the head itself

The one kernel between two gemms adds to the residual stream and norms it for the next.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from .tensors import EngineSizes, GraphTensors, TensorSpec

StackName = Literal["encoder", "decoder"]
# Arrays that the kernels read; the files lie beside the engines.
ARRAYS = EMBEDDING, NORMS, BIAS, CROSS_BIAS, HEAD = ("embedding", "norms", "bias", "cross_bias", "head")
ENCODER_KINDS = ("qkv", "o", "wi", "wo")  # gemms of a layer, in order
# Of a step's gemms: a block makes 32 columns, a card has a hundred and some multiprocessors, and shorter sums than these gain nothing
# (perf/results/h200/notes.md).
MAX_SPLITS, MAX_BLOCKS, MIN_K_PER_SPLIT, BLOCK_COLUMNS = 4, 132, 192, 32
SPLIT_K_KINDS = ("qkv", "o", "cross_o", "wo")  # whose k_splits the kernels behind them sum


def array_file(stack: StackName, array: str) -> str:
    """File of an array."""
    return f"{stack}_{array}.npy"


@dataclasses.dataclass(frozen=True)
class StackSizes:
    """What the gemms and kernels of one stack depend on; travels in the manifest.

    Attributes:
        gated: the feed-forward layer is gelu(a) * b, not relu.
        epsilon: of the norms, for the residual stream as it is in half precision (export/graphs/fp16_scaling.py scales both).
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
    """One gemm: its stack, its layer (0-based) and which it is of the layer's."""

    stack: StackName
    layer: int
    kind: str

    @property
    def engine(self) -> str:
        """Of the engine file, without the suffix."""
        return f"{self.stack}.{self.kind}"

    @property
    def weight(self) -> str:
        """File of its weights."""
        return f"{self.stack}.{self.layer:02d}.{self.kind}.npy"


def encoder_gemms(stack: StackSizes) -> tuple[Gemm, ...]:
    """All gemms of the encoder in the order in which they run."""
    return tuple(Gemm("encoder", layer, kind) for layer in range(stack.num_layers) for kind in ENCODER_KINDS)


def decoder_gemms(sizes: EngineSizes) -> tuple[Gemm, ...]:
    """All gemms of a decoder step in the order in which they run."""
    found = []
    for layer in range(sizes.num_decoder_layers):
        across = ("cross_q", "cross_o") if layer in sizes.cross_attention_layers else ()
        found += [Gemm("decoder", layer, kind) for kind in ("qkv", "o", *across, "wi", "wo")]
    return tuple(found)


def gemm_features(stack: StackSizes, kind: str) -> tuple[int, int]:
    """Columns in and out."""
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
    """In how many k_splits a gemm is made."""
    if gemm.stack == "encoder" or gemm.kind not in SPLIT_K_KINDS:
        return 1
    given, made = gemm_features(stack, gemm.kind)
    blocks, k_splits = -(-made // BLOCK_COLUMNS), 1
    while (
        k_splits < MAX_SPLITS
        and 2 * k_splits * blocks <= MAX_BLOCKS
        and given % (2 * k_splits * 64) == 0
        and given >= 2 * k_splits * MIN_K_PER_SPLIT
    ):
        k_splits *= 2
    return k_splits


def gemm_tensors(stack: StackSizes, gemm: Gemm, precision: str) -> GraphTensors:
    """Inputs and output of a gemm's engine: of one in k_splits, each part's columns of all rows, its rows of the weights, what it makes.

    Args:
        stack: the gemm's.
        gemm: any of its kind.
        precision: of the weights, "float16" or "bfloat16"; what is multiplied crosses the border as float16 with either.
    """
    rows, k_splits = "tokens" if gemm.stack == "encoder" else "batch", split_k_of(stack, gemm)
    given, made = gemm_features(stack, gemm.kind)
    lead: tuple[int, ...] = (k_splits,) if k_splits > 1 else ()
    inputs = (
        TensorSpec("x", "float16", (*lead, rows, given // k_splits)),
        TensorSpec("weight", precision, (*lead, given // k_splits, made)),
    )
    return GraphTensors(inputs, (TensorSpec("y", "float16", (*lead, rows, made)),))


def packed_cross_kv_tensors(sizes: EngineSizes, dtype: str = "float16") -> GraphTensors:
    """The cross_kv graph of a GPU reader: a token's keys of all heads, then its values, side by side; one output a cross-attending layer.

    A question's output is then one block of memory and can be written straight into its slot.
    """
    return GraphTensors(
        (TensorSpec("encoder_hidden_states", dtype, ("encoder_sequence_length", sizes.d_model_encoder)),),
        tuple(
            TensorSpec(f"cross_kv.{layer}", dtype, ("encoder_sequence_length", 2 * sizes.num_kv_heads * sizes.d_kv))
            for layer in sizes.cross_attention_layers
        ),
    )
