"""`python -m perf.gpu.forms`: whole-graph engines beside those of single GEMMs, both readers, in turns of one process. Writes whole.json.

Measured are a full encoder call, a question's call, decoder steps, and a question alone in this process. Questions/s through Triton come
from the runs of `perf.served.sweep` that --sweeps names, one after the other on the same card. Excluded: loading, and a first round.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from export.checkpoint.config import reader_preset
from perf.bounds.machine import describe
from perf.bounds.stages import READERS, load_stage, measure
from perf.bounds.statistics import publish, spread
from serving.contract.limits import Limits

FORMS = ("gemms", "whole")


def served(run: Path, reader: str) -> dict[str, float]:
    """Questions/s of a sweep's run by questions in flight."""
    points = json.loads((run / "sweep.json").read_text(encoding="utf-8"))["points"]
    return {str(int(point["load"])): point["questions_per_s"] for point in points if point["model"] == reader}


def main(argv: list[str] | None = None) -> int:
    """Measure all four, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.gpu.forms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER", help="engines of fid and fido: of GEMMs, then whole")
    parser.add_argument("--sweeps", type=Path, nargs=2, metavar="RUN", help="runs of the same two")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--plan", default="gpu", help="whose first questions are asked (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 24])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-passages", type=int, default=Limits().max_passages)
    parser.add_argument("--encoder-batch", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("perf/results/h100/whole.json"))
    arguments = parser.parse_args(argv)
    questions = max(arguments.batches)
    limits = Limits(slots=questions, max_passages=arguments.max_passages, encoder_batch=arguments.encoder_batch)
    stages, names = [], []
    for form, folder in zip(FORMS, arguments.folders, strict=True):
        for reader in READERS:
            config = reader_preset(arguments.preset, fido=reader == "fido")
            stage, _, work = load_stage(reader, folder / reader, config, limits, arguments.plan, seed=0)
            stages.append(stage)
            names.append((form, reader))
    try:
        measure(stages, sorted(arguments.batches), questions, work.new_tokens, arguments.rounds, arguments.steps)
    finally:
        for stage in stages:
            stage.chain.close()
    result: dict[str, Any] = {form: {} for form in FORMS}
    for (form, reader), stage in zip(names, stages, strict=True):
        samples = stage.samples
        result[form][reader] = {
            "precision": stage.manifest.precision,
            "encoder_ms": spread(samples["full_call"]),
            "encoder_one_question_ms": spread(samples["encoder"]),
            "step_ms": {str(batch): spread(samples[f"step {batch}"]) for batch in arguments.batches},
            "in_process_ms": spread(samples["in_process"]),
        }
        if arguments.sweeps:
            result[form][reader]["questions_per_s_in_flight"] = served(arguments.sweeps[FORMS.index(form)], reader)
    build = stages[0].manifest.build
    sizes = {"questions_in_a_full_call": questions, "passages": work.n_passages, "passage_tokens": work.passage_length}
    sizes |= {"new_tokens": work.new_tokens, "encoder_batch": arguments.encoder_batch, "rounds": arguments.rounds}
    publish(result | {"settings": sizes, "tensorrt": build.version if build else None, "machine": describe()}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
