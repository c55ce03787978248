"""The GPU's encoder and decoder on stand-ins for their GEMMs and kernels; tests/gpu runs the real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from export.checkpoint.files import Checkpoint
from export.errors import ExportError
from export.graphs.cpu import EncoderGraph
from export.graphs.gpu import _cross_kv_precision, export_gpu_reader
from export.library.encoder import sample_passages
from export.library.options import LibraryOptions
from export.tensorrt.compiler import graphs_of
from serving.contract.gemms import decoder_gemms, split_k_of
from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import EngineBuild, EngineError, Manifest, ManifestError, sha256_of_file
from serving.contract.profiles import profile_ranges, profile_shapes
from serving.engines.load import kv_budget, load_decoder
from serving.launcher.installation import PROJECT
from tests.conftest import FID, FIDO, RELEASED_FID, random_passages, random_reader, wide
from tests.serving.engines import fake_cupy, fake_tensorrt
from tests.serving.engines.numpy_reader import NumpyEncoder, NumpyStep

READERS = {"fid": FID, "fido": FIDO, "released_fid": RELEASED_FID}
FP8 = "fid_fp8"  # fid with FP8 keys and values in cross-attention
SPLIT_K = "fido_split_k"  # fido with split-K GEMMs, which a reader of its size would not have
LIMITS = Limits(slots=3, max_passages=4)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> dict[str, Path]:
    folders = {}
    for name, config in READERS.items():
        folders[name] = tmp_path_factory.mktemp("gpu") / name
        export_gpu_reader(Checkpoint(random_reader(wide(config)), tokenizer_json, name, "own"), folders[name])
    folders[FP8] = tmp_path_factory.mktemp("gpu") / FP8
    export_gpu_reader(
        Checkpoint(random_reader(wide(FID)), tokenizer_json, FP8, "own"), folders[FP8], library=LibraryOptions(cross_kv="float8")
    )
    with split_small_gemms():
        folders[SPLIT_K] = tmp_path_factory.mktemp("gpu") / SPLIT_K
        decoder = dataclasses.replace(wide(FIDO).decoder, d_model=128, d_ff=256, num_heads=8)
        config = dataclasses.replace(wide(FIDO), decoder=decoder)
        export_gpu_reader(Checkpoint(random_reader(config), tokenizer_json, SPLIT_K, "own"), folders[SPLIT_K])
    return folders


@contextlib.contextmanager
def split_small_gemms() -> Iterator[None]:
    """Split-K also for the GEMMs of a small reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.contract.gemms.MIN_K_PER_SPLIT", 64)
        yield


class Call:
    def __init__(self, session: ort.InferenceSession, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]):
        self._session, self._inputs, self._outputs = session, inputs, outputs

    def enqueue(self, stream: object) -> None:
        for result, out in zip(self._session.run(list(self._outputs), self._inputs), self._outputs.values(), strict=True):
            out[:] = result


class Engine:
    """A graph on ONNX Runtime's CPU provider."""

    capturable = False
    weight_bytes = 0

    def __init__(self, directory: Path, name: str):
        self._session = ort.InferenceSession(str(directory / f"{name}.onnx"))

    def bind(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray], *, context: int = 0) -> Call:
        return Call(self._session, {name: np.asarray(value) for name, value in inputs.items()}, outputs)


def loader(directory: Path) -> Any:
    return lambda name, tensors, scratch: Engine(directory, name)


@pytest.mark.parametrize("name", list(READERS))
def test_encoder_packs_passages_of_all_questions_and_puts_each_back(name: str, graphs: dict[str, Path], runtime: Any) -> None:
    directory, manifest = graphs[name], Manifest.load(graphs[name])
    encoder = runtime("encoder").GpuEncoder(directory, manifest, loader(directory), LIMITS)
    batch = [
        tuple(a[0].numpy().astype(np.int32) for a in random_passages(n, width, seed=n))
        for n, width in ((3, 24), (1, 9), (4, 24), (2, 16), (4, 24), (4, 24), (4, 24))
    ]
    batch[2][1][1] = 0  # a passage without a token
    assert sum(int(mask.sum()) for _, mask in batch) > encoder.max_tokens_per_call, "this test is about more than one call"
    reference = NumpyEncoder(directory, manifest)
    for (ids, mask), found in zip(batch, encoder.encode(batch), strict=True):
        wanted = reference.encode(ids, mask)
        assert found.shape == wanted.shape and not found[mask == 0].any()
        np.testing.assert_allclose(found, wanted, atol=2e-2)


def test_a_captured_call_holds_any_passages(graphs: dict[str, Path], runtime: Any, monkeypatch: Any) -> None:
    launched = []

    class CudaGraph:
        """Runs at every launch what was captured."""

        def __init__(self, stream: object, run: Any):
            self._run = run

        def launch(self, stream: object) -> None:
            launched.append(self)
            self._run()

    directory, manifest = graphs["fid"], Manifest.load(graphs["fid"])
    monkeypatch.setattr(Engine, "capturable", True)
    monkeypatch.setattr(runtime("encoder"), "CudaGraph", CudaGraph)
    monkeypatch.setattr("serving.contract.call_sizes.MIN_CAPTURED", (5, 64))
    encoder = runtime("encoder").GpuEncoder(directory, manifest, loader(directory), LIMITS)
    assert [(call.tokens, call.tiles) for call in encoder._captured] == [(5, 4), (64, 5)]
    reference = NumpyEncoder(directory, manifest)
    ids = random_passages(4, 24, seed=1)[0][0].numpy().astype(np.int32)
    for lengths in ((24, 24, 9, 7), (24, 24, 24, 24), (1, 1, 1, 1), (1, 0, 0, 0), (24, 1, 0, 0)):
        mask = (np.arange(24) < np.array(lengths)[:, None]).astype(np.int32)
        before = len(launched)
        (found,) = encoder.encode([(ids, mask)])
        assert len(launched) - before == (sum(lengths) <= 64), lengths
        np.testing.assert_allclose(found, reference.encode(ids, mask) * mask[..., None], atol=2e-2)
        assert np.isfinite(found).all()


def test_a_large_call_that_comes_again_is_captured(graphs: dict[str, Path], runtime: Any, monkeypatch: Any) -> None:
    launched = []

    class CudaGraph:
        def __init__(self, stream: object, run: Any):
            self._run = run

        def launch(self, stream: object) -> None:
            launched.append(self)
            self._run()

    directory, manifest = graphs["fid"], Manifest.load(graphs["fid"])
    monkeypatch.setattr(Engine, "capturable", True)
    monkeypatch.setattr(runtime("encoder"), "CudaGraph", CudaGraph)
    monkeypatch.setattr(runtime("encoder"), "captured_calls", lambda max_tokens: ())
    monkeypatch.setattr(runtime("encoder"), "MAX_REPEATED", 1)
    encoder = runtime("encoder").GpuEncoder(directory, manifest, loader(directory), LIMITS)
    reference = NumpyEncoder(directory, manifest)
    ids = random_passages(4, 24, seed=1)[0][0].numpy().astype(np.int32)

    def launches(*lengths: int) -> int:
        mask = (np.arange(24) < np.array(lengths)[:, None]).astype(np.int32)
        before = len(launched)
        (found,) = encoder.encode([(ids, mask)])
        np.testing.assert_allclose(found, reference.encode(ids, mask) * mask[..., None], atol=2e-2)
        return len(launched) - before

    assert [launches(24, 24, 24, 24) for _ in range(3)] == [0, 1, 1]
    assert launches(24, 20, 24, 24) == 0
    assert launches(24, 20, 24, 24) == 0, "there is room for one size"
    assert launches(24, 24, 24, 24) == 1


def test_unknown_ids_and_passages_that_are_too_long_read_no_foreign_memory(graphs: dict[str, Path], runtime: Any) -> None:
    directory, manifest = graphs["fid"], Manifest.load(graphs["fid"])
    encoder = runtime("encoder").GpuEncoder(directory, manifest, loader(directory), LIMITS)
    ids = np.full((2, 40), 96, np.int32)
    ids[0, 0], ids[1, 1] = -5, 10**6
    (found,) = encoder.encode([(ids, np.ones_like(ids))])
    length = manifest.prompt.passage_length
    assert found.shape[:2] == (2, 40) and np.isfinite(found).all() and found[:, :length].any() and not found[:, length:].any()


@pytest.mark.parametrize("name", [*READERS, FP8, SPLIT_K])
def test_a_decoder_step_equals_that_of_plain_numpy(
    name: str, graphs: dict[str, Path], runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, manifest = graphs[name], Manifest.load(graphs[name])
    if name == SPLIT_K:
        monkeypatch.setattr("serving.contract.gemms.MIN_K_PER_SPLIT", 64)
        assert manifest.decoder is not None
        k_splits = {p.kind: split_k_of(manifest.decoder, p) for p in decoder_gemms(manifest.sizes)}
        assert k_splits == {"qkv": 2, "o": 2, "cross_q": 1, "cross_o": 2, "wi": 1, "wo": 4}
    decoder = runtime("decoder").GpuDecoder(directory, manifest, loader(directory), LIMITS.slots, (64, 16))
    packer = runtime("packing").GpuPacker()
    reference = NumpyStep(directory, manifest, LIMITS.slots)
    rng = np.random.default_rng(1)
    for slot, length in enumerate((30, 7, 21)):
        hidden = rng.standard_normal((length, manifest.sizes.d_model_encoder)).astype(np.float16)
        token_positions = np.sort(rng.choice(90, length, replace=False)).astype(np.int32)
        packed = packer.pack(hidden[None], np.ones((1, length), np.int32))
        decoder.admit(slot, slot, packer.concatenate([packed[: length // 3], packed[length // 3 :]] if slot else [packed]), token_positions)
        reference.admit(slot, slot, hidden, token_positions)
    tokens, penalty = np.zeros(3, np.int32), np.array([-1e9, 0, 0], np.float32)
    for position in range(5):
        if position == 2:  # the last sequence moves to the first slot
            for engine in (decoder, reference):
                engine.move(2, 0)
            tokens, penalty = np.array([tokens[2], tokens[1]]), penalty[[2, 1]]
        at = np.full(len(tokens), position, np.int32)
        wanted, found = reference.step(tokens, at, penalty), decoder.step(tokens, at, penalty)
        np.testing.assert_allclose(found[1], wanted[1], atol=2e-2)
        np.testing.assert_allclose(found[2], wanted[2] if position == 0 else 0, atol=1e-2)
        tokens = wanted[0]


@pytest.mark.parametrize("whole_encoder", [False, True])
def test_scales_of_fp8_are_those_of_the_largest_keys_and_values(whole_encoder: bool, tmp_path: Path, tokenizer_json: str) -> None:
    """A line of samples: its passages are the whole of what is measured."""
    example = {"question": "who?", "ctxs": [{"title": "a", "text": "b c"}, {"title": "d", "text": "e f g"}]}
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(example), encoding="utf-8")
    reader = random_reader(wide(FID))
    checkpoint, options = Checkpoint(reader, tokenizer_json, FP8, "own"), LibraryOptions(samples=samples, cross_kv="float8")
    manifest = export_gpu_reader(checkpoint, tmp_path / FP8, library=options, whole_encoder=whole_encoder)
    assert manifest.cross_kv_precision == "float8" and "decoder_cross_kv_scales.npy" in manifest.files
    scales, heads = np.load(tmp_path / FP8 / "decoder_cross_kv_scales.npy"), FID.decoder.num_heads
    encoder = EncoderGraph(reader)
    with torch.no_grad():
        hidden = [encoder(ids[None], torch.ones_like(ids[None]))[0] for ids in sample_passages(checkpoint, samples)]
        for index, layer in enumerate(FID.cross_attention_layers):
            attention: Any = reader.decoder.layers[layer].cross_attention
            for kind, project in enumerate((attention.k, attention.v)):
                largest = (
                    torch.cat([project(states) for states in hidden]).abs().reshape(-1, heads, reader.config.decoder.d_kv).amax((0, 2))
                )
                np.testing.assert_allclose(scales[index, kind] * 448 / 4, largest, rtol=1e-4)  # room for four times as much


def test_fp8_is_refused_where_heads_share_keys_and_otherwise_follows_the_encoder(tmp_path: Path, tokenizer_json: str) -> None:
    checkpoint = Checkpoint(random_reader(wide(FIDO)), tokenizer_json, "fido", "own")
    with pytest.raises(ExportError, match=r"in float8: wanted a key/value head for each .* got 1; .*--cross-kv-precision float16"):
        export_gpu_reader(checkpoint, tmp_path / "fido", library=LibraryOptions(cross_kv="float8"))
    assert not (tmp_path / "fido").exists()
    found = {
        (narrow_encoder, name): _cross_kv_precision(config, None, narrow_encoder=narrow_encoder)
        for narrow_encoder in (False, True)
        for name, config in (("fid", FID), ("fido", FIDO))
    }
    assert [case for case, precision in found.items() if precision == "float8"] == [(True, "fid")]
    assert _cross_kv_precision(FID, "float16", narrow_encoder=True) == "float16"


def test_a_type_of_keys_and_values_that_serving_does_not_know_is_refused(graphs: dict[str, Path]) -> None:
    unknown = dataclasses.replace(Manifest.load(graphs[FP8]), cross_kv_precision="float4")
    with pytest.raises(ManifestError, match=r"cross_kv_precision: wanted float16 or float8, got 'float4'"):
        kv_budget(unknown, LIMITS)


def test_fp8_keys_and_values_take_half_the_bytes_and_need_a_gpu_that_has_them(
    graphs: dict[str, Path], runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = {}
    for name in ("fid", FP8):
        directory, manifest = graphs[name], Manifest.load(graphs[name])
        decoders[name] = runtime("decoder").GpuDecoder(directory, manifest, loader(directory), 2, (64, 16))
        assert decoders[name].memory.cross_kv == sum(cache.nbytes for cache in decoders[name]._cross_cache.values())
        one = kv_budget(manifest, dataclasses.replace(LIMITS, slots=2)).bytes_per_question
        assert kv_budget(manifest, dataclasses.replace(LIMITS, slots=9, kv_cache_bytes=4 * one)).slots == 4
    assert decoders[FP8].memory.cross_kv * 2 == decoders["fid"].memory.cross_kv
    assert decoders[FP8].memory.self_kv == decoders["fid"].memory.self_kv
    monkeypatch.setattr(fake_cupy.Context, "compute_capability", "80")
    with pytest.raises(EngineError, match=r"FP8 keys and values .* wanted a GPU of compute capability 8\.9 or later, got 8\.0; export"):
        runtime("decoder").GpuDecoder(graphs[FP8], Manifest.load(graphs[FP8]), loader(graphs[FP8]), 2, (64, 16))


def test_kernels_that_start_early_wait_before_they_write_or_return(runtime: Any) -> None:
    dependent = runtime("cuda_graph").DEPENDENT_KERNELS
    names = ("rows.cu", "skinny_gemm.cu", "self_attention.cu", "cross_attention.cu", "head.cu", "hopper_attention.cu")
    sources = "".join((PROJECT / "serving/engines/gpu/cuda" / name).read_text("utf-8") for name in names)
    # __global__ void, launch bounds if any, the name; then everything up to the closing brace, which is at the start of a line
    kernels = dict(re.findall(r"__global__ void(?: __\w+__\(.*?\))? (\w+)\((.*?)^\}", sources, re.DOTALL | re.MULTILINE))
    assert set(kernels) - dependent == {"embed", "quantize_cross_kv"}  # first in their graph, and in none
    for name in dependent:
        branches = [kernels[name]]
        if name == "cross_attention":  # two forms under one name: without and with shared keys
            branches = re.split(r"^#(?:if|else|endif).*$", kernels[name], flags=re.MULTILINE)[1:3]
        if name == "hopper_attention":  # the warps that copy, and those that compute
            branches = kernels[name].split("\n    } else {\n")
        for branch in branches:
            before, after = branch.split("grid_dependency_wait(", 1)
            assert not re.search(r"\breturn;|\bstore\(|\bout\[", before), name
            assert "grid_dependency_wait(" not in after, name


def test_a_reader_that_a_gpu_cannot_run_is_refused(graphs: dict[str, Path], runtime: Any, tmp_path: Path, tokenizer_json: str) -> None:
    directory, manifest = graphs["fido"], Manifest.load(graphs["fido"])
    whole = dataclasses.replace(manifest, encoder=None)
    with pytest.raises(EngineError, match="the encoder is one graph, for Triton's own backend"):
        runtime("encoder").GpuEncoder(directory, whole, loader(directory), LIMITS)
    with pytest.raises(EngineError, match="the decoder is one graph"):
        runtime("decoder").GpuDecoder(directory, dataclasses.replace(manifest, decoder=None), loader(directory), 1, (64, 16))
    files = {file: hash_ for file, hash_ in manifest.files.items() if file != "decoder.00.qkv.npy"}
    with pytest.raises(ManifestError, match=r"decoder\.00\.qkv\.npy: not in manifest\.json"):
        runtime("decoder").GpuDecoder(directory, dataclasses.replace(manifest, files=files), loader(directory), 1, (64, 16))


def test_a_step_beyond_the_slots_is_refused_before_anything_is_written(graphs: dict[str, Path], runtime: Any) -> None:
    directory, manifest = graphs["fido"], Manifest.load(graphs["fido"])
    decoder = runtime("decoder").GpuDecoder(directory, manifest, loader(directory), 2, (64, 16))
    hidden = fake_cupy.array(np.ones((5, manifest.sizes.d_model_encoder), np.float16))
    for slot in range(2):
        decoder.admit(slot, slot, hidden, np.arange(5, dtype=np.int32))
    tokens, penalty = np.zeros(2, np.int32), np.zeros(2, np.float32)
    decoder.step(tokens, np.array([0, 15], np.int32), penalty)  # the last token that a slot holds
    caches = [cache.copy() for cache in decoder._self_cache.values()]
    with pytest.raises(EngineError, match=r"position in the answer: wanted less than 16, .* got 16; .*max_new_tokens"):
        decoder.step(tokens, np.array([1, 16], np.int32), penalty)
    for cache, before in zip(decoder._self_cache.values(), caches, strict=True):
        np.testing.assert_array_equal(cache, before)
    with pytest.raises(EngineError, match=r"passages of a question: wanted at most 64 tokens, .* got 65"):
        decoder.admit(0, 2, fake_cupy.array(np.ones((65, 24), np.float16)), np.arange(65, dtype=np.int32))


def test_slots_that_the_memory_budget_leaves_are_those_that_the_engines_must_cover(
    graphs: dict[str, Path], runtime: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory, manifest = tensorrt_reader(graphs["fido"], tmp_path, Limits(slots=2, max_passages=4))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("11.4.0"))
    monkeypatch.setattr(runtime("decoder"), "CudaGraph", lambda stream, run: types.SimpleNamespace(launch=lambda stream: run()))
    limits = Limits(slots=3, max_passages=4, max_new_tokens=32)
    with pytest.raises(LimitsError, match=r"decoder\.qkv\.plan: batch: wanted at most 2, .* allow 3; lower slots"):
        load_decoder(directory, manifest, limits)
    budget = dataclasses.replace(limits, kv_cache_bytes=2 * kv_budget(manifest, limits).bytes_per_question)
    assert load_decoder(directory, manifest, budget).slots == 2
    with pytest.raises(LimitsError, match=r"cross_kv\.plan: encoder_sequence_length: wanted at most 96, .* allow 120; lower max_passages"):
        load_decoder(directory, manifest, dataclasses.replace(limits, slots=2, max_passages=5))


def tensorrt_reader(graphs: Path, directory: Path, limits: Limits) -> tuple[Path, Manifest]:
    """The reader in `graphs` with plans for the stand-in of TensorRT 11 in place of its graphs."""
    shutil.copytree(graphs, directory, dirs_exist_ok=True)
    manifest = Manifest.load(graphs)
    profiles = {}
    for name, tensors in graphs_of(manifest).items():
        profiles[f"{name}.plan"] = [
            profile_shapes(tensors, ranges) for ranges in profile_ranges(name, limits, manifest.prompt.passage_length)
        ]
        specs = (*tensors.inputs, *tensors.outputs)
        (directory / f"{name}.plan").write_bytes(
            fake_tensorrt.plan([spec.name for spec in specs], 64, **{s.name: fake_tensorrt.TYPES[s.dtype] for s in specs})
        )
    files = {file.name: sha256_of_file(file) for file in directory.iterdir()}
    build = EngineBuild("NVIDIA H200", "9.0", "11.4.0", profiles, {})
    return directory, dataclasses.replace(manifest, engine="tensorrt", files=files, build=build)
