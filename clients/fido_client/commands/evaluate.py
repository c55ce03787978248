"""`fido-client evaluate`: a data file and one or more readers -> exact match, F1, throughput, latency, and how often readers agree.

The data and the readers are checked before the first question: the file's format, that the server runs and has each reader, and the limits
that the readers were exported with. Readers are asked one after another, so that they do not compete for the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..data.examples import Example, read_examples
from ..errors import ReaderError, ReaderUnavailable
from ..evaluation import Evaluation, Prediction, agreement, evaluate
from ..reader_client import ReaderClient
from .common import EXIT_ALL_FAILED, EXIT_OK, EXIT_SOME_FAILED, Progress, UsageError, client_of, usage_errors
from .limits import check_limits, check_reader

_ERRORS_SHOWN = 5


def evaluate_readers(args: argparse.Namespace) -> int:
    """Ask every reader all questions, print the comparison, return the exit code."""
    names = [name for value in args.model for name in value.split(",") if name]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        raise UsageError(f"--model: wanted the names of different readers, got {', '.join(repeated) + ' twice' if repeated else 'none'}")
    try:
        with contextlib.ExitStack() as resources:
            with usage_errors():
                examples = list(read_examples(args.data, n_context=args.max_passages, limit=args.limit))
                if not examples:
                    raise UsageError(f"{args.data}: wanted at least one example, got none")
                clients = [resources.enter_context(client_of(args, name)) for name in names]
            _check(clients, examples, args)
            with usage_errors():
                write_line = resources.enter_context(_predictions_file(args.predictions))
            runs = [_run(client, examples, args, write_line, len(clients) > 1) for client in clients]
    except ReaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ALL_FAILED
    evaluations = [evaluation for evaluation, _ in runs]
    pairs = [
        _Pair(one.model, two.model, *agreement(predictions, others))
        for (one, predictions), (two, others) in itertools.combinations(runs, 2)
    ]
    print(_one_text(evaluations[0]) if len(evaluations) == 1 else _table(evaluations, pairs))
    if args.json:
        figures = [evaluation.as_json() for evaluation in evaluations]
        print(json.dumps(figures[0] if len(figures) == 1 else {"models": figures, "agreement": [pair.as_json() for pair in pairs]}))
    failed = sum(evaluation.failed for evaluation in evaluations)
    if failed == len(examples) * len(evaluations):
        return EXIT_ALL_FAILED
    return EXIT_SOME_FAILED if failed else EXIT_OK


class _Pair:
    """How often two readers give the same answer."""

    def __init__(self, first: str, second: str, both: int, same: int) -> None:
        self.names = (first, second)
        self.both = both
        self.percent = round(100 * same / both, 2) if both else None

    def as_json(self) -> dict[str, Any]:
        return {"models": list(self.names), "questions": self.both, "percent": self.percent}

    def text(self) -> str:
        share = "unknown: no question has two answers" if self.percent is None else f"{self.percent:.2f} % of {self.both} questions"
        return f"{' and '.join(self.names)}: {share}"


def _check(clients: Sequence[ReaderClient], examples: Sequence[Example], args: argparse.Namespace) -> None:
    """Refuse names of no reader, then data that a reader would refuse; warn of questions that will fail."""
    models = []
    for client in clients:
        try:
            models.append(client.served_model())
        except ReaderError as error:
            if error.status != "UNIMPLEMENTED":  # a server or a proxy that serves questions alone: its limits are unknown
                raise
        else:
            check_reader(models[-1], client.endpoint)
    for model in models:
        for warning in check_limits(model, examples, data=args.data, max_new_tokens=args.max_new_tokens):
            print(f"warning: {warning}", file=sys.stderr)


def _run(
    client: ReaderClient,
    examples: Sequence[Example],
    args: argparse.Namespace,
    write_line: Callable[[dict[str, Any]], None],
    is_named: bool,
) -> tuple[Evaluation, list[Prediction]]:
    """Ask one reader; with `is_named`, lines of predictions and errors carry its name."""
    name = client.endpoint.model
    progress = Progress(len(examples), name)
    predictions: list[Prediction] = []
    failures = 0

    def on_prediction(prediction: Prediction) -> None:
        nonlocal failures
        predictions.append(prediction)
        write_line({"model": name, **prediction.as_json()} if is_named else prediction.as_json())
        progress.update()
        if prediction.error is not None:
            failures += 1
            if failures <= _ERRORS_SHOWN:
                progress.write(f"{prediction.id}: {prediction.error}")

    try:
        evaluation = evaluate(
            client,
            examples,
            concurrency=args.concurrency,
            warmup=args.warmup,
            max_new_tokens=args.max_new_tokens,
            num_beams=args.num_beams,
            on_prediction=on_prediction,
        )
    except ReaderUnavailable as error:
        raise ReaderUnavailable(
            f"the server went away after {len(predictions)} of {len(examples)} questions: {error}; --retries N waits for it",
            message=error.message,
            model=error.model,
            status=error.status,
        ) from error
    finally:
        progress.clear()
    if failures > _ERRORS_SHOWN:
        where = f"see {args.predictions}" if args.predictions else "--predictions FILE lists them all"
        print(f"and {failures - _ERRORS_SHOWN} more failed: {where}", file=sys.stderr)
    return evaluation, predictions


@contextlib.contextmanager
def _predictions_file(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one JSON line; without a path it writes nothing.

    Lines go to PATH.partial, which is renamed to PATH at the end. An interrupted run leaves PATH.partial and does not touch an older PATH.
    """
    if path is None:
        yield lambda line: None
        return
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:

        def write_line(line: dict[str, Any]) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        yield write_line
    os.replace(partial, path)


def _one_text(evaluation: Evaluation) -> str:
    figures = evaluation.as_json()
    rows = [("model", figures["model"]), ("questions", figures["questions"]), ("failed", figures["failed"])]
    rows += [("exact match", _score(evaluation, figures["em"])), ("F1", _score(evaluation, figures["f1"]))]
    rows += [(f"EM at {n}", _score(evaluation, figures[f"em_at_{n}"])) for n in evaluation.em_at]
    if evaluation.measured:
        rows += [
            ("throughput", f"{figures['questions_per_s']} questions/s over {evaluation.wall_s:.1f} s"),
            ("latency", f"p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms of {evaluation.measured} answers"),
        ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _table(evaluations: Sequence[Evaluation], pairs: Sequence[_Pair]) -> str:
    """One column a reader, then one line a pair of readers."""
    rows = [("", [evaluation.model for evaluation in evaluations])]
    for label, key in [
        ("questions", "questions"),
        ("failed", "failed"),
        ("exact match", "em"),
        ("F1", "f1"),
        *((f"EM at {n}", f"em_at_{n}") for n in evaluations[0].em_at),
        ("questions/s", "questions_per_s"),
        ("p50 ms", "p50_ms"),
        ("p99 ms", "p99_ms"),
    ]:
        values = [evaluation.as_json()[key] for evaluation in evaluations]
        percent = " %" if key == "f1" or key.startswith("em") else ""
        rows.append(
            (
                label,
                ["unknown" if value is None else f"{value:.2f}{percent}" if isinstance(value, float) else str(value) for value in values],
            )
        )
    width = max(len(value) for _, values in rows for value in values) + 2
    lines = [f"{label:<12}" + "".join(f"{value:>{width}}" for value in values) for label, values in rows]
    return "\n".join([*lines, *(f"{'agreement':<12}  {pair.text()}" for pair in pairs)])


def _score(evaluation: Evaluation, percent: float | None) -> str:
    if percent is not None:
        return f"{percent:.2f} %"
    all_failed = evaluation.failed == evaluation.questions
    return "unknown: no question was answered" if all_failed else "unknown: the data have no answers"
