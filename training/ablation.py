"""`python -m training.ablation`: the demo's FiD reader up-trained in ten ways, some at a time on one GPU; writes a table of EM.

In: build/corpus and checkpoints/fid. Out: a folder with ablation.md, ablation.json, and each row's reader and log. The table is written
after every row, so that a run that is cut short leaves results. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from training.bench import ROOT, import_path

RATES = ["--embedding-rate", "5", "--query-rate", "0.177"]
NO_TEACHER = ["--logits-weight", "0", "--passages-weight", "0"]
LARGER = ["--decoder-layers", "4", "--decoder-d-ff", "512"]
DEEPER = ["--decoder-layers", "6", "--decoder-d-ff", "512"]
MULTI_QUERY = ["--num-kv-heads", "1"]
ROWS: dict[str, list[str]] = {
    "MQ, period 2": ["--period", "2", *MULTI_QUERY],
    "MQ, period 2, no distillation": ["--period", "2", *MULTI_QUERY, *NO_TEACHER],
    "MQ, period 2, logits alone": ["--period", "2", *MULTI_QUERY, "--passages-weight", "0"],
    "GQA-2, period 2": ["--period", "2", "--num-kv-heads", "2"],
    "MQ, period 1": ["--period", "1", *MULTI_QUERY],
    "MQ, period 2, 4 decoder layers": ["--period", "2", *MULTI_QUERY, *LARGER],
    "MQ, period 2, 4 decoder layers, no distillation": ["--period", "2", *MULTI_QUERY, *LARGER, *NO_TEACHER],
    "MQ, period 1, 6 decoder layers": ["--period", "1", *MULTI_QUERY, *DEEPER],
    "MQ, period 2, 6 decoder layers": ["--period", "2", *MULTI_QUERY, *DEEPER],
    "MQ, period 3, 6 decoder layers": ["--period", "3", *MULTI_QUERY, *DEEPER],
}
FID_PASSAGES = 4.7e6  # passages that FiD's training encoded: 8,209 steps by the schedule of training/fit/batches.py, 2,149 of refinement


def ablation(arguments: argparse.Namespace) -> None:
    """Run all rows, some at a time, and write ablation.json and ablation.md as they finish."""
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    train = out / "train.jsonl"
    environment = {**os.environ, "PYTHONPATH": import_path()}
    if not train.is_file():
        share = -(-arguments.examples // arguments.parallel)
        parts = [out / f"train-{number}.jsonl" for number in range(arguments.parallel)]
        draw = [sys.executable, "-m", "training", "fid-data", "--corpus", str(arguments.corpus), "--examples", str(share)]
        draw += ["--n-passages", str(arguments.passages)]
        drawing = [
            subprocess.Popen([*draw, "--seed", str(number), "--out", str(part)], cwd=ROOT, env=environment)
            for number, part in enumerate(parts)
        ]
        if any(process.wait() for process in drawing):
            raise SystemExit("ablation: fid-data failed; see its message above")
        with train.with_suffix(".part").open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
                part.unlink()
        train.with_suffix(".part").rename(train)
    held_out = {name: arguments.corpus / f"{file}.jsonl" for name, file in (("dev", "heldout"), ("test", "heldout_second"))}
    if arguments.limit:
        for name, file in held_out.items():
            held_out[name] = out / file.name
            held_out[name].write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[: arguments.limit]))
    _tokenize(arguments, [train, *held_out.values()], out / "tokens")
    common = [str(arguments.checkpoint), str(train), "--dev", str(held_out["dev"]), "--test", str(held_out["test"])]
    common += ["--cache", str(out / "tokens"), "--n-passages", str(arguments.passages), "--steps", str(arguments.steps)]
    common += ["--batch-questions", str(arguments.batch), "--micro-questions", str(arguments.batch)]
    common += ["--passages-per-chunk", str(2 * arguments.batch * arguments.passages), "--learning-rate", str(arguments.learning_rate)]
    common += ["--warmup-steps", str(max(1, arguments.steps // 20)), "--evaluate-every", str(max(1, arguments.steps // 4)), "--ema", "0.99"]
    common += ["--log-every", str(max(1, arguments.steps // 20)), "--save-every", "1000000", "--device", arguments.device, *RATES]
    common += ["--save-dtype", "float16", "--no-tensorboard", "--threads", "1"]
    names = [name for name in ROWS if not arguments.rows or any(wanted in name for wanted in arguments.rows)]
    waiting, rows = list(names), dict[str, Any]()
    running: dict[str, tuple[subprocess.Popen[bytes], str, float]] = {}
    while waiting or running:
        while waiting and len(running) < arguments.parallel:
            name = waiting.pop(0)
            slug = "".join(letter if letter.isalnum() else "_" for letter in name.lower())
            command = [sys.executable, "-m", "training", "uptrain", *common, "--out", str(out / slug), *ROWS[name]]
            log = (out / f"{slug}.log").open("wb")
            running[name] = (subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), slug, time.perf_counter())
        time.sleep(0.2)
        for name, (process, slug, started) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                rows[name] = _row(out / slug, process.returncode, time.perf_counter() - started, arguments)
                print(f"{name}: {json.dumps(rows[name])}", flush=True)
                _write_table(out, {name: rows[name] for name in names if name in rows})


def _tokenize(arguments: argparse.Namespace, files: list[pathlib.Path], cache: pathlib.Path) -> None:
    from export.checkpoint.files import load_checkpoint
    from training.fit.fid_data import tokenized

    checkpoint = load_checkpoint(arguments.checkpoint)
    for file in files:
        tokenized(file, checkpoint.reader.config, checkpoint.tokenizer_json, n_passages=arguments.passages, target_length=32, cache=cache)


def _row(directory: pathlib.Path, code: int, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    if code:
        return {"failed": code}
    lines = [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "questions" in line]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    passages = config["notes"]["uptrain"]["options"]["steps"] * arguments.batch * arguments.passages
    last = lines[-1]
    return {
        "dev_em": last["dev_em"],
        "test_em": last["test_em"],
        "teacher_dev_em": evaluations[0].get("teacher_dev_em"),
        "teacher_test_em": last.get("teacher_test_em"),
        "dev_em_before": evaluations[0]["dev_em"],
        "dev_em_by_step": {str(line["step"]): line["dev_em"] for line in evaluations},
        "passages": passages,
        "share_of_fid_training": round(passages / FID_PASSAGES, 3),
        "training_s": next(line["seconds"] for line in reversed(lines) if "seconds" in line),
        "wall_s": round(seconds, 1),
    }


def _write_table(out: pathlib.Path, rows: dict[str, dict[str, Any]]) -> None:
    (out / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = ["| reader | EM held-out | EM second held-out | before training | share of FiD's training |", "|---|---|---|---|---|"]
    taught = next((row for row in rows.values() if row.get("teacher_dev_em") is not None), None)
    if taught:
        lines.append(f"| FiD, the teacher | {taught['teacher_dev_em']} | {taught['teacher_test_em']} | | 1 |")
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed | | | |")
        else:
            lines.append(f"| {name} | {row['dev_em']} | {row['test_em']} | {row['dev_em_before']} | {row['share_of_fid_training']} |")
    (out / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--corpus", type=pathlib.Path, default=pathlib.Path("build/corpus"))
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path("checkpoints/fid"))
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--parallel", type=int, default=5)
    parser.add_argument("--limit", type=int, help="held-out questions, to try the script out")
    parser.add_argument("--rows", nargs="+", help="only rows whose name has one of these in it")
    parser.add_argument("--device", default="auto")
    ablation(parser.parse_args())


if __name__ == "__main__":
    main()
