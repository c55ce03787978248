"""`python -m perf.served.workload`: seeded requests with stated distributions of passages, prompt tokens and answer tokens.

In: a name of `WORKLOADS` and a reader, for its tokenizer. Out: perf_analyzer's input data (`--input-data`), or AIPerf's (`--input-file`) if
the name ends in .jsonl: questions with passages and a forced answer length, so that random and trained weights do the same work. Passages
consist of words of one token each, so their length in tokens is exact.

The workload `real` is different: it has the questions, passages and titles of a data file, and the reader decides the answer's length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from fido_client.data.examples import Example, ExampleError, read_examples
from serving.contract.manifest import TOKENIZER_FILE, Manifest, ManifestError
from serving.pipeline.prompt import PromptEncoder

QUESTION_WORDS = 8
FIRST_ORDINARY_TOKEN = 3  # the first three of T5 are padding, end and unknown
MAX_WORDS = 4096  # distinct words; more would not vary the texts further
REAL = "real"


class WorkloadError(ValueError):
    """A workload that this reader cannot run."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The uniform distribution of whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, numbers: random.Random) -> int:
        """Draw one number."""
        return numbers.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


def uniform(text: str) -> Uniform:
    """Parse "40" or "1..40".

    Raises:
        ValueError: it is neither, or a bound is below 1.
    """
    low, _, high = text.partition("..")
    found = Uniform(int(low), int(high or low))
    if not 1 <= found.low <= found.high:
        raise ValueError(f"{text}: wanted 1 <= low <= high")
    return found


def exactly(value: int) -> Uniform:
    """Always the same number."""
    return Uniform(value, value)


@dataclasses.dataclass(frozen=True)
class WorkloadSpec:
    """The distributions of a synthetic workload.

    Attributes:
        passages: number per question.
        passage_tokens: length of a passage's prompt, with question and end token: of its row in the encoder.
        new_tokens: forced length of the answer.
    """

    passages: Uniform
    passage_tokens: Uniform
    new_tokens: Uniform

    def __str__(self) -> str:
        return f"{self.passages} passages x {self.passage_tokens} tokens, answers of {self.new_tokens} tokens"


WORKLOADS = {
    "paper": WorkloadSpec(exactly(40), exactly(256), exactly(32)),  # FiDO (de Jong et al., 2022), section 5
    "long_answers": WorkloadSpec(exactly(40), exactly(256), exactly(512)),
    "many_passages": WorkloadSpec(exactly(100), exactly(256), exactly(32)),
    "mixed": WorkloadSpec(Uniform(1, 40), Uniform(48, 256), Uniform(1, 64)),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to a served model; `new_tokens` forces the answer's length, None leaves it to the reader."""

    question: str
    passages: tuple[str, ...]
    titles: tuple[str, ...] | None = None
    new_tokens: int | None = None

    def as_perf_analyzer(self) -> dict[str, Any]:
        """The request as an entry of perf_analyzer's input data, without the optional inputs that are not set."""
        entry: dict[str, Any] = {"question": [self.question], "passages": {"content": list(self.passages), "shape": [len(self.passages)]}}
        if self.titles is not None:
            entry["titles"] = {"content": list(self.titles), "shape": [len(self.titles)]}
        if self.new_tokens is not None:
            entry |= {"max_new_tokens": [self.new_tokens], "min_new_tokens": [self.new_tokens]}
        return entry

    def as_aiperf(self) -> dict[str, Any]:
        """The request as an entry of AIPerf's data set "single_turn"; AIPERF_TEMPLATE makes the body of /generate of it."""
        texts = {"query": [self.question], "passages": list(self.passages), "titles": list(self.titles or ())}
        entry: dict[str, Any] = {"texts": [{"name": name, "contents": contents} for name, contents in texts.items() if contents]}
        if self.new_tokens is not None:
            entry["extra"] = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        return entry


# AIPerf reads a "single_turn" data set's texts by these names and adds the entry's "extra" to the body.
AIPERF_TEMPLATE = (
    '{"question": {{ query|tojson }}, "passages": {{ passages|tojson }}'
    '{% if texts_by_name.titles %}, "titles": {{ texts_by_name.titles|tojson }}{% endif %}}'
)


class RequestMaker:
    """Makes requests of exact lengths for one reader.

    Args:
        tokenizer: the reader's.
        manifest: the reader's; its prompt counts towards a length.

    Raises:
        WorkloadError: the tokenizer has no words of one token.
    """

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest):
        self._tokenizer, self._prompt, self._encoder = tokenizer, manifest.prompt, PromptEncoder(tokenizer, manifest)
        self._words = _single_token_words(tokenizer)
        if not self._words:
            raise WorkloadError("tokenizer: wanted words of one token each, got none; use a data file (real) instead")

    def make(self, spec: WorkloadSpec, count: int, seed: int) -> Iterator[Request]:
        """`count` requests, the same ones for the same seed.

        Raises:
            WorkloadError: passage_tokens exceeds the reader's passage_length, or is too short for question and prompt.
        """
        if spec.passage_tokens.high > self._prompt.passage_length:
            raise WorkloadError(
                f"passage_tokens: wanted at most the reader's passage_length={self._prompt.passage_length}, got {spec.passage_tokens}; "
                "export it with a larger --passage-length or lower --passage-tokens"
            )
        numbers = random.Random(seed)
        for _ in range(count):
            question = self._text(numbers, QUESTION_WORDS)
            frame = self._prompt_tokens(question)
            if spec.passage_tokens.low <= frame:
                raise WorkloadError(f"passage_tokens: wanted more than the {frame} of question and prompt, got {spec.passage_tokens}")
            lengths = [spec.passage_tokens.draw(numbers) for _ in range(spec.passages.draw(numbers))]
            passages = tuple(self._text(numbers, length - frame) for length in lengths)
            yield Request(question, passages, None, spec.new_tokens.draw(numbers))

    def lengths(self, request: Request) -> list[int]:
        """Tokens of each passage's row in the encoder, as the server counts them."""
        mask = self._encoder.encode(request.question, request.passages, request.titles).attention_mask
        return [int(length) for length in mask.sum(axis=1)]

    def _text(self, numbers: random.Random, words: int) -> str:
        return " ".join(numbers.choice(self._words) for _ in range(words))

    def _prompt_tokens(self, question: str) -> int:
        """Tokens of a row without its passage, measured with a one-word passage: the template's last token may merge with its first."""
        return self.lengths(Request(question, (self._words[0],)))[0] - 1


def _single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Words that are one token each between other words, in the order of their ids."""
    candidates = []
    for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = piece.removeprefix("▁")
        if word.isascii() and word.isalnum():
            candidates.append(word)
    candidates = list(dict.fromkeys(candidates))  # "the" and "▁the" are one word
    around = candidates[:1]
    base = len(tokenizer.encode(" ".join(2 * around), add_special_tokens=False).ids)
    found = []
    for word in candidates:
        if len(tokenizer.encode(" ".join([*around, word, *around]), add_special_tokens=False).ids) == base + 1:
            found.append(word)
        if len(found) == MAX_WORDS:
            break
    return found


def requests_from(examples: Iterable[Example]) -> Iterator[Request]:
    """The questions of a data file, unchanged."""
    for example in examples:
        titles = tuple(context.title or "" for context in example.contexts)
        yield Request(example.question, tuple(context.text for context in example.contexts), titles if any(titles) else None)


def random_token_ids(spec: WorkloadSpec, count: int, seed: int, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Questions as random token ids of the workload's lengths; the same ones for the same seed.

    Returns:
        For each question: input_ids and attention_mask (1 = attend), each int32[n_passages, passage_length], and the answer's length.
    """
    numbers, rng = random.Random(seed), np.random.default_rng(seed)
    questions = []
    for _ in range(count):
        lengths = np.array([spec.passage_tokens.draw(numbers) for _ in range(spec.passages.draw(numbers))])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int32)
        ids = (rng.integers(FIRST_ORDINARY_TOKEN, vocab_size, mask.shape) * mask).astype(np.int32)
        questions.append((ids, mask, spec.new_tokens.draw(numbers)))
    return questions


def write_input_data(requests: Iterable[Request], path: Path) -> int:
    """Write perf_analyzer's input data, or AIPerf's where the path ends in .jsonl, with its template beside it; return the number."""
    requests = list(requests)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(request.as_aiperf()) + "\n" for request in requests), encoding="utf-8")
        path.with_suffix(".jinja").write_text(AIPERF_TEMPLATE + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps({"data": [request.as_perf_analyzer() for request in requests]}) + "\n", encoding="utf-8")
    return len(requests)


def main(argv: list[str] | None = None) -> int:
    """Write one workload; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.served.workload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=[*WORKLOADS, REAL])
    parser.add_argument("--reader", type=Path, required=True, help="version directory of a served reader: its manifest and tokenizer")
    parser.add_argument("--data", type=Path, help="for real: a file in FiD's format")
    for field in dataclasses.fields(WorkloadSpec):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=uniform, metavar="N[..N]", help="replaces the workload's own")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    if arguments.workload == REAL and arguments.data is None:
        parser.error("real: name the data file with --data")
    try:
        if arguments.workload == REAL:
            requests = list(requests_from(read_examples(arguments.data, limit=arguments.requests)))
            what = f"questions of {arguments.data}"
        else:
            manifest = Manifest.load(arguments.reader)
            maker = RequestMaker(Tokenizer.from_file(str(arguments.reader / TOKENIZER_FILE)), manifest)
            overrides = {f.name: value for f in dataclasses.fields(WorkloadSpec) if (value := getattr(arguments, f.name))}
            spec = dataclasses.replace(WORKLOADS[arguments.workload], **overrides)
            requests = list(maker.make(spec, arguments.requests, arguments.seed))
            what = f"{spec}, seed {arguments.seed}"
        written = write_input_data(requests, arguments.out)
    except (WorkloadError, ExampleError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {written} requests: {what}")
    return 0


# The load points of `make perf` and `make gpu-bench`: one plan for a small machine, one for a GPU. Nothing is measured here.

Mode = Literal["concurrency", "request_rate"]


@dataclasses.dataclass(frozen=True)
class Series:
    """Load points of one workload.

    Attributes:
        workload: its name in tables and files.
        spec: of synthetic requests; None: the questions of the data file.
        concurrency: questions in flight (closed loop), one point for each.
        request_rate: questions sent per second (open loop), one point for each.
        streaming: questions in flight of the streaming model, one point for each.
        requests: measured at each point, without warm-up and tail; half as many at a request rate.
        alone: measured at concurrency 1, where latencies vary less.
        turns: answers of each place in flight, at least; points with few of them are not steady, as equal answers end together.
    """

    workload: str
    spec: WorkloadSpec | None
    concurrency: tuple[int, ...] = ()
    request_rate: tuple[float, ...] = ()
    streaming: tuple[int, ...] = ()
    requests: int = 120
    alone: int = 120
    turns: int = 0

    def points(self) -> list[tuple[Mode, float, bool]]:
        """Mode, load and streaming flag of each point."""
        unary: list[tuple[Mode, float, bool]] = [("concurrency", load, False) for load in self.concurrency]
        rates: list[tuple[Mode, float, bool]] = [("request_rate", load, False) for load in self.request_rate]
        return unary + rates + [("concurrency", load, True) for load in self.streaming]


def _synthetic(passages: int, tokens: Uniform, new_tokens: int) -> WorkloadSpec:
    return WorkloadSpec(exactly(passages), tokens, exactly(new_tokens))


def cpu_plan(passage_length: int) -> tuple[Series, ...]:
    """For the demo readers on a few cores. The first series of a plan is the main workload, which the verdict is about."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("demo", _synthetic(10, full, 32), (1, 8, 16, 64), (8.0, 16.0), (1, 8)),
        Series("answers_128", _synthetic(10, full, 128), (8,), requests=48),
        Series("answers_512", _synthetic(10, full, 512), (8,), requests=24),
        Series("passages_5", _synthetic(5, full, 32), (4,), requests=60),
        Series("passages_20", _synthetic(20, full, 32), (4,), requests=40),
        Series("passages_40", _synthetic(40, full, 32), (4,), requests=24),
        Series("padding", _synthetic(10, ragged, 32), (4,), requests=80),
        Series(REAL, None, (4,), requests=100),
    )


def gpu_plan(passage_length: int) -> tuple[Series, ...]:
    """For base-size readers on a GPU: the paper's workload first, then longer answers, other numbers of passages, ragged passages."""
    full, ragged = exactly(passage_length), Uniform(passage_length // 3, passage_length)
    return (
        Series("paper", _synthetic(40, full, 32), (1, 16, 64, 128), (80.0,), (16,), requests=256, alone=40, turns=12),
        Series("answers_128", _synthetic(40, full, 128), (64,), turns=12),
        Series("answers_512", _synthetic(40, full, 512), (64,), turns=12),
        Series("passages_10", _synthetic(10, full, 32), (64,), turns=12),
        Series("padding", _synthetic(40, ragged, 32), (64,), turns=12),
    )


def paper_plan(passage_length: int) -> tuple[Series, ...]:
    """The paper's workload alone, for a base-size reader on a GPU: one question at a time, and a full server."""
    return (Series("paper", _synthetic(40, exactly(passage_length), 32), (1, 64, 128), requests=384, alone=30),)


def smoke_plan(passage_length: int) -> tuple[Series, ...]:
    """Every kind of point once, as small as possible, for the tests."""
    full = exactly(passage_length)
    return (Series("demo", _synthetic(2, full, 4), (2,), (20.0,), (1,), requests=12),)


# "card" is the former name of "gpu", kept for one release
PLANS = {"cpu": cpu_plan, "gpu": gpu_plan, "card": gpu_plan, "paper": paper_plan, "smoke": smoke_plan}


if __name__ == "__main__":
    sys.exit(main())
VARIANTS = ("fp8",)  # precisions beside that of a run, which have files of their own in its folder
