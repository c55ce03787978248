"""`make demo`: start Triton with both demo readers, ask each three questions about countries outside their training set, stop.

The questions and passages come from the held-out part of the corpus; both readers answer all three correctly. `make evaluate` measures
accuracy on all held-out questions. Nothing is retrieved here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clients.examples import read_examples
from clients.metrics import exact_match
from clients.reader_client import ReaderClient
from examples.demo_readers import READERS, REPOSITORY
from serving.launcher.server import TritonServer, models_of

HELDOUT = Path("build/corpus/heldout.jsonl")
QUESTION_IDS = ("Australia/capital", "Burma/highest point", "Botswana/currency")


def main() -> int:
    """Ask, print and count; return exit code 0 if all answers are right."""
    examples = {example.id: example for example in read_examples(HELDOUT)}
    questions = [examples[name] for name in QUESTION_IDS]
    right = 0
    print("starting Triton ...", flush=True)
    with TritonServer(models_of(READERS, stream=False), REPOSITORY) as server:
        for reader in READERS:
            with ReaderClient(server.grpc_url, reader) as client:
                for example in questions:
                    answer = client.answer(example.question, [context.as_passage() for context in example.contexts])
                    ok = exact_match(answer.text, example.answers)
                    right += ok
                    mark = "right" if ok else f"wrong, wanted {example.answers[0]!r}"
                    print(f"{reader:5} {example.question}\n      -> {answer.text}  ({answer.latency_s * 1e3:.0f} ms, {mark})", flush=True)
    total = len(questions) * len(READERS)
    print(f"demo: {right} of {total} answers right")
    return 0 if right == total else 1


if __name__ == "__main__":
    sys.exit(main())
