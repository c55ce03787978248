"""`python -m training.bench`: tokens/s and MFU of up-training on a GPU, beside the same model in plain transformers + Trainer.

The steps are those of the uptrain command itself. Each contestant has a process of its own on the same card, and they run in turns. What
was measured is written after every part, so that a run that is cut short leaves results. Needs no network; Trainer needs accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
TARGET_TOKENS = 16


# ---- The speed: workers in turns ----


class Worker:
    """A process of its own that measures when told to, because backends and allocators are settings of a process."""

    def __init__(self, name: str, arguments: argparse.Namespace, data: pathlib.Path, log: pathlib.Path, micro: int, **flags: Any):
        self.name, self.micro = name, micro
        given = {"data": data, "preset": arguments.preset, "passages": arguments.passages, "passage-tokens": arguments.passage_tokens}
        given |= {"questions": arguments.questions, "micro": micro, "steps": arguments.steps, "warmup": arguments.warmup}
        given |= {"device": arguments.device, **flags}
        processes = int(given.pop("processes", 1))
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
        command = [sys.executable, *start, "-m", "training.bench_worker", *words]
        # one process sees one card: Trainer would spread its batches over all that it sees
        alone = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]} if processes == 1 else {}
        self._log = (log / f"{name.replace(' ', '-')}-{micro}.log").open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **alone, "PYTHONPATH": import_path()},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._log.write(line)
            self._log.flush()
            if line.startswith(b"{"):
                self._lines.put(line.decode())
        self._lines.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any] | None:
        with_line = None
        try:
            with_line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            print(f"{self.name}: no answer in {timeout_s:.0f} s", flush=True)
        return None if with_line is None else json.loads(with_line)

    def is_ready(self, timeout_s: float) -> bool:
        """Whether it has started and warmed up."""
        return self._answer(timeout_s) is not None

    def turn(self, timeout_s: float = 120.0) -> dict[str, Any] | None:
        """What one turn measured; None if it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._answer(timeout_s)

    def end(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def import_path() -> str:
    """PYTHONPATH of a process that this one starts."""
    return os.pathsep.join([str(ROOT), str(ROOT / "clients"), os.environ.get("PYTHONPATH", "")])


def _random_data(file: pathlib.Path, questions: int, passages: int, passage_tokens: int, shortest: float) -> None:
    """Questions whose passages fill the prompt (shortest=1), or a share of it drawn evenly from `shortest` on."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(questions):
            ctxs = []
            for _ in range(passages):
                # two tokens a random word at least: more than enough words to be truncated, or fewer than fill the prompt
                count = passage_tokens if shortest >= 1 else max(1, int(passage_tokens * rng.uniform(shortest, 1.0) / 3.5))
                ctxs.append({"title": rng.choice(words), "text": " ".join(rng.choices(words, k=count))})
            example = {"question": "what is it?", "answers": [" ".join(rng.choices(words, k=2 * TARGET_TOKENS))], "ctxs": ctxs}
            stream.write(json.dumps(example) + "\n")


def _started(name: str, arguments: argparse.Namespace, data: pathlib.Path, log: pathlib.Path, **flags: Any) -> Worker | None:
    """A worker that is ready; with fewer questions at a time where memory does not suffice."""
    micro = arguments.questions
    while micro:
        worker = Worker(name, arguments, data, log, micro, **flags)
        if worker.is_ready(arguments.start_timeout):
            return worker
        worker.end()
        text = (log / f"{name.replace(' ', '-')}-{micro}.log").read_text(errors="replace")
        print(f"{name}: {micro} questions at a time failed; the end of its log:\n{text[-1500:]}", flush=True)
        if "OutOfMemory" not in text and "out of memory" not in text:
            return None
        micro //= 2
    return None


def _in_turns(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Every worker measures once a round. Returns the median, the spread and the memory of each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            measured = worker.turn()
            if measured is not None:
                found[name].append(measured)
    rows = {}
    for name, turns in found.items():
        if turns:
            speeds = sorted(turn["tokens_per_s"] for turn in turns)
            rows[name] = {
                "tokens_per_s": round(statistics.median(speeds)),
                "spread": [round(speeds[0]), round(speeds[-1])],
                "turns": len(turns),
                "tflops": round(statistics.median(turn["flops_per_s"] for turn in turns) / 1e12, 2),
                "questions_at_a_time": workers[name].micro,
                "memory_gb": turns[-1]["memory_gb"],
            }
    return rows


def speed(arguments: argparse.Namespace) -> None:
    """Measure, and write training.json after every part."""
    import torch

    from training.fit.runtime import PEAK_TFLOPS

    gpus = torch.cuda.device_count() if arguments.device != "cpu" else 0
    name = torch.cuda.get_device_name() if gpus else "cpu"
    peak = next((rate for model, rate in PEAK_TFLOPS.items() if model in name), None)
    log = arguments.out.parent / "training_logs" if arguments.logs is None else arguments.logs
    log.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": name, "gpus": gpus, "torch": torch.__version__, "preset": arguments.preset}
    result |= {name: getattr(arguments, name) for name in ("passages", "passage_tokens", "questions", "steps", "rounds")} | {"rows": {}}

    def write() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def measure(part: str, specs: dict[str, dict[str, Any]], data: pathlib.Path, rounds: int) -> dict[str, dict[str, Any]]:
        workers = {}
        for key, flags in specs.items():
            worker = _started(f"{part}-{key}", arguments, data, log, **flags)
            if worker is not None:
                workers[key] = worker
        try:
            rows = _in_turns(workers, rounds)
        finally:
            for worker in workers.values():
                worker.end()
        for row in rows.values():
            world = next((flags.get("processes", 1) for key, flags in specs.items() if rows.get(key) is row), 1)
            row["mfu"] = round(row["tflops"] / peak / world, 4) if peak else None
        result["rows"][part] = rows
        write()
        print(part, json.dumps(rows), flush=True)
        return rows

    with tempfile.TemporaryDirectory() as scratch:
        full, mixed = pathlib.Path(scratch, "full.jsonl"), pathlib.Path(scratch, "mixed.jsonl")
        _random_data(full, 64, arguments.passages, arguments.passage_tokens, 1.0)
        _random_data(mixed, 64, arguments.passages, arguments.passage_tokens, 0.3)
        ours: dict[str, dict[str, Any]] = {"uptrain sdpa": {"kind": "fid", "attention": "sdpa"}}
        if gpus:
            ours["uptrain flex"] = {"kind": "fid", "attention": "flex"}
        trainer = {"trainer": {"kind": "trainer"}}
        rows = measure("full", {**ours, **trainer}, full, arguments.rounds)
        if "trainer" in rows:
            result["trainer_tokens_per_s"], result["trainer_mfu"] = rows["trainer"]["tokens_per_s"], rows["trainer"]["mfu"]
        best = max((name for name in ours if name in rows), key=lambda name: rows[name]["tokens_per_s"], default="uptrain sdpa")
        result["attention"], chosen = ours[best]["attention"], ours[best]
        if best in rows:
            result["tokens_per_s_1"], result["mfu_1"] = rows[best]["tokens_per_s"], rows[best]["mfu"]
            if "trainer" in rows:
                result["times_trainer"] = round(rows[best]["tokens_per_s"] / rows["trainer"]["tokens_per_s"], 3)
        write()
        processes = 2 if gpus >= 2 or arguments.two_processes else 1
        if processes == 2:
            both = measure("two", {"two": {**chosen, "processes": 2, "turns": arguments.rounds}}, full, arguments.rounds)
            if "two" in both:
                result["tokens_per_s_2"] = both["two"]["tokens_per_s"]
                result["scaling_efficiency"] = round(both["two"]["tokens_per_s"] / 2 / max(1, result.get("tokens_per_s_1", 0)), 3)
        if not arguments.short:
            measure("mixed_lengths", {"uptrain": chosen, **trainer}, mixed, max(2, arguments.rounds // 2))
            measure("fido", {"uptrain": {**chosen, "kind": "fido"}}, full, max(2, arguments.rounds // 2))
        write()
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=2))


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that `speed` passes on to its workers."""
    parser.add_argument("--preset", default="base", help="tiny, or a published size")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--passage-tokens", type=int, default=256)
    parser.add_argument("--questions", type=int, default=4, help="of a step, on each GPU")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first turn")
    parser.add_argument("--device", default="auto")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m training.bench", description=__doc__)
    add_sizes(parser)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="training.json")
    parser.add_argument("--logs", type=pathlib.Path, help="folder of the workers' logs (default: beside --out)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--short", action="store_true", help="without passages of mixed lengths and FiDO")
    parser.add_argument("--start-timeout", type=float, default=200.0)
    parser.add_argument("--two-processes", action="store_true", help="measure two processes without two GPUs, to try the script out")
    speed(parser.parse_args())


if __name__ == "__main__":
    main()
