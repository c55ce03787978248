"""`python -m perf.bounds.elimination`: what dropping encoder tokens costs in exact match and saves in time and memory, on a CPU.

Exact match is that of the demo readers on held-out questions, in this process, over the share of encoder tokens that stay and over the
passages that stay. Time and memory are those of the decoder alone, for one question of random hidden states: the steps of an answer, all
variants in turn, and the bytes of keys and values at its end. Excluded: tokenization, encoder, Triton. Writes
perf/results/cpu/token_elimination.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo import ENGINES
from fido_client.data.examples import Example, read_examples
from fido_client.metrics import exact_match
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.load import load_decoder
from serving.pipeline.elimination import Elimination, EliminationOptions
from serving.pipeline.in_process import InProcessReader

from .machine import describe
from .statistics import publish, spread

SHARES, AFTER = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05), (1, 2)
PASSAGES = (5, 3, 2, 1)
IN_FLIGHT = 8
EOS_FORBIDDEN = -1e9


def exact_matches(reader: InProcessReader, examples: list[Example], options: EliminationOptions | None) -> float:
    """Percent of the questions that are answered right."""

    def is_right(example: Example) -> bool:
        texts, titles = [c.text for c in example.contexts], [c.title or "" for c in example.contexts]
        return exact_match(reader.answer(example.question, texts, titles, elimination=options).text, example.answers)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        return round(100 * sum(pool.map(is_right, examples)) / len(examples), 2)


def curves(engines: Path, examples: list[Example]) -> dict[str, Any]:
    """Exact match of one reader without elimination, by share after each number of tokens, and by passages that stay."""
    with InProcessReader(engines) as reader:
        found: dict[str, Any] = {"all": exact_matches(reader, examples, None)}
        for after in AFTER:
            by_share = {str(share): exact_matches(reader, examples, EliminationOptions(after, share)) for share in SHARES}
            found[f"keep_encoder_tokens, drop_after {after}"] = by_share
        found["keep_passages, drop_after 1"] = {
            str(count): exact_matches(reader, examples, EliminationOptions(1, 1.0, count)) for count in PASSAGES
        }
    return found


def decoding(engines: Path, passages: int, new_tokens: list[int], shares: list[float], rounds: int) -> dict[str, Any]:
    """Seconds of all steps of an answer, and megabytes of the caches at its end, by answer's length and share."""
    manifest = Manifest.load(engines)
    length = manifest.prompt.passage_length
    hidden = np.random.default_rng(0).standard_normal((passages * length, manifest.sizes.d_model_encoder)).astype(np.float32) * 0.1
    positions = np.arange(len(hidden), dtype=np.int32)
    found: dict[str, Any] = {}
    for count in new_tokens:
        seconds: dict[float, list[float]] = {share: [] for share in shares}
        megabytes: dict[float, float] = {}
        for _ in range(rounds):
            for share in shares:
                decoder: Any = load_decoder(engines, manifest, Limits(slots=1))
                decoder.admit(0, 0, hidden, positions)
                elimination = Elimination(EliminationOptions(1, share), np.full(passages, length))
                token, penalty = np.zeros(1, np.int32), np.full(1, EOS_FORBIDDEN, np.float32)
                started = time.perf_counter()
                for step in range(count):
                    token, _, attention = decoder.step(token, np.full(1, step, np.int32), penalty)
                    if step == 0 and (kept := elimination.kept_after(attention[0, : len(hidden)])) is not None:
                        decoder.keep(0, 1, kept)
                seconds[share].append(time.perf_counter() - started)
                megabytes[share] = round(decoder.reserved_bytes() / 1e6, 1)
        found[str(count)] = {str(share): {"decoding_s": spread(seconds[share]), "kv_mb": megabytes[share]} for share in shares}
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.bounds.elimination", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=Path, default=ENGINES, help="folder with the demo's engines of fid and fido")
    parser.add_argument("--data", type=Path, default=Path("build/corpus/heldout.jsonl"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--speed", nargs="*", default=[], metavar="NAME=ENGINES", help="readers whose decoder is timed")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("perf/results/cpu/token_elimination.json"))
    arguments = parser.parse_args(argv)
    examples = list(read_examples(arguments.data, limit=arguments.questions))
    result: dict[str, Any] = {"exact_match": {}, "decoding": {}, "questions": len(examples), "passages": arguments.passages}
    for name in ("fid", "fido"):
        result["exact_match"][name] = curves(arguments.engines / name, examples)
        print(name, result["exact_match"][name], file=sys.stderr, flush=True)
    for pair in arguments.speed:
        name, _, engines = pair.partition("=")
        sizes = (arguments.passages, arguments.new_tokens, arguments.shares, arguments.rounds)
        result["decoding"][name] = decoding(Path(engines), *sizes)
        print(name, result["decoding"][name], file=sys.stderr, flush=True)
    publish(result | {"machine": describe()}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
