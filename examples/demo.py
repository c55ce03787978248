"""`make demo`: start Triton with both demo readers, ask each three questions about countries outside their training set, stop.

The questions and their passages are in demo_questions.jsonl. `make evaluate` measures accuracy on all held-out questions. Nothing is
retrieved here. Before the last line stands what the set-up cost, as deploy/set_up.py noted it, and how long the server took to start.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from fido_client.data.examples import read_examples
from fido_client.metrics import exact_match
from fido_client.reader_client import ReaderClient
from serving.launcher.server import TritonServer, models_of

# Where the demo readers are exported and served from. A user's own readers are in build/engines and model_repository.

ENGINES = Path("build/demo/engines")
REPOSITORY = Path("build/demo/model_repository")
READERS = ("fid", "fido")


QUESTIONS = Path("examples/demo_questions.jsonl")
SET_UP = Path(sys.prefix, ".serve")  # of deploy/set_up.py


def main() -> int:
    """Ask, print and count; return exit code 0 if all answers are right."""
    questions = list(read_examples(QUESTIONS))
    right, started = 0, time.perf_counter()
    print("starting Triton ...", flush=True)
    with TritonServer(models_of(READERS, stream=False), REPOSITORY) as server:
        start_s = time.perf_counter() - started
        for reader in READERS:
            with ReaderClient(server.grpc_url, reader) as client:
                for example in questions:
                    answer = client.answer(example.question, [context.as_passage() for context in example.contexts])
                    ok = exact_match(answer.text, example.answers)
                    right += ok
                    mark = "right" if ok else f"wrong, wanted {example.answers[0]!r}"
                    print(f"{reader:5} {example.question}\n      -> {answer.text}  ({answer.latency_s * 1e3:.0f} ms, {mark})", flush=True)
    total = len(questions) * len(READERS)
    print(f"{cost_of_set_up()}server started in {start_s:.1f} s")
    print(f"demo: {right} of {total} answers right")
    return 0 if right == total else 1


def cost_of_set_up() -> str:
    """What was downloaded when this environment was made, or nothing where something else made it."""
    try:
        cost = json.loads(SET_UP.read_text(encoding="utf-8"))
        return f"set-up {cost['downloaded_mb']} MB downloaded, {cost['on_disk_mb']} MB on disk, {cost['seconds']:.0f} s; "
    except (OSError, ValueError, KeyError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
