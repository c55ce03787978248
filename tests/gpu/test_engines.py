"""Each stage on the GPU against the one before it: engine = ONNX per output, decoder and encoder = fp32 on the CPU, n = n times one."""

from __future__ import annotations

import threading

import numpy as np
import pytest

cp = pytest.importorskip("cupy")

import onnxruntime as ort  # noqa: E402

from export.tensorrt.compiler import graphs_of  # noqa: E402
from serving.contract.manifest import FLOAT8  # noqa: E402
from serving.engines.cpu import OnnxDecoder  # noqa: E402
from serving.engines.gpu.encoder import GpuEncoder  # noqa: E402
from serving.engines.gpu.engine import Scratch  # noqa: E402
from serving.engines.load import gpu_loader, load_decoder, load_encoder, load_packer  # noqa: E402
from serving.engines.whole import WholeEncoder  # noqa: E402
from serving.pipeline.scheduler import CancelledError, DecodeSequence, Scheduler  # noqa: E402
from tests.gpu.conftest import GpuReader  # noqa: E402

pytestmark = pytest.mark.gpu
STEPS = 12
# Largest differences that fp16 explains: relative to the largest number of the output, and of a log-probability.
RELATIVE, LOG_PROB = 1e-2, 2e-2
FP8_RELATIVE = 1e-1  # of the encoder in FP8
# Of a decoder whose cross-attention reads FP8: forced on beyond the end of an answer it is unsure, so that roundings show.
FP8_LOG_PROB, FP8_EVIDENCE = 8e-1, 1e-1


def report(record_property, what: str, value: float) -> None:
    record_property(what, float(f"{value:.3g}"))
    print(f"{what}: {value:.3g}")


def test_every_engine_equals_its_graph(gpu_reader: GpuReader, record_property) -> None:
    """The same half-precision graph by TensorRT and by ONNX Runtime's CPU provider."""
    rng = np.random.default_rng(0)
    manifest = gpu_reader.manifest
    load = gpu_loader(gpu_reader.engines, manifest, gpu_reader.limits, 0)
    lengths = {"encoder_sequence_length": 300, "tokens": 300, "batch": gpu_reader.limits.slots}
    lengths |= {"passages": 3, "passage_length": 40, "past_length": 20}  # of whole graphs
    for name, tensors in graphs_of(manifest).items():
        values = {}
        for spec in tensors.inputs:
            shape = spec.shape(lengths)  # of a whole graph, an integer is a token, a mask, a length or a position
            values[spec.name] = np.ones(shape, np.int32) if spec.dtype == "int32" else rng.standard_normal(shape).astype(spec.dtype)
        wanted = ort.InferenceSession(str(gpu_reader.graphs / f"{name}.onnx")).run(None, values)
        stream = cp.cuda.Stream(non_blocking=True)
        with stream:
            inputs = {key: cp.asarray(value) for key, value in values.items()}
            outputs = {
                spec.name: cp.full(spec.shape(lengths), -1 if spec.dtype == "int32" else cp.nan, spec.dtype) for spec in tensors.outputs
            }
            load(name, tensors, Scratch()).bind(inputs, outputs).enqueue(stream)
            stream.synchronize()
        for spec, want in zip(tensors.outputs, wanted, strict=True):
            if spec.dtype == "int32":  # the likeliest token of random states is a near tie
                continue
            got = outputs[spec.name].get().astype(np.float64)
            assert np.isfinite(got).all(), (name, spec.name)
            error = np.abs(got - want).max() / np.abs(want).max()
            report(record_property, f"{gpu_reader.name} {name} {spec.name}", error)
            assert error < RELATIVE, (name, spec.name, error)


def test_encoder_equals_fp32(gpu_reader: GpuReader, record_property) -> None:
    encoder = load_encoder(gpu_reader.engines, gpu_reader.manifest, gpu_reader.limits)
    together = encoder.encode(gpu_reader.inputs)
    worst = 0.0
    for (ids, mask), (wanted, _), joint in zip(gpu_reader.inputs, gpu_reader.states, together, strict=True):
        (alone,) = encoder.encode([(ids, mask)])
        for found in (joint.get(), alone.get()):
            assert not found[mask == 0].any()
            worst = max(worst, float(np.abs(found[mask.astype(bool)].astype(np.float32) - wanted).max() / np.abs(wanted).max()))
    report(record_property, f"{gpu_reader.name} encoder against fp32", worst)
    library = gpu_reader.manifest.encoder_library
    assert worst < (FP8_RELATIVE if library is not None and library.precision == "float8" else RELATIVE)
    if gpu_reader.manifest.is_whole:
        assert isinstance(encoder, WholeEncoder)
        return
    assert isinstance(encoder, GpuEncoder)
    assert bool(encoder._captured) == (library is not None or gpu_reader.manifest.engine == "tensorrt")
    captured = [encoder.encode([passages])[0].get() for passages in gpu_reader.inputs]
    encoder._captured.clear()
    for passages, found in zip(gpu_reader.inputs, captured, strict=True):  # tiles may be cut otherwise: nearly the same bits
        np.testing.assert_allclose(found, encoder.encode([passages])[0].get(), atol=2e-3 * np.abs(found).max())


@pytest.mark.parametrize("gemms", ["by kernels", "by engines"])
def test_decoder_equals_fp32(gemms: str, gpu_reader: GpuReader, record_property, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher-forced with fp32's tokens, so that a tie does not end the comparison; slots are admitted out of order and moved."""
    if gemms == "by engines":
        monkeypatch.setattr("serving.engines.gpu.decoder.SkinnyGemm", lambda: None)
    states = gpu_reader.states[:6]
    gpu = load_decoder(gpu_reader.engines, gpu_reader.manifest, gpu_reader.limits)
    packer = load_packer(gpu_reader.engines, gpu_reader.manifest)
    cpu = OnnxDecoder(gpu_reader.cpu, gpu_reader.cpu_manifest, len(states) + 1)
    for decoder in (gpu, cpu):
        for slot, (hidden, token_positions) in enumerate(states):
            packed = hidden if decoder is cpu else packer.pack(hidden.astype(np.float16)[None], np.ones((1, len(hidden)), np.int32))
            decoder.admit(slot, slot, packed, token_positions)
    tokens, penalty = np.zeros(len(states), np.int32), np.full(len(states), -1e9, np.float32)
    worst_log_prob = worst_evidence = 0.0
    for position in range(STEPS):
        if position == 3:  # the last answer takes the second's place
            for decoder in (gpu, cpu):
                decoder.move(len(states) - 1, 1)
            tokens, penalty = np.concatenate([tokens[:1], tokens[-1:], tokens[2:-1]]), penalty[:-1]
        at = np.full(len(tokens), position, np.int32)
        wanted, found = cpu.step(tokens, at, penalty), gpu.step(tokens, at, penalty)
        worst_log_prob = max(worst_log_prob, float(np.abs(wanted[1] - found[1]).max()))
        close = wanted[0] == found[0]
        assert close.mean() > 0.7, (position, wanted[0], found[0])
        if position == 0:
            for row, (hidden, _) in enumerate(states):
                error = np.abs(wanted[2][row, : len(hidden)] - found[2][row, : len(hidden)]).max()
                worst_evidence = max(worst_evidence, float(error))
        tokens = wanted[0]
    report(record_property, f"{gpu_reader.name} log_prob against fp32, gemms {gemms}", worst_log_prob)
    report(record_property, f"{gpu_reader.name} cross_attention against fp32, gemms {gemms}", worst_evidence)
    fp8 = gpu_reader.manifest.cross_kv_precision == FLOAT8
    assert worst_log_prob < (FP8_LOG_PROB if fp8 else LOG_PROB) and worst_evidence < (FP8_EVIDENCE if fp8 else RELATIVE)


def test_batch_of_n_equals_n_times_one(gpu_reader: GpuReader) -> None:
    """Answers in flight, arriving and leaving at random, are token for token those of each question alone."""
    rng = np.random.default_rng(3)
    decoder = load_decoder(gpu_reader.engines, gpu_reader.manifest, gpu_reader.limits)
    packer = load_packer(gpu_reader.engines, gpu_reader.manifest)
    packed = [
        (packer.pack(hidden.astype(np.float16)[None], np.ones((1, len(hidden)), np.int32)), token_positions)
        for hidden, token_positions in gpu_reader.states
    ]
    loop = Scheduler(decoder, start_token=0, eos_token=1, max_waiting=1000)

    def ask(i: int, max_new_tokens: int, cancel_at: int | None = None) -> tuple[list[int], threading.Event]:
        tokens: list[int] = []
        done = threading.Event()
        cancel_reason = (lambda: CancelledError("enough") if len(tokens) >= cancel_at else None) if cancel_at else (lambda: None)
        loop.submit(
            DecodeSequence(
                *packed[i], max_new_tokens, 0, lambda token, _: tokens.append(token), lambda _: done.set(), cancel_reason=cancel_reason
            )
        )
        return tokens, done

    try:
        alone = []
        for i in range(len(packed)):
            tokens, done = ask(i, 24)
            assert done.wait(30)
            alone.append(tokens)
        running = []
        for _ in range(300):
            i, max_new_tokens = int(rng.integers(len(packed))), int(rng.integers(1, 25))
            cancel_at = int(rng.integers(1, 6)) if rng.random() < 0.2 else None
            running.append((i, max_new_tokens, cancel_at, *ask(i, max_new_tokens, cancel_at)))
            if rng.random() < 0.3:
                running[int(rng.integers(len(running)))][4].wait(1)
        for i, max_new_tokens, cancel_at, tokens, done in running:
            assert done.wait(30)
            if cancel_at is None:
                assert tokens == alone[i][:max_new_tokens]
            else:
                assert tokens == alone[i][: len(tokens)]
    finally:
        loop.stop()
