"""`make evaluate`: exact match of the demo readers through Triton, on held-out and on human-written questions.

The held-out questions are asked one at a time and eight at once, and every answer is compared with the torch reader's greedy answer: same
text, same number of tokens. Where OpenVINO is installed, both readers are asked again in bf16 and in int8, which is calibrated on the
human-written questions. Prints tables, and as the last line JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.demo import ENGINES, REPOSITORY
from export.build import build_reader
from export.library.options import AUTO, LibraryOptions
from export.repository import repository_from_engines
from fido_client.data.examples import Example, read_examples
from fido_client.evaluation import N_BEST, Evaluation, Prediction, evaluate
from fido_client.reader_client import ReaderClient
from serving.contract.limits import Limits
from serving.contract.manifest import EngineError, Manifest, require_bf16
from serving.launcher.server import TritonServer, models_of
from serving.pipeline.prompt import PromptEncoder
from training.corpus.examples import read_jsonl

CORPUS, CHECKPOINTS = Path("build/corpus"), Path("checkpoints")
CONCURRENCY = 8
NUM_BEAMS = max(N_BEST)
TORCH_BATCH = 8
PRECISION_KEYS = {"bfloat16": "bf16", "int8": "int8"}  # in the JSON


@dataclasses.dataclass(frozen=True)
class ReaderResult:
    """One reader's numbers; times are measured by the client, at concurrency 8, or 1 for `alone_`.

    `gold_on_top`: percent of the held-out questions whose gold passage has the highest passage score.
    `n_best`: n -> exact match on the held-out questions if an oracle chooses among the n best answers of a search with NUM_BEAMS beams.
    """

    em: float
    questions: int
    served_equals_torch: bool
    differing: int
    questions_per_s: float
    p50_ms: float
    p99_ms: float
    alone_p50_ms: float
    failed: int
    parameters: int
    real_em: float
    gold_on_top: float
    n_best: dict[int, float]
    em_at_4: float


def torch_answers(checkpoint: Path, engines: Path, examples: Sequence[Example]) -> list[tuple[str, int]]:
    """Text and number of tokens of the torch reader's greedy answers to the server's prompts."""
    import torch

    from export.checkpoint.files import load_checkpoint

    reader = load_checkpoint(checkpoint).reader
    prompt = PromptEncoder(Tokenizer.from_file(str(engines / "tokenizer.json")), Manifest.load(engines))
    encoded = [prompt.encode(e.question, [c.text for c in e.contexts], [c.title or "" for c in e.contexts]) for e in examples]
    # sorted by length, since the passages of a batch are padded to the longest
    order = sorted(range(len(examples)), key=lambda i: encoded[i].input_ids.shape[1])
    answers: list[tuple[str, int]] = [("", 0)] * len(examples)
    for start in tqdm(range(0, len(order), TORCH_BATCH), desc=f"torch {checkpoint.name}", file=sys.stderr):
        chosen = order[start : start + TORCH_BATCH]
        rows = [(encoded[i].input_ids, encoded[i].attention_mask) for i in chosen]
        shape = (len(rows), max(len(ids) for ids, _ in rows), max(ids.shape[1] for ids, _ in rows))
        batch = np.zeros((2, *shape), np.int64)
        for i, row in enumerate(rows):
            for j, array in enumerate(row):
                batch[j, i, : array.shape[0], : array.shape[1]] = array
        generated = reader.generate(torch.from_numpy(batch[0]), torch.from_numpy(batch[1]), Limits().default_max_new_tokens)
        for i, tokens in zip(chosen, generated.tokens, strict=True):
            answers[i] = (prompt.text(tokens), len(tokens))
    return answers


def ask_all(
    server: TritonServer, model: str, examples: Sequence[Example], concurrency: int, what: str, num_beams: int | None = None
) -> tuple[Evaluation, list[Prediction]]:
    """Ask every example and collect the predictions."""
    predictions: list[Prediction] = []
    with ReaderClient(server.grpc_url, model) as client, tqdm(total=len(examples), desc=what, file=sys.stderr) as bar:

        def keep(prediction: Prediction) -> None:
            predictions.append(prediction)
            bar.update()

        result = evaluate(client, examples, concurrency=concurrency, warmup=CONCURRENCY, num_beams=num_beams, on_prediction=keep)
    return result, predictions


def measure(server: TritonServer, model: str, name: str, heldout: list[Example], real: list[Example], no_torch: bool) -> ReaderResult:
    """All numbers of the checkpoint `name`, served as `model`."""
    alone, alone_predictions = ask_all(server, model, heldout, 1, f"{name} one at a time")
    together, together_predictions = ask_all(server, model, heldout, CONCURRENCY, f"{name} {CONCURRENCY} at once")
    beams, _ = ask_all(server, model, heldout, CONCURRENCY, f"{name} {NUM_BEAMS} beams", NUM_BEAMS)
    n_best = {n: round(em or 0.0, 2) for n, em in beams.em_at.items()}
    on_real, _ = ask_all(server, model, real, CONCURRENCY, f"{name} human-written")
    engines = ENGINES / name
    differing = 0
    if not no_torch:
        wanted = torch_answers(CHECKPOINTS / name, engines, heldout)
        for predictions in (alone_predictions, together_predictions):
            found = [(p.answer.text, p.answer.tokens) if p.answer else None for p in predictions]
            differing += sum(f != w for f, w in zip(found, wanted, strict=True))
    return ReaderResult(
        em=round(together.em or 0.0, 2),
        questions=len(heldout),
        served_equals_torch=differing == 0 and not no_torch,
        differing=differing,
        questions_per_s=round(together.questions_per_s or 0.0, 1),
        p50_ms=round((together.latency_s(50) or 0) * 1e3, 1),
        p99_ms=round((together.latency_s(99) or 0) * 1e3, 1),
        alone_p50_ms=round((alone.latency_s(50) or 0) * 1e3, 1),
        failed=alone.failed + together.failed + beams.failed + on_real.failed,
        parameters=int(Manifest.load(engines).provenance["parameters"]),
        real_em=round(on_real.em or 0.0, 1),
        gold_on_top=round(gold_on_top(heldout, together_predictions), 1),
        n_best=n_best,
        em_at_4=n_best[4],
    )


def precisions_here() -> list[str]:
    """Precisions below fp32 that this machine can export and serve."""
    found = []
    if importlib.util.find_spec("openvino") is not None:
        with contextlib.suppress(EngineError):
            require_bf16("evaluate")
            found.append("bfloat16")
        if importlib.util.find_spec("nncf") is not None:
            found.append("int8")
    return found


def lower_precision_em(precision: str, heldout: list[Example]) -> dict[str, float]:
    """EM of each demo reader by OpenVINO in a lower precision, through Triton."""
    found = {}
    for name in ("fid", "fido"):
        with tempfile.TemporaryDirectory() as scratch:
            engines, repository = Path(scratch, "engines"), Path(scratch, "repository")
            library = LibraryOptions(AUTO, samples=CORPUS / "real.jsonl")
            build_reader(str(CHECKPOINTS / name), engines, "openvino", Limits(), precision=precision, library=library)
            repository_from_engines(engines, repository, name, Limits())
            with TritonServer(models_of([name], stream=False), repository) as server:
                result, _ = ask_all(server, name, heldout, CONCURRENCY, f"{name} {precision}")
        found[name] = round(result.em or 0.0, 2)
    return found


def gold_on_top(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """Percent of the answers whose highest passage score is the gold passage's."""
    gold = {r["id"]: next((c["title"], c["text"]) for c in r["ctxs"] if c["id"] == r["gold"]) for r in read_jsonl(CORPUS / "heldout.jsonl")}
    hits = []
    for example, prediction in zip(examples, predictions, strict=True):
        if prediction.answer is not None:
            scores = prediction.answer.passage_scores
            top = example.contexts[scores.index(max(scores))]
            hits.append((top.title, top.text) == gold[example.id])
    return 100 * sum(hits) / max(len(hits), 1)


def main() -> int:
    """Measure all demo readers; return exit code 0 if no request failed and every served answer equals the torch reader's."""
    parser = argparse.ArgumentParser(prog="python -m perf.served.accuracy", description=__doc__)
    parser.add_argument("--limit", type=int, help="only the first held-out questions")
    parser.add_argument("--no-torch", action="store_true", help="skip the comparison with torch, as where it is not installed")
    arguments = parser.parse_args()
    arguments.no_torch |= importlib.util.find_spec("torch") is None
    heldout = list(read_examples(CORPUS / "heldout.jsonl", limit=arguments.limit))
    real = list(read_examples(CORPUS / "real.jsonl"))
    results: dict[str, ReaderResult] = {}
    with TritonServer(models_of(["fid", "fido"], stream=False), REPOSITORY) as server:
        for name in ("fid", "fido"):
            results[name] = measure(server, name, name, heldout, real, arguments.no_torch)
    # the converted reader is served as `fido` from a repository of its own
    name = "fido_converted"
    build_reader(str(CHECKPOINTS / name), ENGINES / name, "onnxruntime", Limits())
    with tempfile.TemporaryDirectory() as scratch:
        repository_from_engines(ENGINES / name, Path(scratch), "fido", Limits())
        with TritonServer(models_of(["fido"], stream=False), Path(scratch)) as server:
            results[name] = measure(server, "fido", name, heldout, real, arguments.no_torch)
    lower = {precision: lower_precision_em(precision, heldout) for precision in precisions_here()}
    print(_table(results))
    summary: dict[str, Any] = {n: dataclasses.asdict(r) for n, r in results.items()}
    for precision, found in lower.items():
        summary[f"{PRECISION_KEYS[precision]}_em"] = found
        for name, em in found.items():
            print(f"{name} by OpenVINO in {PRECISION_KEYS[precision]}: EM {em:.2f}, {em - results[name].em:+.2f} against fp32")
    summary["real_questions"] = {"questions": len(real), **{n: r.real_em for n, r in results.items()}}
    print(json.dumps(summary))
    compared = arguments.no_torch or all(r.served_equals_torch for r in results.values())
    return 0 if compared and not any(r.failed for r in results.values()) else 1


def _table(results: dict[str, ReaderResult]) -> str:
    names = {"fid": "FiD", "fido": "FiDO", "fido_converted": "FiDO converted + up-trained"}
    lines = [
        "| reader | EM | EM, human-written | gold passage on top | parameters | ms a question, alone | questions/s, 8 at once | "
        "equals torch |",
        "|" + "---|" * 8,
    ]
    for name, r in results.items():
        equal = "all" if r.served_equals_torch else f"all but {r.differing}" if r.differing else "not compared"
        lines.append(
            f"| {names[name]} | {r.em:.1f} | {r.real_em:.1f} | {r.gold_on_top:.1f}% | {r.parameters / 1e6:.2f} M | {r.alone_p50_ms:.0f} "
            f"| {r.questions_per_s:.0f} | {equal} |"
        )
    lines += ["", f"| EM, {NUM_BEAMS} beams | " + " | ".join(f"best of {n}" for n in N_BEST) + " |", "|" + "---|" * (1 + len(N_BEST))]
    lines += [f"| {names[name]} | " + " | ".join(f"{r.n_best[n]:.1f}" for n in N_BEST) + " |" for name, r in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
