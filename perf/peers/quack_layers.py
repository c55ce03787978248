"""The encoder from library kernels: QuACK's GEMMs with norm, gate, residual and statistics in them, and cuDNN's attention.

Needs, beside torch with CUDA on a Hopper card: pip install 'quack-kernels[cu13]==0.6.5' (CuTe DSL comes with it).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .encoders import FP8, FP8_MOST, Attend, Encoder, EncoderWeights, LayerWeights, Quantized, heads_of, quantize, rms_norm

INSTALL = "pip install 'quack-kernels[cu13]==0.6.5'"
# What keeps QuACK 0.6.5 from FP8 at full speed on Hopper: it never asks for fast accumulation, and refuses to write a gated result in FP8,
# although the code behind that check handles it. File, what is there, and what is put in its place.
EDITS = (
    ("gemm_sm90.py", "fp8_fast_accum: bool = False", "fp8_fast_accum: bool = True"),
    ("epilogue/ops.py", "gemm.arch in (100, 120) and tensor.element_type.width in (4, 8)", "tensor.element_type.width in (4, 8)"),
)


class LibraryMissingError(RuntimeError):
    """QuACK is not installed, or not the version that this is written for."""


def edited_package(directory: Path, target: Path) -> None:
    """Copy a QuACK package to `target`, with EDITS.

    Raises:
        LibraryMissingError: if what is to be edited is not there exactly once.
    """
    shutil.copytree(directory, target)
    for file, old, new in EDITS:
        path = target / file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(old) != 1:
            raise LibraryMissingError(f"{directory / file}: wanted {old!r} once, found it {text.count(old)} times; {INSTALL}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def import_quack() -> Any:
    """QuACK's GEMM interface, from an edited copy: its compilers are processes of their own, which see files and no patches in memory.

    Raises:
        LibraryMissingError: naming what to install.
    """
    if "quack" not in sys.modules:
        found = importlib.util.find_spec("quack")
        if found is None or not found.submodule_search_locations:
            raise LibraryMissingError(f"the library peers need QuACK: {INSTALL}")
        place = Path(tempfile.mkdtemp(prefix="quack-"))
        edited_package(Path(found.submodule_search_locations[0]), place / "quack")
        sys.path.insert(0, str(place))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return importlib.import_module("quack.gemm_interface")


def interleaved(wi: Tensor) -> Tensor:
    """Gate and linear rows by turns, as QuACK's gated GEMM wants them."""
    gate, linear = wi.chunk(2)
    return torch.stack([gate, linear], 1).flatten(0, 1).contiguous()


def inverse_rms(partial: Tensor, width: int, epsilon: float) -> Tensor:
    """One over the root mean square of each row, from QuACK's sums of squares, a column a tile."""
    return torch.rsqrt(partial.reshape(-1, partial.shape[-1]).sum(-1) / width + epsilon)


def by_cudnn(weights: EncoderWeights) -> Attend:
    """Attention by cuDNN with the bias as an additive mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    bias = weights.bias[None].contiguous()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)

    return attend


def norms_in_products(layer: LayerWeights) -> LayerWeights:
    """The norms' weights taken into the products behind them; QuACK divides by the root mean square alone."""
    return dataclasses.replace(
        layer,
        qkv=(layer.qkv.float() * layer.norm.float()).to(layer.qkv.dtype),
        wi=interleaved((layer.wi.float() * layer.feed_forward_norm.float()).to(layer.wi.dtype)),
    )


class QuackEncoder:
    """In half precision; for one number of passages, so that it can be captured."""

    def __init__(self, weights: EncoderWeights, passages: int):
        self._quack, self._weights, self._attend = import_quack(), weights, by_cudnn(weights)
        self._layers = [norms_in_products(layer) for layer in weights.layers]
        rows, width = passages * weights.passage_length, weights.embedding.shape[1]
        first = weights.layers[0]

        def buffer(columns: int) -> Tensor:
            return weights.embedding.new_empty(rows, columns)

        self._qkv, self._inner = buffer(first.qkv.shape[0]), buffer(first.wo.shape[1])
        self._between, self._behind = buffer(width), buffer(width)

    def __call__(self, ids: Tensor) -> Tensor:
        """See the module peer_encoders."""
        quack, weights = self._quack, self._weights
        width, epsilon = weights.embedding.shape[1], weights.epsilon
        x = functional.embedding(ids.flatten(), weights.embedding)
        rstd = torch.rsqrt(x.float().square().mean(-1) + epsilon)

        def multiply_and_add(given: Tensor, weight: Tensor, residual: Tensor, out: Tensor) -> Tensor:
            sums = quack._gemm_rms_call(given, weight.t(), out, residual, None, None, dynamic_scheduler=False, tuned=True)
            return inverse_rms(sums, width, epsilon)

        for layer in self._layers:
            quack.gemm_norm_act(x, layer.qkv.t(), rstd=rstd, postact_out=self._qkv)
            mixed = self._attend(*heads_of(self._qkv.view(*ids.shape, -1), weights.num_heads)).transpose(1, 2).reshape(len(x), -1)
            rstd = multiply_and_add(mixed, layer.o, x, self._between)
            quack.gemm_norm_act(self._between, layer.wi.t(), rstd=rstd, activation="geglu", postact_out=self._inner)
            rstd = multiply_and_add(self._inner, layer.wo, self._between, self._behind)
            x = self._behind
        return rms_norm(x, weights.final_norm, epsilon).view(*ids.shape, width)


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """Products in e4m3, and what the residual stream is multiplied by on its way into `qkv` and `wi`."""

    qkv: Quantized
    o: Quantized
    wi: Quantized
    wo: Quantized
    before_qkv: Tensor
    before_wi: Tensor


def quantized_layer(layer: LayerWeights, scale_of_mixed: float) -> QuantizedLayer:
    """Quantize; `scale_of_mixed` is that of what attention gives.

    The residual stream goes into `qkv` and `wi` times the norm's weight, and is divided by its root mean square behind the product only: it
    needs no scale of its own as long as it stays within e4m3's range.
    """
    o = quantize(layer.o)
    return QuantizedLayer(
        quantize(layer.qkv),
        Quantized(o.values, o.scale * scale_of_mixed),
        quantize(interleaved(layer.wi)),
        quantize(layer.wo),  # QuACK writes the gated result as it is
        layer.norm.float(),
        layer.feed_forward_norm.float(),
    )


class QuackFp8Encoder:
    """Products in e4m3 with fast accumulation, the residual stream and attention in the weights' precision; for one number of passages."""

    def __init__(self, weights: EncoderWeights, scales: list[dict[str, float]], passages: int):
        self._quack, self._weights, self._attend = import_quack(), weights, by_cudnn(weights)
        self._layers = [quantized_layer(layer, of_layer["o"]) for layer, of_layer in zip(weights.layers, scales, strict=True)]
        self._factors = [torch.tensor(1 / of_layer["o"], device=weights.embedding.device) for of_layer in scales]  # of what attention gives
        rows, width = passages * weights.passage_length, weights.embedding.shape[1]
        first = weights.layers[0]

        def buffer(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=weights.embedding.device)

        self._qkv, self._inner = buffer(first.qkv.shape[0], weights.dtype), buffer(first.wo.shape[1], FP8)
        self._between, self._behind = buffer(width, weights.dtype), buffer(width, weights.dtype)
        self._between_fp8, self._behind_fp8 = buffer(width, FP8), buffer(width, FP8)
        self._first = torch.compile(self._scaled_and_measured)
        self._narrow = torch.compile(lambda x, factor: (x * factor).clamp(-FP8_MOST, FP8_MOST).to(FP8))

    def _scaled_and_measured(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return (x * factor).clamp(-FP8_MOST, FP8_MOST).to(FP8), torch.rsqrt(x.float().square().mean(-1) + self._weights.epsilon)

    def __call__(self, ids: Tensor) -> Tensor:
        """See the module peer_encoders."""
        quack, weights, layers = self._quack, self._weights, self._layers
        width = weights.embedding.shape[1]

        def normed(given: Tensor, weight: Quantized, rstd: Tensor, out: Tensor, activation: str | None) -> None:
            product = (given, weight.values.t(), None, out, None, rstd)
            quack._gemm_norm_act_call(*product, activation=activation, dynamic_scheduler=False, tuned=True, alpha=weight.scale)

        def added(given: Tensor, weight: Quantized, residual: Tensor, factor: Tensor, out_fp8: Tensor, out: Tensor) -> Tensor:
            product = (given, weight.values.t(), out_fp8, residual, factor, out)
            sums = quack._gemm_rms_call(*product, dynamic_scheduler=False, tuned=True, alpha=weight.scale)
            return inverse_rms(sums, width, weights.epsilon)

        x = functional.embedding(ids.flatten(), weights.embedding)
        x_fp8, rstd = self._first(x, layers[0].before_qkv)
        for i, layer in enumerate(layers):
            normed(x_fp8, layer.qkv, rstd, self._qkv, None)
            mixed = self._attend(*heads_of(self._qkv.view(*ids.shape, -1), weights.num_heads)).transpose(1, 2).reshape(len(x), -1)
            mixed_fp8 = self._narrow(mixed, self._factors[i])
            rstd = added(mixed_fp8, layer.o, x, layer.before_wi, self._between_fp8, self._between)
            normed(self._between_fp8, layer.wi, rstd, self._inner, "geglu")
            after = layers[i + 1].before_qkv if i + 1 < len(layers) else torch.ones_like(layer.before_qkv)
            rstd = added(self._inner, layer.wo, self._between, after, self._behind_fp8, self._behind)
            x, x_fp8 = self._behind, self._behind_fp8
        return rms_norm(x, weights.final_norm, weights.epsilon).view(*ids.shape, width)


def library_encoder(weights: EncoderWeights, passages: int) -> Encoder:
    """In the weights' precision."""
    return QuackEncoder(weights, passages)


def library_fp8_encoder(weights: EncoderWeights, scales: list[dict[str, float]], passages: int) -> Encoder:
    """In FP8; `scales` of `activation_scales`."""
    return QuackFp8Encoder(weights, scales, passages)
