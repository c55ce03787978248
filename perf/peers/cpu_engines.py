"""`python -m perf.peers.cpu_engines`: a base-sized FiD reader on a CPU, by every engine and precision, beside PyTorch, eager and compiled.

The encoder alone, on 8 passages of 256 tokens, and whole questions, one at a time: in this process from token ids to token ids, and served,
from text to text through Triton and gRPC on loopback. Every round runs all of them in turn, so that a busy machine slows all alike; a gain
is the median over rounds of the ratio within one. Weights are random: times do not depend on them. Excluded: loading and a first round; of
the ways in this process also Triton, tokenization and the network. Writes perf/results/cpu/cpu_engines.json.

On an idle machine, with two of its cores: `python -m perf.peers.cpu_engines --threads 2`. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from export.build import export_graphs, random_checkpoint
from export.graphs.openvino import for_openvino
from export.manifest_writer import atomic_directory
from export.repository import repository_from_engines
from fido_client.reader_client import ReaderClient
from perf.bounds.machine import describe
from perf.bounds.statistics import publish, spread
from perf.peers.onnxruntime_engines import EnginePeer
from perf.peers.transformers_fid import FusionPeer, hugging_face_fid
from perf.served.workload import RequestMaker, Uniform, WorkloadSpec
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, require_bf16
from serving.engines.load import load_decoder, load_encoder, load_packer
from serving.launcher.server import TritonServer, models_of

RESULT, ENGINES = Path("perf/results/cpu/cpu_engines.json"), Path("build/cpu_engines_base")
TOKENIZER, SAMPLES = Path("checkpoints/fid/tokenizer.json"), Path("examples/demo_questions.jsonl")
PASSAGES, LENGTH = 8, 256
BASELINE = "fp32"  # ONNX Runtime, what is served where nothing else is asked for


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the reader."""

    answer: Callable[[], Any]
    encode: Callable[[], Any] | None = None


def engine_ways(directory: Path, threads: int, new_tokens: int, question: tuple[np.ndarray, np.ndarray]) -> dict[str, Way]:
    """ONNX Runtime in fp32, and OpenVINO in each precision that this machine has."""
    found = {}
    for name, variant in engines(directory).items():
        manifest, limits = Manifest.load(variant), Limits(intra_op_threads=threads, slots=1)
        loaded = load_encoder(variant, manifest, limits), load_decoder(variant, manifest, limits), load_packer(variant, manifest)
        peer = EnginePeer("fid", manifest, *loaded)
        encode = functools.partial(peer.encoder.encode, [question])
        found[name] = Way(functools.partial(peer.answer, [question], new_tokens), encode)
    return found


def engines(directory: Path) -> dict[str, Path]:
    """Engine directories by name; made where they are missing."""
    plain = directory / BASELINE
    if not plain.is_dir():
        checkpoint = random_checkpoint("base", TOKENIZER, fido=False, period=None, num_kv_heads=None, passage_length=LENGTH, seed=0)
        export_graphs(checkpoint, plain, gpu=False)
    wanted = {BASELINE: ""}
    if importlib.util.find_spec("openvino") is not None:
        wanted |= {"openvino_fp32": "float32", "bf16": "bfloat16"}
        wanted |= {"int8": "int8"} if importlib.util.find_spec("nncf") is not None else {}
    try:
        require_bf16("here")
    except EngineError as error:
        wanted.pop("bf16", None)
        print(f"left out: {error}", file=sys.stderr)
    for name, precision in wanted.items():
        if not (directory / name).is_dir():
            manifest = Manifest.load(plain)
            with atomic_directory(directory / name) as tmp_dir:
                for file in manifest.files:
                    os.link(plain / file, tmp_dir / file)
                for_openvino(tmp_dir, manifest, precision, SAMPLES)
    return {name: directory / name for name in wanted}


@contextlib.contextmanager
def served_ways(directory: Path, threads: int, new_tokens: int) -> Iterator[dict[str, Way]]:
    """The same engines behind one tritonserver, a reader each; a question is text, with passages of the same lengths."""
    limits = Limits(max_passages=PASSAGES, max_new_tokens=new_tokens, default_max_new_tokens=new_tokens, slots=1, intra_op_threads=threads)
    variants = {f"served_{name}": path for name, path in engines(directory).items() if name != "openvino_fp32"}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as clients:
        for name, path in variants.items():
            repository_from_engines(path, Path(scratch), name, limits)
        server = clients.enter_context(TritonServer(models_of(list(variants), stream=False), Path(scratch), start_timeout_s=300))
        manifest = Manifest.load(directory / BASELINE)
        maker = RequestMaker(Tokenizer.from_file(str(TOKENIZER)), manifest)
        spec = WorkloadSpec(Uniform(PASSAGES, PASSAGES), Uniform(LENGTH, LENGTH), Uniform(new_tokens, new_tokens))
        (asked,) = maker.make(spec, 1, seed=0)
        found = {}
        for name in variants:
            client = clients.enter_context(ReaderClient(server.grpc_url, name))
            answer = functools.partial(client.answer, asked.question, asked.passages, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            found[name] = Way(answer)
        yield found


def torch_ways(new_tokens: int, question: tuple[np.ndarray, np.ndarray], compiled: bool) -> dict[str, Way]:
    """The T5 of transformers and its `generate`, fp32 and bf16, eager and compiled; FiD's fusion is ours (transformers_fid.py)."""
    ids, mask = (torch.from_numpy(array.astype(np.int64)) for array in question)
    found = {}
    for name, dtype in (("pytorch_fp32", torch.float32), ("pytorch_bf16", torch.bfloat16)):
        checkpoint = random_checkpoint("base", TOKENIZER, fido=False, period=None, num_kv_heads=None, passage_length=LENGTH, seed=0)
        model = hugging_face_fid(checkpoint.reader).to(dtype)
        for is_compiled in (False, True) if compiled else (False,):
            peer = FusionPeer(model, compiled=is_compiled)
            encode = torch.inference_mode()(functools.partial(peer.encode, [(ids, mask)]))
            found[name + "_compiled" * is_compiled] = Way(functools.partial(peer.answer, [(ids, mask)], new_tokens, new_tokens), encode)
        del checkpoint
        gc.collect()
    return found


def measure(ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Encoder and questions of every way, `rounds` times in turn after one uncounted round."""
    encoders = [name for name, way in ways.items() if way.encode]
    taken: dict[str, dict[str, list[float]]] = {"encode": {name: [] for name in encoders}, "answer": {name: [] for name in ways}}
    worked: dict[str, list[float]] = {name: [] for name in encoders}
    for round_ in range(rounds + 1):
        for part, by_name in taken.items():
            for name in by_name:
                started, used = time.perf_counter(), time.process_time()
                getattr(ways[name], part)()
                if round_:
                    by_name[name].append(time.perf_counter() - started)
                if round_ and part == "encode":
                    worked[name].append(time.process_time() - used)

    def gain(part: str, name: str, over: str) -> float | None:
        pairs = zip(taken[part].get(over, []), taken[part].get(name, []), strict=False)
        return round(statistics.median(slow / fast for slow, fast in pairs), 2) if over in ways else None

    return {
        # time of all threads, which other processes lengthen less than the clock's; a thread that spins while it waits counts
        "encoder_processor_ms": {name: spread([s * 1e3 for s in seconds], 1) for name, seconds in worked.items()},
        "encoder_ms": {name: spread([s * 1e3 for s in seconds], 1) for name, seconds in taken["encode"].items()},
        "fid_questions_per_s": {name: spread([1 / s for s in seconds]) for name, seconds in taken["answer"].items()},
        "encoder_gain": {name: gain("encode", name, BASELINE) for name in encoders},
        "fid_gain_over_pytorch_bf16": {name: gain("answer", name, "pytorch_bf16") for name in ways},
        "fid_gain_over_compiled_pytorch_bf16": {name: gain("answer", name, "pytorch_bf16_compiled") for name in ways},
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.peers.cpu_engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="cores used, the first of this process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--engines", type=Path, default=ENGINES, help="where they are kept (default: %(default)s)")
    parser.add_argument("--no-torch", action="store_true", help="without PyTorch's rows")
    parser.add_argument("--no-compile", action="store_true", help="without compiled PyTorch, which takes minutes to compile")
    parser.add_argument("--no-server", action="store_true", help="without the rows through Triton")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    ids = np.random.default_rng(0).integers(3, 32128, (PASSAGES, LENGTH)).astype(np.int32)
    question = (ids, np.ones_like(ids))
    before = os.getloadavg()
    ways = engine_ways(arguments.engines, arguments.threads, arguments.new_tokens, question)
    ways |= {} if arguments.no_torch else torch_ways(arguments.new_tokens, question, not arguments.no_compile)
    with contextlib.ExitStack() as served:
        if not arguments.no_server:
            ways |= served.enter_context(served_ways(arguments.engines, arguments.threads, arguments.new_tokens))
        result = measure(ways, arguments.rounds)
    settings = {"passages": PASSAGES, "passage_tokens": LENGTH, "new_tokens": arguments.new_tokens, "rounds": arguments.rounds}
    load = {"before": round(before[0], 2), "after": round(os.getloadavg()[0], 2)}
    publish(result | {"settings": settings | {"threads": arguments.threads, "load_average": load, "machine": describe()}}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
