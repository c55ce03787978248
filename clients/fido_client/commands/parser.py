"""The command fido-client: `ask` asks one question, `evaluate` compares readers on a data set.

Exit codes: 0 every request was answered, 1 a request failed, a file is wrong or the server is not available, 2 an unknown option, 130
interrupted, 141 the reader of standard output went away. Answers and results go to standard output, progress and errors to standard error.
With --json the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from ..data.json_values import DataFileError
from .ask import ask
from .common import EXIT_INTERRUPTED, EXIT_PIPE_CLOSED, EXIT_USAGE, UsageError
from .evaluate import evaluate_readers


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in `fido-client ... | head -1`
        _discard_output()
        return EXIT_PIPE_CLOSED


def _run(argv: list[str] | None) -> int:
    try:
        try:
            args = _parser().parse_args(argv)
        except SystemExit:
            sys.stdout.flush()  # of --help: a closed pipe is noticed here, not at the interpreter's end
            raise
        args.url = args.url or ("127.0.0.1:8001" if args.transport == "grpc" else "127.0.0.1:8000")
        code: int = args.command(args)
        return code
    except (UsageError, DataFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _discard_output() -> None:
    """Send what is still buffered to nowhere: Python would report it as an error at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fido-client",
        description="Ask a served FiD or FiDO reader.",
        epilog="Exit codes: 0 all answered, 1 a request or a file failed, or no server, 2 unknown option, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("ask", help="ask one question", description="Ask one question and print the answer.")
    one.set_defaults(command=ask)
    one.add_argument("--question", required=True, help="the question, without any prompt words")
    one.add_argument(
        "--passages",
        required=True,
        metavar="FILE",
        help='JSON list (or JSONL) of strings or {"title", "text"}, or text with one passage a line; - is stdin',
    )
    one.add_argument("--min-new-tokens", type=_whole_number(0), metavar="N", help="minimum number of answer tokens")
    one.add_argument(
        "--num-answers", type=_whole_number(1), metavar="N", help="answers to print, at most --num-beams, or as many as are allowed"
    )
    one.add_argument("--length-penalty", type=float, metavar="X", help="order answers by log-prob / tokens ** X (default: 1)")
    one.add_argument(
        "--allowed-answers", nargs="+", metavar="TEXT", help="answer with the most probable of these (with --num-beams: found by beams)"
    )
    one.add_argument(
        "--keep-encoder-tokens", type=float, metavar="SHARE", help="go on with this share of the encoder tokens after --drop-after tokens"
    )
    one.add_argument("--keep-passages", type=_whole_number(1), metavar="N", help="go on with the N passages that weigh most")
    one.add_argument("--drop-after", type=_whole_number(1), metavar="N", help="tokens of the answer before that (default: 1)")
    one.add_argument("--stream", action="store_true", help="print the answer while it is generated (by MODEL_stream)")

    evaluation = commands.add_parser(
        "evaluate",
        help="ask the questions of a data set and score the answers",
        description=(
            "Ask every question of a data set in FiD's format and print exact match, F1, throughput and latency. "
            "Several readers are asked one after another and compared."
        ),
    )
    evaluation.set_defaults(command=evaluate_readers)
    evaluation.add_argument("data", metavar="DATA", help="a .jsonl or .json file in FiD's format")
    evaluation.add_argument("--concurrency", type=_whole_number(1), default=8, metavar="N", help="requests in flight (default: 8)")
    evaluation.add_argument(
        "--max-passages",
        "--n-passages",
        type=_whole_number(1),
        metavar="N",
        help="send the first N passages of each question (default: all)",
    )
    evaluation.add_argument("--limit", type=_whole_number(1), metavar="N", help="the first N questions (default: all)")
    evaluation.add_argument(
        "--warmup",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="leave the first N questions out of throughput and latency (default: 0)",
    )
    evaluation.add_argument("--predictions", metavar="OUT", help="write one JSON line per question to this file")

    for command in (one, evaluation):
        command.add_argument("--num-beams", type=_whole_number(1), metavar="N", help="beams of a beam search (default: a greedy answer)")
    one.add_argument("--model", default="fido", help="the reader's name on the server (default: fido)")
    evaluation.add_argument(
        "--model",
        nargs="+",
        default=["fido"],
        metavar="NAME",
        help="the names of one or more readers (default: fido); several are compared",
    )
    for command in (one, evaluation):
        command.add_argument(
            "--url",
            help="host:port of Triton, or several by commas (default: 127.0.0.1:8001, its gRPC endpoint; with --transport http :8000)",
        )
        command.add_argument("--transport", choices=("grpc", "http"), default="grpc", help="default: grpc")
        command.add_argument(
            "--timeout-s", type=float, default=60.0, metavar="S", help="time-out of one request in seconds (default: 60; inf: none)"
        )
        command.add_argument(
            "--retries",
            type=_whole_number(0),
            default=0,
            metavar="N",
            help="send a request again up to N times while the server is not available, within its time-out (default: 0)",
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
