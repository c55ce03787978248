"""A reader's encoder for library kernels: weights as they read them, FP8's scales measured on sample tokens, and the kernels.

Comes in: the encoder rescaled for half precision (export/graphs/gemms.py). Goes out: files beside the engines, and what the manifest says.

Half precision: the residual stream is kept in 16 bits, which the powers of two of export/graphs/gemms.py make room for; the norms'
weights are in the weights of the GEMMs behind them, multiplied in fp32 and rounded once. FP8 (e4m3): weights and activations have one scale
a tensor; a norm's weight is on the stream's copy in 8 bits, so that the weights keep their own range. Softmax, norms, sums and the stream
are as in half precision.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from export.checkpoint.files import Checkpoint
from export.errors import CompileError
from export.graphs.cpu import EncoderGraph, EncoderGraphLayer
from export.graphs.gemms import PackedCrossKVGraph
from export.manifest_writer import PROMPT_TEMPLATE
from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import (
    FP8_LARGEST,
    HOPPER,
    HOPPER_ATTENTION_D_KV,
    HOPPER_ATTENTION_TOKENS,
    KINDS,
    NARROW_NORMS,
    RUNTIME_FILE,
    SCALES,
    Choice,
    EncoderKernel,
    EncoderLibrary,
    Tiling,
    inner_order,
    narrow_order,
    weight_file,
)

from .compiler import compile_all
from .options import ARCHITECTURES, LibraryOptions

# Tilings of the encoder's GEMMs: what was the fastest on a card of each architecture, or what is known to run there.

Usual = tuple[tuple[int, Tiling], ...]  # rows up to, 0 for any number; in ascending order
SAFE: dict[str, Tiling] = {
    "sm_90a": Tiling(128, 128, 1, 2, pingpong=True, epilogue_n=64),
    "sm_100a": Tiling(128, 128),
    "sm_120a": Tiling(128, 128, pingpong=True),
}


def _turns(tile_m: int, tile_n: int, cluster_m: int, cluster_n: int, epilogue_n: int = 0) -> Tiling:
    return Tiling(tile_m, tile_n, cluster_m, cluster_n, pingpong=True, epilogue_n=epilogue_n)


# Measured on H100s at base size, at 256, 2,560, 10,240, 30,720 and 245,760 rows, among up to 22 tilings each, all in turns (medians of 7 to
# 11). Tiles of 256 rows, which two groups of warps share, were 10 to 30% slower throughout: no results go out while they multiply.
FASTEST: dict[tuple[str, str, str], Usual] = {
    ("sm_90a", "qkv", "float16"): ((0, _turns(128, 192, 1, 2, 64)),),
    ("sm_90a", "o", "float16"): ((5_120, _turns(128, 128, 1, 2, 64)), (0, _turns(128, 192, 2, 1, 64))),
    ("sm_90a", "wi", "float16"): ((1_024, _turns(128, 128, 1, 2, 64)), (0, _turns(192, 128, 1, 2, 64))),
    ("sm_90a", "wo", "float16"): (
        (20_480, _turns(128, 128, 1, 2, 64)),
        (61_440, _turns(128, 128, 1, 2)),
        (0, _turns(128, 192, 1, 2)),
    ),
    ("sm_90a", "qkv", "float8"): ((0, _turns(128, 192, 1, 2, 64)),),
    ("sm_90a", "o", "float8"): ((0, _turns(128, 128, 1, 2, 64)),),
    ("sm_90a", "wi", "float8"): ((5_120, _turns(128, 128, 1, 2, 128)), (0, _turns(128, 192, 2, 1, 64))),
    ("sm_90a", "wo", "float8"): (
        (5_120, _turns(128, 128, 1, 2, 64)),
        (61_440, _turns(128, 128, 1, 2)),
        (0, _turns(128, 192, 1, 2)),
    ),
}


def usual_tilings(architecture: str, kind: str, precision: str) -> Usual:
    """Of a GEMM, by rows. Both half precisions have the same."""
    measured = "float16" if precision == "bfloat16" else precision
    return FASTEST.get((architecture, kind, measured), ((0, SAFE[architecture]),))


# Of e4m3 that other inputs than the sample may need: its precision is the same everywhere but near zero, so that room costs nothing.
FP8_HEADROOM = 4.0
SAMPLE_PASSAGES = 64


@torch.no_grad()
def cross_kv_scales(graph: EncoderGraph, cross_kv: PackedCrossKVGraph, num_kv_heads: int, passages: Sequence[Tensor]) -> np.ndarray:
    """What the decoder's keys and values are divided by before they are rounded to e4m3.

    Args:
        graph: the encoder in fp32.
        cross_kv: the projections behind it, in fp32.
        num_kv_heads: of the decoder.
        passages: int64[tokens] each.

    Returns:
        float32[layers with cross-attention, 2, num_kv_heads], of keys and of values.
    """
    largest = torch.full((len(cross_kv.projections), 2, num_kv_heads), torch.finfo(torch.float16).tiny)
    for ids in passages:
        (hidden,) = graph(ids[None], torch.ones_like(ids[None]))
        for of_layer, made in zip(largest, cross_kv(hidden), strict=True):
            of_layer.copy_(torch.maximum(of_layer, made.reshape(len(ids), 2, num_kv_heads, -1).abs().amax((0, 3))))
    return (largest * FP8_HEADROOM / FP8_LARGEST).numpy()


@torch.no_grad()
def measured_amax(graph: EncoderGraph, passages: Sequence[Tensor]) -> np.ndarray:
    """The largest magnitudes that sample passages reach.

    Args:
        graph: the encoder in fp32, rescaled.
        passages: int64[tokens] each.

    Returns:
        float64[num_layers, 4]: of what qkv, o, wi and wo read; of qkv and wi the stream times the norm's weight.
    """
    layers: list[EncoderGraphLayer] = list(graph.layers)  # type: ignore[arg-type]
    largest = np.zeros((len(layers), len(KINDS)))
    hooks = []

    def watch(at: tuple[int, int], weight: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            reached = given[0] if weight is None else given[0] * weight
            largest[at] = max(largest[at], float(reached.abs().max()))

        return see

    for layer, modules in enumerate(layers):
        norms = modules.self_attention_norm, modules.feed_forward_norm
        for norm, place in zip(norms, (0, 2), strict=True):
            hooks.append(norm.register_forward_pre_hook(watch((layer, place), norm.weight)))
        for module, place in ((modules.o, 1), (modules.feed_forward.wo, 3)):
            hooks.append(module.register_forward_pre_hook(watch((layer, place), None)))
    try:
        for ids in passages:
            graph(ids[None], torch.ones_like(ids[None]))
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def half_weights(graph: EncoderGraph, stack: StackSizes, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every GEMM's file and its float16[columns, columns in]."""
    for layer, kind, weight, norm in _weights(graph, stack, inner_order(architecture, "float16")):
        folded = weight if norm is None else weight * norm
        yield weight_file(kind, layer), folded.to(torch.float16).numpy()


def narrow_weights(
    graph: EncoderGraph, stack: StackSizes, amax: np.ndarray, architecture: str, attended: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every GEMM's file and its weights in e4m3, as uint8 (of o in float16 unless the attention kernel writes e4m3), and the scales.

    Args:
        graph: the encoder in fp32, rescaled.
        stack: its sizes.
        amax: of `measured_amax`.
        architecture: of the kernels.
        attended: precision of what o reads.
    """
    scales = np.ones((stack.num_layers, len(KINDS), 2), np.float32)
    norms = np.ones((2 * stack.num_layers, stack.d_model), np.float32)
    given = amax * FP8_HEADROOM / FP8_LARGEST  # e4m3 holds what is read divided by this
    columns = _ordered(stack.d_model, narrow_order(architecture))
    for layer, kind, weight, norm in _weights(graph, stack, inner_order(architecture, "float8")):
        place = KINDS.index(kind)
        if kind == "o" and attended == "float16":
            yield weight_file(kind, layer), weight.to(torch.float16).numpy()
            continue
        of_weight = float(weight.abs().max()) / FP8_LARGEST
        read = weight if norm is None else weight[:, columns]
        yield weight_file(kind, layer), (read / of_weight).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        scales[layer, place, 0] = given[layer, place] * of_weight
        if norm is not None:
            norms[2 * layer + (kind == "wi")] = norm.numpy() / given[layer, place]
        if kind == "wi":
            scales[layer, place, 1] = 1 / given[layer, KINDS.index("wo")]
        elif kind == "qkv":
            scales[layer, place, 1] = 1 / given[layer, KINDS.index("o")]  # for an attention kernel that writes e4m3
    yield NARROW_NORMS, norms
    yield SCALES, scales


def _weights(graph: EncoderGraph, stack: StackSizes, order: Sequence[int]) -> Iterator[tuple[int, str, Tensor, Tensor | None]]:
    """Layer, kind, float32[columns, columns in], and the weight of the norm before it, if there is one.

    A gated wi's gate and up rows take turns, so that an epilogue finds both in one thread, channels in `order` within each block.
    """
    layers: list[EncoderGraphLayer] = list(graph.layers)  # type: ignore[arg-type]
    for layer, modules in enumerate(layers):
        inner = modules.feed_forward.wi.weight.t()
        if stack.gated:
            channels = _ordered(stack.d_ff, order)
            inner = torch.stack([half[channels] for half in inner.chunk(2)], 1).reshape(inner.shape)
        yield layer, "qkv", modules.qkv.weight.t().contiguous(), modules.self_attention_norm.weight
        yield layer, "o", modules.o.weight.t().contiguous(), None
        yield layer, "wi", inner.contiguous(), modules.feed_forward_norm.weight
        yield layer, "wo", modules.feed_forward.wo.weight.t().contiguous(), None


def _ordered(channels: int, order: Sequence[int]) -> Tensor:
    """The channel at each place, block by block in `order`."""
    places = torch.arange(channels)
    return places - places % len(order) + torch.tensor(order)[places % len(order)]


def variants(precision: str, attended: str) -> tuple[tuple[str, str, bool], ...]:
    """The GEMMs that an encoder consists of: kind, precision of what it multiplies, and whether it writes the stream in 8 bits as well."""
    if precision != "float8":
        return tuple((kind, precision, False) for kind in KINDS)
    last = ("wo", precision, False)  # of the last layer: no FP8 GEMM reads the stream behind it
    return (("qkv", precision, False), ("o", attended, True), ("wi", precision, False), ("wo", precision, True), last)


def untuned_choices(precision: str, attended: str, architecture: str) -> tuple[Choice, ...]:
    """What was the fastest on a card of this architecture with a base-sized encoder, or what is known to run."""
    return tuple(
        Choice(most_rows, EncoderKernel(kind, of, tiling, narrow))
        for kind, of, narrow in variants(precision, attended)
        for most_rows, tiling in usual_tilings(architecture, kind, of)
    )


def sample_passages(checkpoint: Checkpoint, samples: Path | None) -> list[Tensor]:
    """int64[tokens] each, of the questions and passages in the file `samples`, a line of JSON each; without a file random tokens."""
    config = checkpoint.reader.config
    if samples is None:
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(0, config.vocab_size, (SAMPLE_PASSAGES, config.passage_length), generator=generator))
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    end = [config.eos_token_id] if config.append_eos else []
    found: list[Tensor] = []
    with samples.open(encoding="utf-8") as lines:
        for line in lines:
            example = json.loads(line)
            for passage in example["ctxs"]:
                fields = {"question": example["question"], "title": passage.get("title") or "", "context": passage["text"]}
                ids = tokenizer.encode(PROMPT_TEMPLATE.format(**fields), add_special_tokens=False).ids
                found.append(torch.tensor(ids[: config.passage_length - len(end)] + end))
            if len(found) >= SAMPLE_PASSAGES:
                return found[:SAMPLE_PASSAGES]
    return found


def write_encoder_library(
    graph: EncoderGraph,
    stack: StackSizes,
    passage_length: int,
    directory: Path,
    options: LibraryOptions,
    passages: Sequence[Tensor] = (),
) -> EncoderLibrary:
    """Compile the kernels and write them, the run-time library that they need, and the weights as they read them.

    Args:
        graph: the encoder in fp32, rescaled for half precision.
        stack: its sizes.
        passage_length: tokens of a passage at most.
        directory: of the engines.
        options: for which card, and in what precision.
        passages: int64[tokens] each; FP8's scales are measured on them.

    Raises:
        CompileError: if the library does not have the precision for the architecture, or a kernel does not compile.
    """
    architecture, precision = options.architecture, options.precision
    if architecture not in ARCHITECTURES or precision not in ARCHITECTURES[architecture][1]:
        raise CompileError(f"no {precision} kernels for {architecture}; there are: {describe_architectures()}")
    _require_sizes(stack, precision)
    fits = architecture == HOPPER and stack.d_kv == HOPPER_ATTENTION_D_KV and passage_length <= HOPPER_ATTENTION_TOKENS
    attended = precision if fits else "float16"
    library = EncoderLibrary(architecture, precision, attended, untuned_choices(precision, attended, architecture))
    errors = compile_all(stack, library.kernels, architecture, directory)
    if errors:
        raise CompileError(f"{architecture}:\n  " + "\n  ".join(f"{name}: {error}" for name, error in errors.items()))
    shutil.copyfile(runtime_library(), directory / RUNTIME_FILE)
    narrow = precision == "float8"
    if narrow:
        arrays = narrow_weights(graph, stack, measured_amax(graph, passages), architecture, attended)
    else:
        arrays = half_weights(graph, stack, architecture)
    for file, array in arrays:
        np.save(directory / file, array, allow_pickle=False)
    return library


def _require_sizes(stack: StackSizes, precision: str) -> None:
    """The copy engine wants rows of whole 16 bytes."""
    unit = 16 if precision == "float8" else 8
    sizes = {"d_model": stack.d_model, "d_ff": stack.d_ff, "num_heads * d_kv": stack.num_heads * stack.d_kv}
    faults = [f"{name}: wanted a multiple of {unit}, got {size}" for name, size in sizes.items() if size % unit]
    if faults:
        raise CompileError(f"{precision} kernels do not have this encoder's sizes:\n  " + "\n  ".join(faults))


def describe_architectures() -> str:
    """For messages: each with its precisions."""
    return "; ".join(f"{name}: {', '.join(precisions)}" for name, (_, precisions) in ARCHITECTURES.items())


def runtime_library() -> Path:
    """CuTe DSL's run-time library of the package that is installed here.

    Raises:
        CompileError: if it is not.
    """
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    for place in found.submodule_search_locations or () if found else ():
        for path in sorted(Path(place).glob("cu*/lib/libcute_dsl_runtime.so"), reverse=True):
            return path
    raise CompileError("libcute_dsl_runtime.so is not installed; see requirements-export.txt")
