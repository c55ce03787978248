"""The encoder's library kernels: they compile for every architecture without a GPU, and what is written for them makes the same encoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.errors import CompileError
from export.graphs.cpu import EncoderGraph
from export.graphs.gemms import Scales, rescale, stack_sizes
from export.library.compiler import compile_all
from export.library.encoder import (
    _ordered,
    half_weights,
    measured_amax,
    narrow_weights,
    untuned_choices,
    write_encoder_library,
)
from export.library.options import ARCHITECTURES, LibraryOptions
from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import (
    KINDS,
    NARROW_NORMS,
    RUNTIME_FILE,
    SCALES,
    Choice,
    EncoderKernel,
    EncoderLibrary,
    Tiling,
    gemm_widths,
    inner_order,
    narrow_order,
    weight_file,
)
from tests.conftest import FID, T5_V1_0, VOCAB_SIZE, random_reader, wide
from tests.serving.engines.numpy_reader import activate, attend_within_passages

GATED = StackSizes(192, 2, 6, 6, 32, 384, True, 1e-6)
RAGGED = dataclasses.replace(GATED, d_model=272, d_ff=528, gated=False)  # no tile divides its columns


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(architecture: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip("quack")
    attended = ("float16", "float8") if precision == "float8" else (precision,)
    choices = [choice for of in attended for choice in untuned_choices(precision, of, architecture)]
    kernels = tuple(dict.fromkeys(choice.kernel for choice in choices))
    for stack in (GATED, RAGGED):
        assert compile_all(stack, kernels, architecture, tmp_path) == {}
        for kernel in kernels:
            assert (tmp_path / kernel.file).read_bytes()[:4] == b"\x7fELF"
            (tmp_path / kernel.file).unlink()


@pytest.fixture(params=[FID, T5_V1_0], ids=["gated", "relu"])
def encoder(request: pytest.FixtureRequest) -> tuple[EncoderGraph, StackSizes]:
    """Rescaled as for half precision."""
    config = wide(request.param)
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, d_model=32, d_ff=48), decoder=config.encoder)
    graph = EncoderGraph(random_reader(dataclasses.replace(config, decoder=dataclasses.replace(config.encoder, num_kv_heads=3))))
    rescale(graph, Scales(residual=0.25, inner=0.5))
    return graph, stack_sizes(config.encoder, config.feed_forward_proj, graph.final_norm.epsilon)


def passages() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in (7, 24, 1)]


def encode(graph: EncoderGraph, stack: StackSizes, ids: torch.Tensor, files: dict[str, np.ndarray], architecture: str) -> np.ndarray:
    """One passage as the kernels do it, in NumPy: from the files' weights, the norms taken as factors of rows."""
    x = graph.embedding[ids].numpy().astype(np.float64)
    norms, scales = files.get(NARROW_NORMS), files.get(SCALES)
    read = slice(None) if norms is None else _ordered(stack.d_model, narrow_order(architecture)).numpy()
    made = np.argsort(_ordered(stack.d_ff, inner_order(architecture, "float16" if norms is None else "float8")).numpy())

    def product(kind: str, layer: int, given: np.ndarray) -> np.ndarray:
        weight = files[weight_file(kind, layer)]
        wide = torch.from_numpy(weight).view(torch.float8_e4m3fn).float().numpy() if weight.dtype == np.uint8 else weight
        assert wide.shape == gemm_widths(stack, kind)[::-1]
        factor = 1.0 if scales is None else float(scales[layer, KINDS.index(kind), 0])
        return given @ wide.T.astype(np.float64) * factor

    def normed(kind: str, layer: int) -> np.ndarray:
        rms = np.sqrt((x**2).mean(1, keepdims=True) + stack.epsilon)
        return product(kind, layer, x if norms is None else (x * norms[2 * layer + (kind == "wi")])[:, read]) / rms

    bias = graph.bias.table.numpy()
    for layer in range(stack.num_layers):
        attended = attend_within_passages(normed("qkv", layer), [len(ids)], bias, stack)
        of_o = 1.0 if scales is None or files[weight_file("o", layer)].dtype != np.uint8 else float(scales[layer, 0, 1])
        x = x + product("o", layer, attended * of_o)
        inner = normed("wi", layer)
        if stack.gated:
            inner = np.concatenate([inner[:, ::2][:, made], inner[:, 1::2][:, made]], axis=1)
        x = x + product("wo", layer, activate(inner, stack) * (1.0 if scales is None else float(scales[layer, 2, 1])))
    rms = np.sqrt((x**2).mean(1, keepdims=True) + stack.epsilon)
    return np.asarray(x / rms * graph.final_norm.weight.numpy())


@torch.no_grad()
def errors(graph: EncoderGraph, stack: StackSizes, files: dict[str, np.ndarray], architecture: str) -> list[float]:
    found = []
    for ids in passages():
        wanted = graph(ids[None], torch.ones_like(ids[None]))[0].numpy()
        found.append(float(np.linalg.norm(encode(graph, stack, ids, files, architecture) - wanted) / np.linalg.norm(wanted)))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_weights_make_the_same_encoder(encoder: tuple[EncoderGraph, StackSizes], architecture: str) -> None:
    graph, stack = encoder
    assert max(errors(graph, stack, dict(half_weights(graph, stack, architecture)), architecture)) < 1e-3


@pytest.mark.parametrize("attended", ["float16", "float8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_weights_and_scales_make_the_same_encoder(encoder: tuple[EncoderGraph, StackSizes], architecture: str, attended: str) -> None:
    graph, stack = encoder
    files = dict(narrow_weights(graph, stack, measured_amax(graph, passages()), architecture, attended))
    assert max(errors(graph, stack, files, architecture)) < 0.06  # of e4m3's weights; a wrong scale is far more
    assert all(files[weight_file(kind, 0)].dtype == np.uint8 for kind in KINDS if kind != "o" or attended == "float8")


def test_amax_is_of_what_the_gemms_read(encoder: tuple[EncoderGraph, StackSizes]) -> None:
    graph, stack = encoder
    amax = measured_amax(graph, passages())
    assert amax.shape == (stack.num_layers, len(KINDS)) and (amax > 0).all()
    first = torch.cat([graph.embedding[ids] for ids in passages()]) * graph.layers[0].self_attention_norm.weight  # type: ignore[union-attr, operator]
    assert amax[0, 0] == pytest.approx(float(first.abs().max()))


def library() -> EncoderLibrary:
    few, many = Tiling(128, 128, 2, 1, pingpong=True), Tiling(256, 128, 2, 1)
    choices = [Choice(rows, EncoderKernel(kind, "float16", t)) for kind in KINDS for rows, t in ((512, few), (0, many))]
    return EncoderLibrary("sm_90a", "float16", "float16", tuple(choices))


def test_the_kernel_is_chosen_by_rows() -> None:
    found = [library().choose("wi", rows).tiling.tile_m for rows in (1, 512, 513, 10**6)]
    assert found == [128, 128, 256, 256]
    assert len(library().kernels) == 8 and library().compute_capability == "9.0"


def test_all_files_go_where_the_encoder_goes() -> None:
    kernels = [kernel.file for kernel in library().kernels]
    assert all(file.startswith("encoder") for file in (*kernels, RUNTIME_FILE, NARROW_NORMS, SCALES, weight_file("wo", 11)))


def test_a_library_travels_through_json() -> None:
    assert EncoderLibrary.from_dict(json.loads(json.dumps(dataclasses.asdict(library())))) == library()


def test_what_the_library_does_not_have_is_refused_by_name(encoder: tuple[EncoderGraph, StackSizes], tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no float16 kernels for sm_80; there are: sm_90a: float16"):
        write_encoder_library(*encoder, 24, tmp_path, LibraryOptions("sm_80"))
    graph, stack = encoder
    with pytest.raises(CompileError, match="d_ff: wanted a multiple of 16, got 40"):
        write_encoder_library(graph, dataclasses.replace(stack, d_ff=40), 24, tmp_path, LibraryOptions("sm_90a", "float8"))
    assert not list(tmp_path.iterdir())
