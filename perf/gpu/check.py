"""`make gpu-check`: does this machine's GPU serve? One screen: card, driver, TensorRT, Triton, engines, parity, answers and speed.

In: the demo readers, exported for this machine and in fp32 for its CPU. Out: a line per check with ok or FAILED and what to do, and the
same as JSON. A check that fails does not stop the others. With `--engine onnxruntime` everything but the GPU is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clients.evaluation import Prediction, evaluate
from clients.examples import Example, read_examples
from clients.reader_client import ReaderClient
from export.build import GRAPHS, build_reader
from export.repository import repository_from_engines
from export.tensorrt.detect import cuda_gpu, default_backend
from serving.contract.limits import Limits
from serving.contract.versions import SAFE_FROM, compiler_of, dotted
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.in_process import Generated, InProcessReader

READERS = {"fid": "checkpoints/fid", "fido": "checkpoints/fido"}
HELDOUT = Path("build/corpus/heldout.jsonl")
# Half precision may decide a near tie otherwise: 1 of 10,000 held-out questions on an H100. A wrong engine differs in most answers.
PARITY_PERCENT = 97.0
LOG_PROB = 0.05  # largest difference of a token's log-probability, in answers of equal tokens; 0.02 was the largest on an H100
CONCURRENCY = 16


class CheckError(RuntimeError):
    """What is wrong, and what to do."""


@dataclasses.dataclass
class Screen:
    """The checks' outcomes: printed as they come, and kept.

    Attributes:
        rows: name, whether it is well, and what was found, of each check.
    """

    rows: list[tuple[str, bool, str]] = dataclasses.field(default_factory=list)

    def check(self, name: str, find: Callable[[], str]) -> bool:
        """Run one check and print its line; every error is a failed check."""
        try:
            ok, found = True, find()
        except Exception as error:  # a check must not end the others, whatever a driver raises
            ok, found = False, f"{error if isinstance(error, CheckError) else f'{type(error).__name__}: {error}'}"
        self.rows.append((name, ok, found))
        print(f"{name:12} {'ok    ' if ok else 'FAILED'} {found}", flush=True)
        return ok

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, ok, _ in self.rows if not ok]


def card() -> str:
    """The GPU and its driver."""
    gpu = cuda_gpu()
    if gpu is None:
        raise CheckError("no NVIDIA GPU or no driver; nvidia-smi must list a card, and a container needs --gpus all")
    return f"{gpu.name}, compute capability {gpu.compute_capability}, driver for CUDA {gpu.driver}"


def packages() -> str:
    """CuPy and TensorRT, and whether they fit."""
    try:
        cupy, tensorrt = importlib.import_module("cupy"), importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise CheckError(f"{error}; pip install -r requirements-gpu.txt (docs/gpu.md)") from error
    family = compiler_of(tensorrt.__version__)
    if family is None:
        raise CheckError(f"TensorRT {tensorrt.__version__} is none of those in docs/gpu.md")
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return f"TensorRT {tensorrt.__version__} ({family.state}), CuPy {cupy.__version__} for CUDA {runtime // 1000}.{runtime % 1000 // 10}"


def engines(checkpoint: str, directory: Path, engine: str, graphs: str = GRAPHS[0]) -> str:
    """Engines of a demo reader, built for this machine."""
    started = time.perf_counter()
    manifest = build_reader(checkpoint, directory, engine, Limits(), graphs=graphs, log=lambda _: None)
    manifest.verify(directory, tuple(manifest.files))
    megabytes = sum((directory / file).stat().st_size for file in manifest.files) / 1e6
    build = "" if manifest.build is None else f", TensorRT {manifest.build.version} for {manifest.build.gpu}"
    return f"{manifest.engine} {manifest.precision}{build}: {megabytes:.0f} MB in {time.perf_counter() - started:.0f} s"


def texts(example: Example) -> tuple[list[str], list[str]]:
    """Passages and titles."""
    return [c.text for c in example.contexts], [c.title or "" for c in example.contexts]


def answers(directory: Path, examples: Sequence[Example]) -> list[Generated]:
    """Of the engines in a directory, without Triton."""
    with InProcessReader(directory) as reader, ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(lambda e: reader.answer(e.question, *texts(e)), examples))


def parity(directory: Path, wanted: Sequence[Generated], examples: Sequence[Example]) -> str:
    """The engines' answers against those of fp32 on the CPU."""
    found = answers(directory, examples)
    same = [(w, f) for w, f in zip(wanted, found, strict=True) if w.tokens == f.tokens]
    percent = 100 * len(same) / len(examples)
    worst = max((abs(a - b) for w, f in same for a, b in zip(w.log_probs, f.log_probs, strict=True)), default=float("inf"))
    said = f"{len(same)} of {len(examples)} answers as fp32 on the CPU, log-probabilities within {worst:.4f}"
    if percent < PARITY_PERCENT or not worst < LOG_PROB:
        raise CheckError(f"{said}; wanted {PARITY_PERCENT:.0f}% and {LOG_PROB}: these engines must not serve")
    return said


def served(name: str, directory: Path, wanted: Sequence[Generated], examples: Sequence[Example], log: Path) -> str:
    """The reader in Triton: right answers, and how many a second."""
    got: list[Prediction] = []
    with tempfile.TemporaryDirectory() as scratch:
        repository_from_engines(directory, Path(scratch), name, Limits())
        with TritonServer(models_of([name], stream=False), Path(scratch), log=log) as server:
            triton = dotted(server.triton or ())
            note = f" (older than {dotted(SAFE_FROM)}: trusted clients only)" if server.triton and server.triton < SAFE_FROM else ""
            with ReaderClient(server.grpc_url, name) as client:
                run = evaluate(client, examples, concurrency=CONCURRENCY, warmup=len(examples) // 4, on_prediction=got.append)
    same = sum(p.answer is not None and p.answer.text == w.text for p, w in zip(got, wanted, strict=True))
    said = f"Triton {triton}{note}: EM {run.em or 0:.1f}, {same} of {len(examples)} as fp32, "
    said += f"{run.questions_per_s or 0:.0f} questions/s, {CONCURRENCY} in flight"
    if run.failed or 100 * same / len(examples) < PARITY_PERCENT:
        raise CheckError(f"{said}; {run.failed} without an answer; see {log}")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; 0 if none failed."""
    parser = argparse.ArgumentParser(prog="python -m perf.gpu.check", description=__doc__)
    parser.add_argument("--engine", default="auto", help="default: the fastest that this machine can run")
    parser.add_argument("--graphs", choices=GRAPHS, default=GRAPHS[0], help="of the engines on the GPU (default: %(default)s)")
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--questions", type=int, default=200, help="held-out questions (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=HELDOUT, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("build/gpu-check"), help="engines, log and result (default: %(default)s)")
    arguments = parser.parse_args(argv)
    screen, folder = Screen(), arguments.folder
    engine = default_backend() if arguments.engine == "auto" else arguments.engine
    on_gpu = screen.check("card", card)
    fitting = screen.check("packages", packages)
    examples = list(read_examples(arguments.data, limit=arguments.questions))
    for name in arguments.readers:
        directory, reference = folder / name, folder / f"{name}.fp32"
        if not screen.check(f"{name} engines", lambda: engines(READERS[name], directory, engine, arguments.graphs)):  # noqa: B023  called at once
            continue
        build_reader(READERS[name], reference, "onnxruntime", Limits(), log=lambda _: None)
        wanted = answers(reference, examples)
        screen.check(f"{name} parity", lambda: parity(directory, wanted, examples))  # noqa: B023
        screen.check(f"{name} served", lambda: served(name, directory, wanted, examples, folder / "tritonserver.log"))  # noqa: B023
    result: dict[str, Any] = {"engine": engine, "python": platform.python_version(), "system": platform.platform()}
    result["checks"] = [{"name": name, "ok": ok, "found": found} for name, ok, found in screen.rows]
    (folder / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not screen.failed:
        print(f"gpu-check: all {len(screen.rows)} checks passed")
        return 0
    print(f"gpu-check: {len(screen.failed)} of {len(screen.rows)} checks FAILED: {', '.join(screen.failed)}")
    if on_gpu and fitting:
        print(f"Report this screen with {folder}/gpu-check.json and {folder}/tritonserver.log")
    return 1


if __name__ == "__main__":
    sys.exit(main())
