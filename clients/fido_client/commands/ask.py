"""`fido-client ask`: one question and a passages file -> the answer on standard output."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from ..answer import Answer, StreamedAnswer
from ..data.passages import read_passages
from ..errors import ReaderError
from ..reader_client import ReaderClient
from .common import EXIT_ALL_FAILED, EXIT_OK, UsageError, client_of, milliseconds, usage_errors

_PASSAGES_SHOWN = 3  # under an answer
_PASSAGE_WIDTH = 100  # characters


def ask(args: argparse.Namespace) -> int:
    """Ask one question, print the answer, return the exit code."""
    with usage_errors():
        passages = read_passages(args.passages)
        client = client_of(args, args.model)
    limits: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.min_new_tokens}
    limits |= {name: getattr(args, name) for name in ("keep_encoder_tokens", "keep_passages", "drop_after")}
    beams = {"num_beams": args.num_beams, "num_answers": args.num_answers, "length_penalty": args.length_penalty}
    beams["allowed_answers"] = args.allowed_answers
    if args.stream and any(value is not None for value in beams.values()):
        options = "--num-beams, --num-answers, --length-penalty and --allowed-answers"
        raise UsageError(f"--stream: a stream has neither beams nor choices; leave out {options}")
    with client:
        try:
            if args.stream:
                answer: Answer = _print_parts(client, args, passages, limits)
            else:
                answer = client.answer(args.question, passages, **limits, **beams)
        except ReaderError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_ALL_FAILED
    print(json.dumps(_answer_json(answer), ensure_ascii=False) if args.json else _answer_text(answer, passages))
    return EXIT_OK


def _print_parts(client: ReaderClient, args: argparse.Namespace, passages: list[Any], limits: dict[str, Any]) -> StreamedAnswer:
    with client.stream(args.question, passages, **limits) as stream:
        started = False
        try:
            for piece in stream:
                if args.json:
                    print(json.dumps({"piece": piece.text, "elapsed_ms": milliseconds(piece.elapsed_s)}, ensure_ascii=False), flush=True)
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
        "latency_ms": milliseconds(answer.latency_s),
    }
    if answer.passage_scores:
        line |= {"passage_scores": list(answer.passage_scores), "token_log_probs": list(answer.token_log_probs)}
    if answer.answers:
        line |= {"answers": list(answer.answers), "answer_log_probs": list(answer.answer_log_probs)}
    if isinstance(answer, StreamedAnswer):
        line["time_to_first_token_ms"] = milliseconds(answer.time_to_first_token_s)
        line["mean_inter_token_ms"] = milliseconds(answer.mean_inter_token_s)
    return line


def _answer_text(answer: Answer, passages: list[Any]) -> str:
    rows = [("log-prob", f"{answer.log_prob:.4f}"), ("tokens", str(answer.tokens)), ("time", f"{milliseconds(answer.latency_s)} ms")]
    if isinstance(answer, StreamedAnswer):
        mean_ms = milliseconds(answer.mean_inter_token_s)
        rows += [
            ("first token", f"{milliseconds(answer.time_to_first_token_s)} ms"),
            ("inter-token", "unknown: a single response" if mean_ms is None else f"{mean_ms} ms on average"),
        ]
    else:
        rows.insert(0, ("answer", answer.text))
    lines = [f"{name:<12} {value}" for name, value in rows]
    if len(answer.answers) > 1:
        lines += ["answers"] + [f"  {log_prob:8.4f}  {text}" for text, log_prob in zip(answer.answers, answer.answer_log_probs)]
    total = sum(answer.passage_scores)
    if total > 0:
        best = sorted(zip(answer.passage_scores, passages), key=lambda pair: -pair[0])[:_PASSAGES_SHOWN]
        lines += ["passages"] + [f"  {100 * score / total:3.0f} %  {_shortened(passage)}" for score, passage in best]
    return "\n".join(lines)


def _shortened(passage: Any) -> str:
    text = f"{passage.get('title', '')}: {passage['text']}" if isinstance(passage, dict) else str(passage)
    return textwrap.shorten(text, _PASSAGE_WIDTH, placeholder=" ...")
