"""Reference questions: what the suite asks, and the answers it must get, before, beside and after every fault."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import service_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.data.examples import read_examples
from fido_client.request import ReaderRequest, infer_message_from_tensors, tensors_from_request
from serving.contract.limits import Limits

READERS = ("fid", "fido")
LOG_PROB_TOLERANCE = 1e-2  # of an answer's sum: steps in company add in another order


@dataclasses.dataclass
class Case:
    """One question to one reader; `text`, `tokens`, `log_prob` and `answers` are what an undisturbed server answered.

    `search`: options of a request that is not greedy, as ReaderRequest names them.
    """

    reader: str
    question: str
    passages: list[str]
    titles: list[str]
    max_new_tokens: int
    min_new_tokens: int
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    answers: tuple[str, ...] = ()
    text: str = ""
    tokens: int = 0
    log_prob: float = 0.0

    def tensors(self, model: str) -> dict[str, np.ndarray]:
        """As READER_TENSORS names them."""
        request = ReaderRequest(self.question, self.passages, self.titles, self.max_new_tokens, self.min_new_tokens, **self.search)
        return tensors_from_request(request, model=model)

    def message(self, model: str) -> service_pb2.ModelInferRequest:
        """The gRPC request."""
        return infer_message_from_tensors(model, self.tensors(model))

    def body(self) -> dict[str, Any]:
        """The JSON for `generate` and `generate_stream`."""
        names = ("question", "passages", "titles", "max_new_tokens", "min_new_tokens")
        return {name: getattr(self, name) for name in names} | self.search

    def fits(self, text: str, tokens: int, log_prob: float, answers: tuple[str, ...] = ()) -> bool:
        """Whether this is the right answer, and all answers of a search are right."""
        return (text, tokens, answers) == (self.text, self.tokens, self.answers) and abs(log_prob - self.log_prob) <= LOG_PROB_TOLERANCE

    def shortened(self) -> Case:
        """The same question to one passage, for an answer of two tokens."""
        return dataclasses.replace(self, passages=self.passages[:1], titles=self.titles[:1], max_new_tokens=2, min_new_tokens=0)

    def with_beams(self, rng: random.Random, limits: Limits) -> Case:
        """The same question, answered by beam search."""
        beams = rng.randint(2, min(limits.max_num_beams, limits.slots))
        return dataclasses.replace(self, search={"num_beams": beams, "num_answers": rng.randint(1, beams)})

    def with_choices(self, rng: random.Random, limits: Limits) -> Case:
        """The same question, answered by one of some runs of its passages' words; all of them are scored, or beams find the best."""
        words = " ".join(self.passages).split()
        starts = [(rng.randrange(len(words)), rng.randint(1, 3)) for _ in range(rng.randint(2, 8))]
        allowed = sorted({" ".join(words[first : first + count]) for first, count in starts})
        search: dict[str, Any] = {"allowed_answers": allowed, "num_answers": rng.randint(1, len(allowed))}
        if rng.random() < 0.3:
            beams = min(limits.max_num_beams, limits.slots, len(allowed))
            search |= {"num_beams": beams, "num_answers": 1}
        return dataclasses.replace(self, search=search, max_new_tokens=limits.max_new_tokens, min_new_tokens=0)

    def with_elimination(self, rng: random.Random) -> Case:
        """The same question, answered from a part of its encoder tokens after a few tokens."""
        search: dict[str, Any] = {"drop_after": rng.randint(1, 3), "keep_encoder_tokens": rng.choice([0.1, 0.5, 0.9])}
        if rng.random() < 0.5:
            search["keep_passages"] = rng.randint(1, len(self.passages))
        return dataclasses.replace(self, search=search)

    def lengthened(self, tokens: int) -> Case:
        """The same question, answered in exactly so many tokens."""
        return dataclasses.replace(self, max_new_tokens=tokens, min_new_tokens=tokens)


def limits_of(repository: Path, reader: str) -> Limits:
    """The bounds that a served reader's configuration states."""
    config = text_format.Parse((repository / reader / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())
    return Limits.from_parameters({key: {"string_value": value.string_value} for key, value in config.parameters.items()})


def keep_encoder_states(repository: Path, reader: str, n_bytes: int) -> None:
    """Have a served reader, and its stream, keep encoder states."""
    for model in (reader, f"{reader}_stream"):
        file = repository / model / "config.pbtxt"
        config = text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
        config.parameters["encoder_cache_bytes"].string_value = str(n_bytes)
        file.write_text(text_format.MessageToString(config), encoding="utf-8")


def word_cases(reader: str, limits: Limits, seed: int, count: int) -> list[Case]:
    """Questions in the words of the tests' tiny tokenizer."""
    rng = random.Random(f"{reader} {seed}")

    def words(most: int) -> str:
        return " ".join(f"w{rng.randrange(80)}" for _ in range(rng.randint(1, most)))

    cases = []
    for _ in range(count):
        n = rng.randint(1, min(6, limits.max_passages))
        texts, titles = [words(30) for _ in range(n)], [words(3) for _ in range(n)]
        most = rng.randint(1, min(30, limits.max_new_tokens))
        cases.append(Case(reader, words(8), texts, titles, most, rng.randint(0, most)))
    return cases


def corpus_cases(reader: str, limits: Limits, seed: int, count: int, data: Path) -> list[Case]:
    """Questions of a data set in FiD's format, with as many passages as it has."""
    examples = list(read_examples(data, n_context=limits.max_passages))
    chosen = random.Random(f"{reader} {seed}").sample(examples, min(count, len(examples)))
    most = min(32, limits.max_new_tokens)
    return [Case(reader, e.question, [c.text for c in e.contexts], [c.title or "" for c in e.contexts], most, 0) for e in chosen]


def largest_case(case: Case, limits: Limits) -> Case:
    """The question with as many and as long passages as its reader takes: the most memory that one request may need."""
    words = " ".join(case.passages) or case.question
    passage = (words * (limits.max_passage_characters // len(words) + 1))[: limits.max_passage_characters]
    return dataclasses.replace(case, passages=[passage] * limits.max_passages, titles=[""] * limits.max_passages)
