"""`python -m perf.peers.onnxruntime_engines`: the same readers' exported graphs on ONNX Runtime, as peers.

In: the graphs of fid and fido, fp32 for the CPU or fp16 for the CUDA provider, and a workload with random token ids. Out: questions per
second and latency of one batch of questions at a time, as rows of peers.json; they replace rows of the same name and keep all others.

Times run from token ids on the host to token ids on the host: encoder call, keys and values, and greedy decoding. They exclude Triton, the
scheduler, tokenization, the network, and a first pass over all requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo import ENGINES
from fido_client.metrics import percentile
from perf.bounds.machine import describe
from perf.bounds.statistics import publish, spread
from perf.served.workload import WORKLOADS, WorkloadSpec, random_token_ids, uniform
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.base import Decoder, Encoder, Packer
from serving.engines.load import load_decoder, load_encoder, load_packer
from serving.pipeline.scheduler import EOS_FORBIDDEN

READERS = ("fid", "fido")
EXCLUDES = "tokenization, network, Triton"
NAMES = {"onnxruntime": "ONNX Runtime, CPU", "openvino": "OpenVINO", "onnxruntime-gpu": "ONNX Runtime, CUDA", "tensorrt": "TensorRT"}

Passages = tuple[np.ndarray, np.ndarray]  # input_ids and attention_mask, each int32[n_passages, passage_length]


@dataclasses.dataclass(frozen=True)
class EnginePeer:
    """A reader's engines, run without a scheduler."""

    reader: str
    manifest: Manifest
    encoder: Encoder
    decoder: Decoder
    packer: Packer

    @property
    def name(self) -> str:
        """The peer's name in tables."""
        return f"the same graphs, {NAMES[self.manifest.engine]}, {self.manifest.precision}"

    def answer(self, questions: Sequence[Passages], new_tokens: int) -> list[list[int]]:
        """Token ids of each question's answer, `new_tokens` each.

        Args:
            questions: at most as many as the decoder has slots.
            new_tokens: length of every answer; the end token counts like any other.
        """
        for slot, (states, (_, mask)) in enumerate(zip(self.encoder.encode(list(questions)), questions, strict=True)):
            places = np.flatnonzero(mask).astype(np.int32)  # matter only to a relative bias in cross-attention, which these readers lack
            self.decoder.admit(slot, slot, self.packer.pack(states, mask), places)
        tokens = np.full(len(questions), self.manifest.decoder_start_token_id, np.int32)
        found = []
        for position in range(new_tokens):
            penalty = np.full(len(questions), EOS_FORBIDDEN if position < new_tokens - 1 else 0.0, np.float32)
            tokens, _, _ = self.decoder.step(tokens, np.full(len(questions), position, np.int32), penalty)
            found.append(tokens)
        return np.array(found).T.tolist()


def measure(
    peers: Sequence[EnginePeer], questions: Sequence[Passages], batches: Sequence[int], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One row for each peer and batch; every round runs all of them in turn, and one uncounted round comes first."""
    walls: dict[tuple[int, int], list[float]] = {(peer, batch): [] for batch in batches for peer in range(len(peers))}
    latencies: dict[tuple[int, int], list[float]] = {row: [] for row in walls}
    for number in range(rounds + 1):
        for (peer, batch), taken in walls.items():
            seconds = []
            for start in range(0, len(questions), batch):
                started = time.perf_counter()
                peers[peer].answer(questions[start : start + batch], new_tokens)
                seconds.append(time.perf_counter() - started)
            if number:
                taken.append(sum(seconds))
                latencies[peer, batch].append(percentile(seconds, 50) * 1e3)
    return [
        {
            "name": peers[peer].name,
            "reader": peers[peer].reader,
            "batch": batch,
            "questions_per_s": spread([len(questions) / wall for wall in taken]),
            "p50_ms": spread(latencies[peer, batch]),
        }
        for (peer, batch), taken in walls.items()
    ]


def merged(out: Path | None, rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The content of `out` with `rows` added or replaced."""
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {"peers": [], "settings": {}}
    replaced = {(row["name"], row["reader"], row["batch"]) for row in rows}
    kept = [row for row in before["peers"] if (row["name"], row["reader"], row.get("batch")) not in replaced]
    return {"peers": kept + rows, "settings": before["settings"] | {f"engines, {settings['engine']}": settings}}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the rows; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.peers.onnxruntime_engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for reader in READERS:
        parser.add_argument(f"--{reader}", type=Path, default=ENGINES / reader, help="folder of its graphs or engines")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="paper")
    for field in dataclasses.fields(WorkloadSpec):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=uniform, metavar="N[..N]", help="replaces the workload's own")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="questions answered together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="peers.json")
    arguments = parser.parse_args(argv)
    given = {f.name: value for f in dataclasses.fields(WorkloadSpec) if (value := getattr(arguments, f.name))}
    spec = dataclasses.replace(WORKLOADS[arguments.workload], **given)
    if spec.new_tokens.low != spec.new_tokens.high or any(arguments.requests % batch for batch in arguments.batches):
        parser.error("--new-tokens, --requests: wanted one answer length, and a multiple of every batch size, so that all batches are full")
    batch = max(arguments.batches)
    limits = Limits(slots=batch, max_passages=spec.passages.high, encoder_batch=batch * spec.passages.high)
    peers = []
    for reader in READERS:
        directory = getattr(arguments, reader)
        manifest = Manifest.load(directory)
        engines = load_encoder(directory, manifest, limits), load_decoder(directory, manifest, limits), load_packer(directory, manifest)
        peers.append(EnginePeer(reader, manifest, *engines))
    drawn = random_token_ids(spec, arguments.requests, arguments.seed, peers[0].manifest.sizes.vocab_size)
    questions = [(ids, mask) for ids, mask, _ in drawn]
    lengths = [int(n) for _, mask in questions for n in mask.sum(1)]
    common = {
        "new_tokens": spec.new_tokens.high,
        "passages": spec.passages.high if spec.passages.low == spec.passages.high else str(spec.passages),
        "passage_tokens": max(lengths) if min(lengths) == max(lengths) else f"{min(lengths)}..{max(lengths)}",
        "excludes": EXCLUDES,
    }
    rows = measure(peers, questions, arguments.batches, spec.new_tokens.high, arguments.rounds)
    settings = {
        "engine": peers[0].manifest.engine,
        "requests": len(questions),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "machine": describe(),
    }
    publish(merged(arguments.out, [row | common for row in rows], settings), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
