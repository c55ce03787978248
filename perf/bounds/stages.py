"""`python -m perf.bounds.stages`: the time of a question, stage by stage. Writes stages.json and roofline.json.

It measures tokenizer, encoder, keys and values, and decoder steps separately in one process; then the chain without Triton; and reads the
chain with Triton from the run's sweep.json. Every round alternates between the readers. Excluded: loading, and the first run of each part.

The stages are those of a single question. Full encoder calls and steps at each batch are measured as well, with their bounds. With
--variant fp8, for the same readers in FP8 on the same machine, the file is stages_fp8.json; bounds and roofline are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from examples.demo import ENGINES
from export.checkpoint.config import ReaderConfig, own_config, reader_preset
from perf.report.run_folder import NAMES
from perf.served.workload import PLANS, VARIANTS, Request, RequestMaker, Series
from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest
from serving.engines.load import Decoder, Encoder, bytes_per_element, load_decoder, load_encoder
from serving.pipeline.in_process import InProcessReader
from serving.pipeline.prompt import EncoderInput

from .cost import HardwareSpec, Workload, encoder_cost, step_cost
from .rates import hardware_spec_of
from .statistics import spread

READERS = ("fid", "fido")
QUESTIONS = 6  # distinct ones, used in rotation
WARM_STEPS = 2
EOS_FORBIDDEN = -1e9


def config_of(reader: str, checkpoint: Path | None, preset: str) -> ReaderConfig:
    """Sizes of a reader: of its checkpoint, or of a preset."""
    if checkpoint is None:
        return reader_preset(preset, fido=reader == "fido")
    return own_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))


def step_times_ms(decoder: Decoder, batch: int, steps: int, first: int = 1) -> list[float]:
    """Milliseconds of each step for `batch` admitted questions, as the scheduler sees it; WARM_STEPS come before."""
    tokens, penalty = np.full(batch, 5, np.int32), np.full(batch, EOS_FORBIDDEN, np.float32)
    found = []
    for step in range(WARM_STEPS + steps):
        started = time.perf_counter()
        decoder.step(tokens, np.full(batch, first + step, np.int32), penalty)
        found.append((time.perf_counter() - started) * 1e3)
    return found[WARM_STEPS:]


@dataclasses.dataclass
class Stage:
    """One reader's engines and their samples in milliseconds."""

    reader: str
    config: ReaderConfig
    manifest: Manifest
    chain: InProcessReader
    encoder: Encoder
    decoder: Decoder
    requests: list[Request]
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, ms: float) -> None:
        """Add one sample."""
        self.samples.setdefault(name, []).append(ms)

    def timed(self, name: str, work: Any) -> Any:
        """Run `work`, add its time, return its result."""
        started = time.perf_counter()
        result = work()
        self.add(name, (time.perf_counter() - started) * 1e3)
        return result

    def tokens_of(self, request: Request) -> EncoderInput:
        """The request, tokenized as in the chain."""
        return self.chain.prompt.encode(request.question, request.passages, request.titles)

    def measure_stages(self, request: Request, new_tokens: int) -> None:
        """Measure one question in every stage separately."""
        tokens = self.timed("tokenize", lambda: self.tokens_of(request))
        (states,) = self.timed("encoder", lambda: self.encoder.encode([(tokens.input_ids, tokens.attention_mask)]))
        penalty = np.full(1, EOS_FORBIDDEN, np.float32)

        def admit_and_step() -> None:
            self.decoder.admit(0, 0, self.chain.packer.pack(states, tokens.attention_mask), tokens.encoder_positions)
            self.decoder.step(np.full(1, 5, np.int32), np.zeros(1, np.int32), penalty)  # waits for the work that admit started

        started = time.perf_counter()
        admit_and_step()
        with_first_step = (time.perf_counter() - started) * 1e3
        steps = []
        for position in range(1, new_tokens):
            started = time.perf_counter()
            self.decoder.step(np.full(1, 5, np.int32), np.full(1, position, np.int32), penalty)
            steps.append((time.perf_counter() - started) * 1e3)
        one_step = statistics.median(steps)
        self.add("cross_kv", max(with_first_step - one_step, 0.0))
        self.add("decoder_steps", sum(steps) + one_step)
        self.timed("in_process", lambda: self.chain.answer(request.question, request.passages, request.titles, new_tokens, new_tokens))

    def fill(self, batch: int) -> int:
        """Admit `batch` questions; return the encoded tokens of one."""
        tokens = self.tokens_of(self.requests[0])
        (states,) = self.encoder.encode([(tokens.input_ids, tokens.attention_mask)])
        for slot in range(batch):
            self.decoder.admit(slot, slot, self.chain.packer.pack(states, tokens.attention_mask), tokens.encoder_positions)
        return len(tokens.encoder_positions)

    def full_call(self, questions: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The encoder's input for `questions` questions."""
        inputs = [self.tokens_of(self.requests[i % len(self.requests)]) for i in range(questions)]
        return [(one.input_ids, one.attention_mask) for one in inputs]


def measure(stages: list[Stage], batches: list[int], questions: int, new_tokens: int, rounds: int, steps: int) -> None:
    """Measure everything; the samples are stored in the stages."""
    for number in range(rounds + 1):
        for stage in stages:
            stage.measure_stages(stage.requests[number % len(stage.requests)], new_tokens)
            if number == 0:  # warm-up
                stage.samples.clear()
    calls = [stage.full_call(questions) for stage in stages]
    for number in range(rounds + 1):
        for stage, call in zip(stages, calls, strict=True):
            stage.timed("full_call", lambda stage=stage, call=call: stage.encoder.encode(call))
            if number == 0:
                stage.samples.pop("full_call")
    for stage in stages:
        stage.fill(max(batches))
    for batch in batches:
        for _ in range(rounds):
            for stage in stages:
                for ms in step_times_ms(stage.decoder, batch, steps):
                    stage.add(f"step {batch}", ms)


def result_of(
    stage: Stage, spec: HardwareSpec, work: Workload, batches: list[int], questions: int, served_ms: dict[str, float] | None
) -> dict[str, Any]:
    """One reader's entry of stages.json."""
    width = bytes_per_element(stage.manifest)
    samples, config = stage.samples, stage.config
    in_process = statistics.median(samples["in_process"])
    alone = {name: spread(samples[name]) for name in ("tokenize", "encoder", "cross_kv", "decoder_steps")}
    rest = in_process - sum(part["median"] for part in alone.values())
    parts = alone | {"rest_of_chain": _exactly(max(rest, 0.0))}
    if served_ms is not None:
        parts["triton"] = _exactly(max(served_ms["median"] - in_process, 0.0))
    full = dataclasses.replace(work, batch=questions)
    flops = encoder_cost(config, full, width).flops
    full_s = [ms / 1e3 for ms in samples["full_call"]]
    return {
        "preset": stage.manifest.provenance.get("source", "?"),
        "questions": questions,
        "passages": work.n_passages,
        "passage_tokens": work.passage_length,
        "new_tokens": work.new_tokens,
        "parts_ms": parts,
        "step_ms": {str(batch): spread(samples[f"step {batch}"]) for batch in batches},
        "step_bound_ms": {
            str(batch): round(step_cost(config, dataclasses.replace(work, batch=batch), width).bound_s(spec) * 1e3, 4) for batch in batches
        },
        "encoder_ms": spread(samples["full_call"]),
        "encoder_tflops": round(flops / statistics.median(full_s) / 1e12, 4),
        "encoder_bound_ms": round(encoder_cost(config, full, width).bound_s(spec) * 1e3, 3),
        "encoder_questions_per_s": spread([questions / s for s in full_s]),
        "in_process_ms": spread(samples["in_process"]),
        "served_ms": served_ms,
    }


def roofline_of(stage: Stage, spec: HardwareSpec, work: Workload, batches: list[int], questions: int) -> list[dict[str, Any]]:
    """The measured stages as points of the roofline plot."""
    width, name = bytes_per_element(stage.manifest), NAMES[stage.reader]
    found = []
    costs = [
        (
            f"{name} encoder, {questions} questions",
            encoder_cost(stage.config, dataclasses.replace(work, batch=questions), width),
            "full_call",
        )
    ]
    costs += [
        (f"{name} step, batch {batch}", step_cost(stage.config, dataclasses.replace(work, batch=batch), width), f"step {batch}")
        for batch in batches
    ]
    for label, cost, key in costs:
        seconds = statistics.median(stage.samples[key]) / 1e3
        found.append(
            {
                "name": label,
                "reader": stage.reader,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "seconds": seconds,
                "bound_s": cost.bound_s(spec),
            }
        )
    return found


def _exactly(value: float) -> dict[str, float]:
    """A difference of medians: it has no spread of its own."""
    return {"median": round(value, 3), "min": round(value, 3), "max": round(value, 3)}


def served_alone(sweep: Path, reader: str, workload: str) -> dict[str, float] | None:
    """Median latency of one question at a time through Triton, from the run's sweep; None if it was not measured."""
    try:
        points = json.loads(sweep.read_text(encoding="utf-8"))["points"]
    except FileNotFoundError:
        return None
    wanted = {"model": reader, "workload": workload, "mode": "concurrency", "load": 1}
    found = [point["latency_ms"]["p50"] for point in points if all(point[key] == value for key, value in wanted.items())]
    return spread(found) if found else None


def load_stage(reader: str, directory: Path, config: ReaderConfig, limits: Limits, plan: str, seed: int) -> tuple[Stage, Series, Workload]:
    """One reader's engines and questions; with them the plan's first series, and the sizes of one question of it."""
    manifest = Manifest.load(directory)
    series = PLANS[plan](manifest.prompt.passage_length)[0]
    assert series.spec is not None
    maker = RequestMaker(Tokenizer.from_file(str(directory / TOKENIZER_FILE)), manifest)
    engines = load_encoder(directory, manifest, limits), load_decoder(directory, manifest, limits)
    requests = list(maker.make(series.spec, QUESTIONS, seed))
    work = Workload(1, series.spec.passages.high, series.spec.passage_tokens.high, series.spec.new_tokens.high)
    return Stage(reader, config, manifest, InProcessReader(directory, limits), *engines, requests), series, work


def main(argv: list[str] | None = None) -> int:
    """Measure both readers and write the two files."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.bounds.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=Path, default=ENGINES, help="folder with the engines of fid and fido")
    parser.add_argument("--fid", type=Path, help="checkpoint of the FiD engines, for its sizes")
    parser.add_argument("--fido", type=Path)
    parser.add_argument("--preset", default="base", help="published sizes, if no checkpoint is named")
    parser.add_argument("--plan", choices=list(PLANS), default="cpu", help="the plan whose first workload provides the questions")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-passages", type=int, default=Limits().max_passages)
    parser.add_argument("--encoder-batch", type=int, default=0)
    parser.add_argument("--questions", type=int, help="in a full encoder call (default: the largest batch)")
    parser.add_argument("--run", type=Path, default=Path("build/perf"))
    parser.add_argument("--variant", choices=VARIANTS, help="a second run of the same folder: the same readers in this precision")
    arguments = parser.parse_args(argv)
    ending = f"{'_' + arguments.variant if arguments.variant else ''}.json"
    spec, batches = hardware_spec_of(arguments.run), sorted(arguments.batches)
    questions = arguments.questions or batches[-1]
    limits = Limits(slots=batches[-1], max_passages=arguments.max_passages, encoder_batch=arguments.encoder_batch)
    stages = []
    for reader in READERS:
        config = config_of(reader, getattr(arguments, reader), arguments.preset)
        stage, series, work = load_stage(reader, arguments.engines / reader, config, limits, arguments.plan, arguments.seed)
        stages.append(stage)
    try:
        measure(stages, batches, questions, work.new_tokens, arguments.rounds, arguments.steps)
    finally:
        for stage in stages:
            stage.chain.close()
    served = {s.reader: served_alone(arguments.run / f"sweep{ending}", s.reader, series.workload) for s in stages}
    found = {s.reader: result_of(s, spec, work, batches, questions, served[s.reader]) for s in stages}
    if arguments.variant:  # the machine's rates are those of half precision
        for entry in found.values():
            del entry["step_bound_ms"], entry["encoder_bound_ms"]
    (arguments.run / f"stages{ending}").write_text(json.dumps({"readers": found}, indent=1) + "\n", encoding="utf-8")
    if not arguments.variant:
        points = [point for stage in stages for point in roofline_of(stage, spec, work, batches, questions)]
        (arguments.run / "roofline.json").write_text(json.dumps({"points": points}, indent=1) + "\n", encoding="utf-8")
    for reader, entry in found.items():
        parts = ", ".join(f"{name} {part['median']:.2f}" for name, part in entry["parts_ms"].items())
        print(f"{reader}: {parts} ms; encoder {entry['encoder_ms']['median']:.1f} ms for {questions} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
