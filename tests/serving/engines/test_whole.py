"""The reader of three whole graphs on stand-ins for CuPy and the engine: as fp32 on the CPU, whatever joins, leaves or grows."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoint.files import Checkpoint
from export.graphs.gpu import export_gpu_reader
from export.graphs.onnx_export import export_reader
from export.repository import repository_from_engines
from export.tensorrt.compiler import tasks_of
from serving.contract.kv_memory import cache_capacities
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest
from serving.contract.profiles import require_covered
from serving.engines.cpu import OnnxDecoder, OnnxEncoder
from tests.conftest import FIDO, GROUPED, RELEASED_FID, random_passages, random_reader
from tests.serving.engines.test_gpu_runtime import loader

READERS = {"fido": FIDO, "released_fid": RELEASED_FID, "grouped": GROUPED}  # of sizes that our kernels do not have
LIMITS = Limits(slots=3, max_passages=6, max_new_tokens=40)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> dict[str, tuple[Path, Path]]:
    """Name -> whole graphs in half precision, and the same reader for the CPU in fp32."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    for name, config in READERS.items():
        checkpoint = Checkpoint(random_reader(config), tokenizer_json, name, "own")
        export_gpu_reader(checkpoint, folder / name, whole=True)
        export_reader(checkpoint, folder / f"{name}.cpu")
        made[name] = folder / name, folder / f"{name}.cpu"
    return made


@pytest.fixture
def whole(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """serving.engines.whole, imported on the stand-ins."""
    monkeypatch.delitem(sys.modules, "serving.engines.whole", raising=False)
    runtime("decoder")
    import serving.engines.whole as module

    yield module
    del sys.modules["serving.engines.whole"]


@pytest.fixture(params=[True, False], ids=["captured", "not captured"])
def captured(request: pytest.FixtureRequest, whole: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of CUDA graphs, which run what was captured; none where the engine cannot be captured."""
    launched: list[Any] = []

    class CudaGraph:
        def __init__(self, stream: object, run: Any):
            self._run = run

        def launch(self, stream: object) -> None:
            launched.append(self)
            self._run()

    monkeypatch.setattr("tests.serving.engines.test_gpu_runtime.Engine.capturable", request.param)
    monkeypatch.setattr(whole, "CudaGraph", CudaGraph)
    return launched


@pytest.mark.parametrize("name", list(READERS))
def test_the_encoder_equals_fp32_and_leaves_padding_zero(name: str, graphs: Any, whole: Any) -> None:
    directory, cpu = graphs[name]
    encoder = whole.WholeEncoder(directory, Manifest.load(directory), loader(directory), LIMITS)
    batch: Any = [
        tuple(a[0].numpy().astype(np.int32) for a in random_passages(n, width, seed=n)) for n, width in ((3, 24), (1, 9), (6, 24), (5, 24))
    ]
    batch[2][1][1] = 0  # a passage without a token
    for found, wanted, (_, mask) in zip(encoder.encode(batch), OnnxEncoder(cpu, Manifest.load(cpu)).encode(batch), batch, strict=True):
        assert found.dtype == np.float16 and found.shape == wanted.shape and not found[mask == 0].any()
        np.testing.assert_allclose(found[mask == 1], wanted[mask == 1], atol=2e-2)


@pytest.mark.parametrize("name", list(READERS))
def test_the_decoder_equals_fp32_while_sequences_join_leave_and_outgrow_their_caches(
    name: str, graphs: Any, whole: Any, captured: list[Any], request: pytest.FixtureRequest
) -> None:
    directory, cpu = graphs[name]
    manifest = Manifest.load(directory)
    capacities = cache_capacities(LIMITS, manifest.prompt.passage_length)
    decoder = whole.WholeDecoder(directory, manifest, loader(directory), LIMITS.slots, capacities)
    reference = OnnxDecoder(cpu, Manifest.load(cpu), LIMITS.slots)
    rng = np.random.default_rng(1)
    positions = np.zeros(3, np.int32)

    def admit(slot: int, running: int, length: int) -> None:
        hidden = rng.standard_normal((length, manifest.sizes.d_model_encoder)).astype(np.float32)
        places = np.sort(rng.choice(144, length, replace=False)).astype(np.int32)
        decoder.admit(slot, running, sys.modules["cupy"].asarray(hidden.astype(np.float16)), places)
        reference.admit(slot, running, hidden, places)
        positions[slot] = 0

    def step(batch: int) -> None:
        tokens = rng.integers(1, 97, batch).astype(np.int32)
        penalty = np.where(rng.random(batch) < 0.5, -1e4, 0).astype(np.float32)
        found = decoder.step(tokens, positions[:batch].copy(), penalty)
        wanted = reference.step(tokens, positions[:batch].copy(), penalty)
        np.testing.assert_allclose(found[1], wanted[1], atol=3e-2)
        near_tie = found[0] != wanted[0]
        assert near_tie.mean() <= 1 / 3, "half precision decides a near tie, not most tokens"
        for row in np.flatnonzero(positions[:batch] == 0):
            length = decoder._lengths[row]
            np.testing.assert_allclose(found[2][row, :length], wanted[2][row, :length], atol=2e-2)
        positions[:batch] += 1

    admit(0, 0, 20)
    for _ in range(5):
        step(1)
    admit(1, 1, 100)  # longer than the caches are
    for _ in range(14):  # the first sequence outgrows 16 tokens
        step(2)
    admit(2, 2, 7)
    step(3)
    decoder.move(2, 0)
    reference.move(2, 0)
    positions[0] = positions[2]
    for _ in range(3):
        step(2)
    admit(0, 1, 30)  # the long one has left: the caches shrink
    step(1)
    assert decoder._cross[0].shape[2] == 64 and decoder._self.shape[3] == 16
    assert bool(captured) == request.node.callspec.id.startswith("captured")
    assert decoder.reserved_bytes() == decoder._self.nbytes + sum(cache.nbytes for cache in decoder._cross)


def test_what_a_slot_cannot_hold_is_refused_and_leaves_the_others(graphs: Any, whole: Any) -> None:
    directory, _ = graphs["fido"]
    decoder = whole.WholeDecoder(directory, Manifest.load(directory), loader(directory), 2, (64, 16))
    with pytest.raises(EngineError, match="passages of a question: wanted at most 64 tokens, which a slot holds, got 65"):
        decoder.admit(0, 0, np.zeros((65, 12), np.float16), np.arange(65))
    with pytest.raises(EngineError, match=r"position in the answer: wanted less than 16, .* got 16"):
        decoder.step(np.ones(1, np.int32), np.array([16], np.int32), np.zeros(1, np.float32))


def test_memory_for_the_largest_questions_must_be_free_at_the_start(graphs: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "memGetInfo", lambda: (1000, 2000))
    directory, _ = graphs["fido"]
    with pytest.raises(EngineError, match=r"GPU memory: wanted [\d,]+ more bytes for 2 slots, got 1,000 free bytes"):
        whole.WholeDecoder(directory, Manifest.load(directory), loader(directory), 2, (64, 16))


def test_its_engines_cover_the_limits_and_no_more_is_needed(graphs: Any) -> None:
    manifest = Manifest.load(graphs["fido"][0])
    assert manifest.is_whole and not Manifest.load(graphs["fido"][1]).is_whole
    tasks = {task.name: task for task in tasks_of(manifest, LIMITS)}
    assert list(tasks) == ["encoder", "cross_kv", "decoder_step"]
    profile = tasks["decoder_step"].profiles[0]
    encoded, generated = cache_capacities(LIMITS, manifest.prompt.passage_length)
    assert profile["past_key_values.0.decoder.key"][2] == (3, 1, generated, 3)
    assert profile["past_key_values.1.encoder.value"][2] == (3, 1, encoded, 3)
    from export.tensorrt.compiler import graphs_of

    tensors = graphs_of(manifest)["decoder_step"]
    require_covered("x.plan", "decoder_step", tensors, tasks["decoder_step"].profiles, LIMITS, manifest.prompt.passage_length)
    for more, said in (({"max_new_tokens": 200}, "past_length.*lower max_new_tokens"), ({"slots": 4}, "batch.*lower slots")):
        with pytest.raises(ValueError, match=f"x.plan: {said}"):
            larger = dataclasses.replace(LIMITS, **more)
            require_covered("x.plan", "decoder_step", tensors, tasks["decoder_step"].profiles, larger, manifest.prompt.passage_length)


def test_a_whole_reader_goes_into_a_repository_with_either_encoder(graphs: Any, tmp_path: Path) -> None:
    directory, _ = graphs["fido"]
    repository_from_engines(directory, tmp_path / "repository", "r", LIMITS)
    assert (tmp_path / "repository" / "r_encoder" / "1" / "encoder.onnx").is_file()
    assert {path.name for path in (tmp_path / "repository" / "r" / "1").iterdir()} >= {"cross_kv.onnx", "decoder_step.onnx", "model.py"}
    assert json.loads((tmp_path / "repository" / "r" / "1" / "manifest.json").read_text())["decoder"] is None


def test_loading_by_the_manifest_takes_the_whole_engines(graphs: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.engines import load

    directory, _ = graphs["fido"]
    monkeypatch.setattr(load, "gpu_loader", lambda directory, *_: loader(directory))
    manifest = Manifest.load(directory)
    assert isinstance(load.load_encoder(directory, manifest, LIMITS), whole.WholeEncoder)
    assert isinstance(load.load_decoder(directory, manifest, LIMITS), whole.WholeDecoder)
