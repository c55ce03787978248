"""`make bench`: Triton's overhead, the engines' gain over PyTorch, and FiDO's gain in the decoder, on this machine in one run.

The same held-out questions are answered with the same weights in three alternating ways: through Triton (gRPC on loopback), by the same
engines and scheduler in this process, and by eager PyTorch. At concurrency 8 the first two batch in flight; PyTorch takes batches of 8.
Times are of complete questions with tokenization, without start-up and the first questions of each run. A second part measures the decoder
step of the base preset with random weights. Writes perf/results/cpu/chain.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.demo import ENGINES, REPOSITORY
from export.checkpoint.config import reader_preset
from export.checkpoint.files import load_reader
from export.graphs.cpu import CrossKVGraph, DecoderStepGraph, engine_sizes
from export.graphs.onnx_export import GRAPHS, onnx_from_module
from export.model.reader import Reader
from fido_client.data.examples import Example, read_examples
from fido_client.metrics import percentile
from fido_client.reader_client import ReaderClient
from perf.bounds.machine import describe, peak_memory_bytes
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, Prompt, sha256_of_file
from serving.engines.cpu import OnnxDecoder
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.in_process import InProcessReader
from serving.pipeline.prompt import EncoderInput

# The peer in eager PyTorch: a batch of questions with a key/value cache, padded as in facebookresearch/FiD.
#
# It runs the export's modules (encoder, cross_kv and decoder_step) in torch, so that runtimes are compared, not implementations.


class TorchReader:
    """Greedy answers of a batch; the batch runs until its last answer ends."""

    def __init__(self, reader: Reader, max_new_tokens: int):
        self._reader, self._max_new_tokens = reader, max_new_tokens
        self._cross_kv, self._step = CrossKVGraph(reader).eval(), DecoderStepGraph(reader).eval()

    @torch.inference_mode()
    def answer(self, questions: Sequence[EncoderInput]) -> list[list[int]]:
        """Token ids of each question's answer, the end token included."""
        config, batch = self._reader.config, len(questions)
        shape = (batch, max(len(q.input_ids) for q in questions), max(q.input_ids.shape[1] for q in questions))
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for i, question in enumerate(questions):
            n, length = question.input_ids.shape
            ids[i, :n, :length] = torch.from_numpy(question.input_ids)
            mask[i, :n, :length] = torch.from_numpy(question.attention_mask)
        hidden, _ = self._reader.encode(ids, mask)
        packed = [h[m.reshape(-1).bool()] for h, m in zip(hidden, mask, strict=True)]
        lengths = torch.tensor([len(p) for p in packed], dtype=torch.int32)
        cross = self._stacked([self._cross_kv(p) for p in packed])
        stack = config.decoder
        past = [torch.zeros(batch, stack.num_kv_heads, self._max_new_tokens, stack.d_kv) for _ in range(2 * stack.num_layers)]
        tokens = torch.full((batch,), config.decoder_start_token_id, dtype=torch.int32)
        answers: list[list[int]] = [[] for _ in range(batch)]
        running = [True] * batch
        for position in range(self._max_new_tokens):
            positions = torch.full((batch,), position, dtype=torch.int32)
            read = [cache[:, :, : position + 1] for cache in past]
            tokens, _, _, *present = self._step(tokens, positions, lengths, torch.zeros(batch), *read, *cross)
            for cache, new in zip(past, present, strict=True):
                cache[:, :, position] = new
            for row, token in enumerate(tokens.tolist()):
                if running[row]:
                    answers[row].append(token)
                    running[row] = token != config.eos_token_id
            if not any(running):
                break
        return answers

    @staticmethod
    def _stacked(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
        """Per tensor: float[batch, num_kv_heads, longest, d_kv], zero beyond each row's length."""
        longest = max(row[0].shape[1] for row in rows)
        stacked = []
        for tensors in zip(*rows, strict=True):
            out = torch.zeros(len(rows), tensors[0].shape[0], longest, tensors[0].shape[2])
            for i, tensor in enumerate(tensors):
                out[i, :, : tensor.shape[1]] = tensor
            stacked.append(out)
        return stacked


READERS = ("fid", "fido")
CONCURRENCIES = (1, 8)
WARMUP = 8
RESULT = Path("perf/results/cpu/chain.json")
BASE_PASSAGES, BASE_LENGTH = 40, 256  # the FiDO paper's setting

Ask = Callable[[Example], object]


def timed(ask: Ask, examples: Sequence[Example], concurrency: int) -> tuple[list[float], float]:
    """Seconds of each question, and of all of them concurrently."""

    def one(example: Example) -> float:
        started = time.perf_counter()
        ask(example)
        return time.perf_counter() - started

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(one, examples[:WARMUP]))
        started = time.perf_counter()
        seconds = list(pool.map(one, examples[WARMUP:]))
        return seconds, time.perf_counter() - started


def torch_timed(reader: TorchReader, prompts: InProcessReader, examples: Sequence[Example], batch: int) -> tuple[list[float], float]:
    """As `timed`, for PyTorch in batches of `batch` questions."""

    def answer(group: Sequence[Example]) -> None:
        reader.answer([prompts.prompt.encode(e.question, *texts(e)) for e in group])

    answer(examples[:WARMUP])
    rest = examples[WARMUP:]
    seconds = []
    for start in range(0, len(rest), batch):
        group = rest[start : start + batch]
        started = time.perf_counter()
        answer(group)
        seconds += [time.perf_counter() - started] * len(group)
    return seconds, sum(seconds[::batch]) if len(rest) % batch == 0 else sum(seconds) / batch


def texts(example: Example) -> tuple[list[str], list[str]]:
    """Passages and titles of an example."""
    return [c.text for c in example.contexts], [c.title or "" for c in example.contexts]


def ask(answerer: ReaderClient | InProcessReader, example: Example) -> object:
    """Ask the server, or the engines in this process, one example."""
    return answerer.answer(example.question, *texts(example))


def measure_chain(examples: list[Example], rounds: int) -> dict[str, Any]:
    """Measure all readers, ways and concurrencies; every round alternates between them."""
    samples: dict[tuple[str, str, int], list[tuple[list[float], float]]] = {}
    result: dict[str, Any] = {"questions_a_turn": len(examples) - WARMUP, "rounds": rounds}
    with TritonServer(models_of(READERS, stream=False), REPOSITORY) as server:
        for _ in range(rounds):
            for name in READERS:
                torch_reader = TorchReader(load_reader(f"checkpoints/{name}"), Limits().default_max_new_tokens)
                with ReaderClient(server.grpc_url, name) as client, InProcessReader(ENGINES / name) as reader:
                    for concurrency in CONCURRENCIES:
                        turns = {
                            "triton": timed(functools.partial(ask, client), examples, concurrency),
                            "in_process": timed(functools.partial(ask, reader), examples, concurrency),
                            "pytorch": torch_timed(torch_reader, reader, examples, concurrency),
                        }
                        for way, turn in turns.items():
                            samples.setdefault((name, way, concurrency), []).append(turn)
        result["peak_memory_mb"] = {name: round(peak_memory_bytes(pid) / 1e6) for name, pid in server.model_processes().items()}
    for (name, way, concurrency), taken in samples.items():
        rates = [len(seconds) / wall for seconds, wall in taken]
        result.setdefault(name, {}).setdefault(way, {})[str(concurrency)] = {
            "questions_per_s": round(statistics.median(rates), 1),
            "questions_per_s_min_max": [round(min(rates), 1), round(max(rates), 1)],
            "p50_ms": round(statistics.median(percentile(seconds, 50) for seconds, _ in taken) * 1e3, 2),
            "p99_ms": round(statistics.median(percentile(seconds, 99) for seconds, _ in taken) * 1e3, 2),
        }
    for name in READERS:
        provenance = Manifest.load(ENGINES / name).provenance
        triton, in_process, pytorch = (result[name][way] for way in ("triton", "in_process", "pytorch"))
        result[name]["export_s"] = round(sum(provenance["export_s"].values()), 1)
        result[name]["triton_latency_cost"] = round(triton["1"]["p50_ms"] / in_process["1"]["p50_ms"] - 1, 3)
        result[name]["triton_throughput_cost_at_8"] = round(1 - triton["8"]["questions_per_s"] / in_process["8"]["questions_per_s"], 3)
        result[name]["pytorch_over_triton_latency"] = round(pytorch["1"]["p50_ms"] / triton["1"]["p50_ms"], 2)
        result[name]["triton_over_pytorch_throughput_at_8"] = round(triton["8"]["questions_per_s"] / pytorch["8"]["questions_per_s"], 2)
    return result


def base_decoder(kind: str, scratch: Path, slots: int) -> OnnxDecoder:
    """The base preset's decoder with random weights; its encoder is not needed."""
    reader = Reader(reader_preset("base", fido=kind == "fido"))
    reader.reset_parameters(0)
    sizes = engine_sizes(reader.config)
    directory = scratch / kind
    directory.mkdir()
    for name in ("cross_kv", "decoder_step"):
        module_of, tensors_of = GRAPHS[name]
        onnx_from_module(module_of(reader), tensors_of(sizes), directory / f"{name}.onnx")
    files = {file.name: sha256_of_file(file) for file in directory.iterdir()}
    manifest = Manifest(kind, "onnxruntime", "float32", sizes, Prompt("{title}", BASE_LENGTH, True), 0, 1, 0, files, "", {})
    return OnnxDecoder(directory, manifest, slots)


def measure_base_step(batches: Sequence[int], steps: int) -> dict[str, Any]:
    """Step time of both base decoders, 40 x 256 valid tokens a question, alternating between them."""
    hidden = np.random.default_rng(0).standard_normal((BASE_PASSAGES * BASE_LENGTH, 768)).astype(np.float32) * 0.1
    positions = np.zeros(len(hidden), np.int32)
    found: dict[str, Any] = {"passages": BASE_PASSAGES, "passage_length": BASE_LENGTH, "steps": steps}
    with tempfile.TemporaryDirectory() as scratch:
        decoders = {kind: base_decoder(kind, Path(scratch), max(batches)) for kind in READERS}
        for batch in batches:
            seconds: dict[str, list[float]] = {kind: [] for kind in READERS}
            for decoder in decoders.values():
                for slot in range(batch):
                    decoder.admit(slot, slot, hidden, positions)
            for step in range(steps + 1):
                for kind, decoder in decoders.items():
                    started = time.perf_counter()
                    decoder.step(np.full(batch, 5, np.int32), np.full(batch, step, np.int32), np.full(batch, -1e9, np.float32))
                    if step:  # the first also allocates
                        seconds[kind].append(time.perf_counter() - started)
            fid, fido = (statistics.median(seconds[kind]) for kind in READERS)
            found[f"batch_{batch}"] = {
                "fid_step_ms": round(fid * 1e3, 1),
                "fido_step_ms": round(fido * 1e3, 1),
                "fid_over_fido": round(fid / fido, 2),
                "fid_min_max_ms": [round(min(seconds["fid"]) * 1e3, 1), round(max(seconds["fid"]) * 1e3, 1)],
                "fido_min_max_ms": [round(min(seconds["fido"]) * 1e3, 1), round(max(seconds["fido"]) * 1e3, 1)],
            }
    return found


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m perf.served.chain", description=__doc__)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="decoder steps of the base preset")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="FiD-base keeps 755 MB a question in fp32")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    examples = list(read_examples("build/corpus/heldout.jsonl", limit=arguments.questions + WARMUP))
    result: dict[str, Any] = {
        "machine": describe(),
        "excluded": "start-up, model load, first 8 questions of each turn, first step of the base preset",
    }
    result |= {"demo_readers": measure_chain(examples, arguments.rounds)}
    result |= {"base_decoder_step": measure_base_step(arguments.batches, arguments.steps)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name in READERS:
        for way in ("triton", "in_process", "pytorch"):
            for n, numbers in result["demo_readers"][name][way].items():
                print(f"{name:5} {way:11} at {n}: {numbers['questions_per_s']:7.1f} questions/s, p50 {numbers['p50_ms']:7.1f} ms")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
