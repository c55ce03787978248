"""`python -m perf.served.workload`: seeded requests with stated distributions of passages, prompt tokens and answer tokens.

In: a name of `WORKLOADS` and a reader, for its tokenizer. Out: perf_analyzer's input data (`--input-data`): questions with passages and a
forced answer length, so that random and trained weights do the same work. Passages consist of words of one token each, so their length in
tokens is exact.

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
from typing import Any

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
    """Write perf_analyzer's input data; return the number of requests."""
    entries = [request.as_perf_analyzer() for request in requests]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": entries}) + "\n", encoding="utf-8")
    return len(entries)


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


if __name__ == "__main__":
    sys.exit(main())
