"""The client's command line: `python -m clients ask` asks one question, `python -m clients evaluate` a whole data set.

Exit codes: 0 every request was answered, 1 a request failed, 2 the command line or a file is wrong (nothing was sent), 3 every request
failed, 130 interrupted. Answers and results go to standard output, the progress bar and errors to standard error. With --json the last
line of standard output is JSON.
"""

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from clients.answer import Answer, StreamedAnswer
from clients.evaluation import Evaluation, Prediction, evaluate
from clients.examples import ExampleError, read_examples
from clients.passage_file import PassageFileError, read_passages
from clients.reader_client import ReaderClient, ReaderError

EXIT_OK, EXIT_SOME_FAILED, EXIT_USAGE, EXIT_ALL_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
_PASSAGES_SHOWN = 3  # under an answer
_PASSAGE_WIDTH = 100  # characters
_ERRORS_SHOWN = 5


class _UsageError(Exception):
    """The command line or a file that it names is invalid; nothing was sent."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (_UsageError, ExampleError, PassageFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _ask(args: argparse.Namespace) -> int:
    with _usage_errors():
        passages = read_passages(args.passages)
        client = _client(args)
    limits = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.min_new_tokens}
    with client:
        try:
            if args.stream:
                answer: Answer = _print_pieces(client, args, passages, limits)
            else:
                answer = client.answer(args.question, passages, **limits)
        except ReaderError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_ALL_FAILED
    print(json.dumps(_answer_json(answer), ensure_ascii=False) if args.json else _answer_text(answer, passages))
    return EXIT_OK


def _print_pieces(client: ReaderClient, args: argparse.Namespace, passages: list[Any], limits: dict[str, Any]) -> StreamedAnswer:
    with client.stream(args.question, passages, **limits) as stream:
        started = False
        try:
            for piece in stream:
                if args.json:
                    print(json.dumps({"piece": piece.text, "elapsed_ms": _ms(piece.elapsed_s)}, ensure_ascii=False), flush=True)
                else:
                    print(piece.text, end="", flush=True)
                    started = True
        finally:
            if started:
                print()
        return stream.answer


def _answer_json(answer: Answer) -> dict[str, Any]:
    line: dict[str, Any] = {
        "answer": answer.text,
        "log_prob": answer.log_prob,
        "tokens": answer.tokens,
        "latency_ms": _ms(answer.latency_s),
    }
    if answer.passage_scores:
        line |= {"passage_scores": list(answer.passage_scores), "token_log_probs": list(answer.token_log_probs)}
    if isinstance(answer, StreamedAnswer):
        line["time_to_first_token_ms"] = _ms(answer.time_to_first_token_s)
        line["mean_inter_token_ms"] = _ms(answer.mean_inter_token_s)
    return line


def _answer_text(answer: Answer, passages: list[Any]) -> str:
    rows = [("log-prob", f"{answer.log_prob:.4f}"), ("tokens", str(answer.tokens)), ("time", f"{_ms(answer.latency_s)} ms")]
    if isinstance(answer, StreamedAnswer):
        mean_ms = _ms(answer.mean_inter_token_s)
        rows += [
            ("first token", f"{_ms(answer.time_to_first_token_s)} ms"),
            ("inter-token", "unknown: a single response" if mean_ms is None else f"{mean_ms} ms on average"),
        ]
    else:
        rows.insert(0, ("answer", answer.text))
    lines = [f"{name:<12} {value}" for name, value in rows]
    total = sum(answer.passage_scores)
    if total > 0:
        best = sorted(zip(answer.passage_scores, passages, strict=False), key=lambda pair: -pair[0])[:_PASSAGES_SHOWN]
        lines += ["passages"] + [f"  {100 * score / total:3.0f} %  {_shortened(passage)}" for score, passage in best]
    return "\n".join(lines)


def _shortened(passage: Any) -> str:
    text = f"{passage.get('title', '')}: {passage['text']}" if isinstance(passage, dict) else str(passage)
    return textwrap.shorten(text, _PASSAGE_WIDTH, placeholder=" ...")


def _evaluate(args: argparse.Namespace) -> int:
    resources = contextlib.ExitStack()
    with _usage_errors():
        examples = list(read_examples(args.data, n_context=args.n_passages, limit=args.limit))
        if not examples:
            raise _UsageError(f"{args.data}: wanted at least one example, got none")
        client = resources.enter_context(_client(args))
        write_line = resources.enter_context(_predictions_file(args.predictions))
    failures = 0
    # disable=None hides the bar when standard error is not a terminal, to keep logs readable
    with resources, tqdm(total=len(examples), unit="question", file=sys.stderr, disable=None) as bar:

        def on_prediction(prediction: Prediction) -> None:
            nonlocal failures
            write_line(prediction.as_json())
            bar.update()
            if prediction.error is not None:
                failures += 1
                if failures <= _ERRORS_SHOWN:
                    tqdm.write(f"{prediction.id}: {prediction.error}", file=sys.stderr)

        evaluation = evaluate(
            client,
            examples,
            concurrency=args.concurrency,
            warmup=args.warmup,
            max_new_tokens=args.max_new_tokens,
            on_prediction=on_prediction,
        )
    if failures > _ERRORS_SHOWN:
        where = f"see {args.predictions}" if args.predictions else "--predictions FILE lists them all"
        print(f"... and {failures - _ERRORS_SHOWN} more failed: {where}", file=sys.stderr)
    print(_evaluation_text(evaluation))
    if args.json:
        print(json.dumps(evaluation.as_json()))
    if evaluation.failed == evaluation.questions:
        return EXIT_ALL_FAILED
    return EXIT_SOME_FAILED if evaluation.failed else EXIT_OK


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


def _evaluation_text(evaluation: Evaluation) -> str:
    figures = evaluation.as_json()
    em = "unknown: the data have no answers" if figures["em"] is None else f"{figures['em']:.2f} %"
    rows = [("model", figures["model"]), ("questions", figures["questions"]), ("failed", figures["failed"]), ("exact match", em)]
    if evaluation.measured:
        rows += [
            ("throughput", f"{figures['questions_per_s']} questions/s over {evaluation.wall_s:.1f} s"),
            ("latency", f"p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms of {evaluation.measured} answers"),
        ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn unreadable files and invalid settings into errors of the command line."""
    try:
        yield
    except OSError as error:
        raise _UsageError(f"{error.filename}: {error.strerror}") from error
    except (ExampleError, PassageFileError):
        raise
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _client(args: argparse.Namespace) -> ReaderClient:
    return ReaderClient(
        args.url,
        args.model,
        args.timeout_s,
        ssl=args.ssl,
        root_certificates=args.root_certificates,
        private_key=args.private_key,
        certificate_chain=args.certificate_chain,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clients",
        description="Ask a served FiD or FiDO reader.",
        epilog="Exit codes: 0 all answered, 1 a request failed, 2 wrong command line or file, 3 every request failed, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="ask one question", description="Ask one question and print the answer.")
    ask.set_defaults(command=_ask)
    ask.add_argument("--question", required=True, help="the question, without any prompt words")
    ask.add_argument(
        "--passages",
        required=True,
        metavar="FILE",
        help='JSON list (or JSONL) of strings or {"title", "text"}, or text with one passage a line; - is stdin',
    )
    ask.add_argument("--min-new-tokens", type=_whole_number(0), metavar="N", help="minimum number of answer tokens")
    ask.add_argument("--stream", action="store_true", help="print the answer while it is generated (by MODEL_stream)")

    evaluation = commands.add_parser(
        "evaluate",
        help="ask the questions of a data set and score the answers",
        description="Ask every question of a data set in FiD's format and print exact match, throughput and latency.",
    )
    evaluation.set_defaults(command=_evaluate)
    evaluation.add_argument("data", metavar="DATA", help="a .jsonl or .json file in FiD's format")
    evaluation.add_argument("--concurrency", type=_whole_number(1), default=8, metavar="N", help="requests in flight (default: 8)")
    evaluation.add_argument("--n-passages", type=_whole_number(1), metavar="K", help="the first K passages of each question (default: all)")
    evaluation.add_argument("--limit", type=_whole_number(1), metavar="N", help="the first N questions (default: all)")
    evaluation.add_argument(
        "--warmup",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="leave the first N questions out of throughput and latency (default: 0)",
    )
    evaluation.add_argument("--predictions", metavar="OUT", help="write one JSON line per question to this file")

    for command in (ask, evaluation):
        command.add_argument("--model", default="fido", help="fid or fido (default: fido)")
        command.add_argument("--url", default="127.0.0.1:8001", help="host:port of Triton's gRPC endpoint (default: 127.0.0.1:8001)")
        command.add_argument(
            "--timeout-s", type=float, default=60.0, metavar="S", help="time-out of one request in seconds (default: 60; inf: none)"
        )
        command.add_argument(
            "--max-new-tokens", type=_whole_number(1), metavar="N", help="maximum number of answer tokens, with the end token"
        )
        command.add_argument("--json", action="store_true", help="print JSON; it is the last line of standard output")
        tls = command.add_argument_group("encryption")
        tls.add_argument("--ssl", action="store_true", help="encrypt the connection")
        tls.add_argument("--root-certificates", metavar="PEM", help="trusted certificates (default: gRPC's)")
        tls.add_argument("--private-key", metavar="PEM", help="the client's key, for servers that require a client certificate")
        tls.add_argument("--certificate-chain", metavar="PEM", help="the client's certificate, with --private-key")
    return parser


def _whole_number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {minimum}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
