"""Training examples: a question from a question template, its passages, and the answer, as token ids.

In: ``build/corpus/``. Out: arrays of ids for one example at a time (``batches.py`` stacks them).
Passages are tokenized once; a prompt concatenates the question's ids and a passage's ids, which is exact because no
token crosses white space. Only a passage whose text or title is changed is tokenized again.

Counterfactuals teach the reader to read rather than to remember: the country gets another name, the answer another
value, in the question, the titles and the passage alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from training.corpus.templates import ALIASES, LABEL_FRAMES, TRAIN, ask, is_web_query, with_article
from training.corpus.tokenizer import WordEncoder

# The corpus's files: JSON lines, and the human-written questions of the repository.

REAL_QUESTIONS = pathlib.Path(__file__).parents[1] / "data" / "real_questions.json"


def normalized_question(question: str) -> str:
    """The words of a question in lower case, to compare questions."""
    return " ".join(re.findall(r"\w+", question.lower()))


def real_questions() -> list[dict[str, Any]]:
    """The human-written questions of the repository."""
    return json.loads(REAL_QUESTIONS.read_text(encoding="utf-8"))


def write_jsonl(file: pathlib.Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object per line, atomically; return the number of lines."""
    partial = file.with_name(file.name + ".part")
    count = 0
    with partial.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, file)
    return count


def read_jsonl(file: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        FileNotFoundError: If it does not exist; the message names the command that builds it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; build the corpus with: python -m training corpus")
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


EOS_ID = 1
MAX_TARGET_TOKENS = 32

_SYLLABLES = (
    "ba be bi bo bu ka ke ki ko ku da de di do du la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru sa se si so su ta "
    "te ti to tu va ve vi vo zan gar mor lin tar dor ven pol sta land stan ria nia bourg ville ton ham"
).split()


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The distribution that a batch is drawn from.

    Attributes:
        n_passages: Passages of each example.
        curated: Share of examples that ask a relation in a hand-written question template; the others ask a field's label.
        counterfactual: Share of examples with an invented name or another value.
        all_renamed: Share of examples in which every country gets another name. Where only the asked country is renamed, a
            reader may learn to pick the name that it does not know; of several unknown names it must find the asked one.
    """

    n_passages: int
    curated: float
    counterfactual: float
    all_renamed: float = 0.0


@dataclasses.dataclass
class Example:
    """One example before tokenization: ``texts[gold]`` contains ``answer``."""

    question: str
    answer: str
    titles: list[str]
    texts: list[str]
    positions: list[int | None]  # of the unchanged passages in the corpus; None if title or text was changed
    gold: int


class ExampleSource:
    """Draws examples from the training part of the corpus."""

    def __init__(self, corpus: pathlib.Path, tokenizer: Tokenizer, passage_length: int):
        """Read and tokenize the corpus.

        Args:
            corpus: Directory from ``python -m training corpus``.
            tokenizer: Its ``tokenizer.json``.
            passage_length: Tokens of each prompt, end token included; longer prompts are truncated.
        """
        self.words = WordEncoder(tokenizer)
        self.passage_length = passage_length
        self.passages = read_jsonl(corpus / "passages.jsonl")
        countries = json.loads((corpus / "countries.json").read_text(encoding="utf-8"))
        self.adjectives = {name: fields["adjective"] for name, fields in countries.items()}
        self.held_out = {name for name, fields in countries.items() if fields["held_out"]}
        facts = read_jsonl(corpus / "train.jsonl")
        self.curated = [fact for fact in facts if fact["curated"] and self._fits(fact)]
        self.labels = [fact for fact in facts if not fact["curated"] and self._fits(fact)]
        # Relations have at most one fact per country, some far fewer: drawing the relation first balances them.
        self._by_relation: dict[str, list[dict[str, Any]]] = {}
        for fact in self.curated:
            self._by_relation.setdefault(fact["relation"], []).append(fact)
        self._relations = sorted(self._by_relation)
        self._values: dict[str, list[str]] = {}
        for fact in self.curated + self.labels:
            self._values.setdefault(fact["relation"], []).append(fact["answer"])
        self._by_country: dict[str, list[int]] = {}
        self._by_field: dict[str, list[int]] = {}
        for position, passage in enumerate(self.passages):
            if passage["country"] not in self.held_out:
                self._by_country.setdefault(passage["country"], []).append(position)
                self._by_field.setdefault(passage["field"], []).append(position)
        self._all = [position for positions in self._by_country.values() for position in positions]
        self._tails = self.words.encode_all([self._tail(passage) for passage in self.passages])
        self._names = self._proper_names()
        self._asked_by_people = {normalized_question(real["question"]) for real in real_questions()}

    @staticmethod
    def _tail(passage: dict[str, Any]) -> str:
        return f"title: {passage['country']}: {passage['field']} context: {passage['text']}"

    def _fits(self, fact: dict[str, Any]) -> bool:
        # The answer must be within the prompt's tokens, with a question of usual length.
        passage = self.passages[fact["gold"]]
        before = self._tail({**passage, "text": passage["text"][: fact["start"] + len(fact["answer"])]})
        return len(self.words.encode(before)) <= self.passage_length - 22 and len(self.words.encode(fact["answer"])) < MAX_TARGET_TOKENS

    def _proper_names(self) -> list[str]:
        # Capitalized words of the training part: real names, so they tokenize like names.
        found: dict[str, None] = {}
        for position in self._all:
            for word in self.passages[position]["text"].split():
                word = word.strip("(),;:.\"'")
                if 3 < len(word) < 14 and word.isalpha() and word[0].isupper():
                    found[word] = None
        return list(found)

    def _invented_name(self, rng: random.Random) -> str:
        def word() -> str:
            if rng.random() < 0.5:
                return rng.choice(self._names)
            return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()

        return " ".join(word() for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))

    def _other_names(self, rng: random.Random, countries: list[str]) -> dict[str, str]:
        """Each country's other name: words of the trained passages that name countries, invented ones, or another's."""
        partners = [value for relation in ("neighbour", "export partner", "import partner") for value in self._values.get(relation, [])]
        names: dict[str, str] = {}
        for country in dict.fromkeys(countries):
            draw = rng.random()
            if draw < 0.35 and partners:
                name = rng.choice(partners)
            elif draw < 0.5:
                name = rng.choice(list(self._by_country))
            elif draw < 0.6 and names:
                # "North" and "South" of the same name: one word distinguishes them
                name = f"{rng.choice(('North', 'South', 'East', 'West', 'New', 'Upper'))} {rng.choice(list(names.values())).split()[-1]}"
            else:
                name = self._invented_name(rng)
            while name in names.values():
                name = self._invented_name(rng)
            names[country] = name
        return names

    def _question(self, rng: random.Random, fact: dict[str, Any], name: str, *, renamed: bool) -> str:
        country = self.passages[fact["gold"]]["country"]
        for _ in range(20):
            template = rng.choice(TRAIN[fact["relation"]] if fact["curated"] else LABEL_FRAMES)
            adjective = None if renamed else self.adjectives[country]
            if "{a}" in template and adjective is None:
                continue
            spoken = name
            if not template.startswith("{c}") and rng.random() < 0.85:
                spoken = with_article(name)
            if not renamed and country in ALIASES and rng.random() < 0.25:
                spoken = rng.choice(ALIASES[country])
            question = ask(template, spoken, adjective, fact["relation"])
            # People type without capitals and question marks, whatever the template.
            if not is_web_query(template) and rng.random() < 0.25:
                question = question.lower()
            if rng.random() < 0.15:
                question = question.rstrip("?.") if question[-1] in "?." else question + "?"
            if normalized_question(question) not in self._asked_by_people:
                return question
        return f"{name}: {fact['relation']}?"

    def _distractors(self, rng: random.Random, fact: dict[str, Any], count: int) -> list[int]:
        passage = self.passages[fact["gold"]]
        hard = fact["distractors"][: max(count, 12)]
        chosen: dict[int, None] = {}
        # Mostly BM25's results; the rest are other fields of the same country and the same field of other countries.
        for _ in range(4 * count):
            if len(chosen) == count:
                break
            draw = rng.random()
            if draw < 0.7 and hard:
                position = rng.choice(hard)
            elif draw < 0.82:
                position = rng.choice(self._by_country[passage["country"]])
            elif draw < 0.94:
                position = rng.choice(self._by_field[passage["field"]])
            else:
                position = rng.choice(self._all)
            if position != fact["gold"]:
                chosen[position] = None
        while len(chosen) < count:
            position = rng.choice(self._all)
            if position != fact["gold"]:
                chosen[position] = None
        return list(chosen)

    def draw(self, rng: random.Random, mixture: Mixture) -> Example:
        """One example, determined by ``rng``."""
        if rng.random() < mixture.curated:
            fact = rng.choice(self._by_relation[rng.choice(self._relations)])
        else:
            fact = rng.choice(self.labels)
        gold_passage = self.passages[fact["gold"]]
        country, text, answer = gold_passage["country"], gold_passage["text"], fact["answer"]
        draw = rng.random()
        all_renamed = draw < mixture.all_renamed
        counterfactual = not all_renamed and rng.random() < mixture.counterfactual
        renamed = counterfactual and rng.random() < 0.75
        revalued = (counterfactual and (not renamed or rng.random() < 0.75)) or (all_renamed and rng.random() < 0.3)
        positions: list[int | None] = [fact["gold"], *self._distractors(rng, fact, mixture.n_passages - 1)]
        rng.shuffle(positions)
        gold = positions.index(fact["gold"])
        passages = [self.passages[position] for position in positions if position is not None]
        titles = [f"{passage['country']}: {passage['field']}" for passage in passages]
        texts = [passage["text"] for passage in passages]
        names: dict[str, str] = {}
        if all_renamed:
            names = self._other_names(rng, [passage["country"] for passage in passages])
        elif renamed:
            names = {country: self._invented_name(rng)}
        if revalued:
            answer = self._other_value(rng, fact)
            texts[gold] = text[: fact["start"]] + answer + text[fact["start"] + len(fact["answer"]) :]
            positions[gold] = None
        for i, passage in enumerate(passages):
            if passage["country"] in names:
                titles[i] = f"{names[passage['country']]}: {passage['field']}"
                positions[i] = None
        question = self._question(rng, fact, names.get(country, country), renamed=bool(names))
        return Example(question, answer, titles, texts, positions, gold)

    def draw_fitting(self, rng: random.Random, mixture: Mixture, passage_length: int) -> Example:
        """An example whose answer is within the first ``passage_length`` tokens of its prompt."""
        for _ in range(50):
            example = self.draw(rng, mixture)
            text = example.texts[example.gold]
            upto = text[: text.find(example.answer) + len(example.answer)]
            prompt = f"question: {example.question} title: {example.titles[example.gold]} context: {upto}"
            if len(self.words.encode(prompt)) < passage_length:
                break
        return example

    def _other_value(self, rng: random.Random, fact: dict[str, Any]) -> str:
        if fact["answer"][0].isupper() and rng.random() < 0.5:
            return self._invented_name(rng)
        return rng.choice(self._values[fact["relation"]])

    def prompt_ids(self, example: Example, passage_length: int | None = None) -> list[np.ndarray]:
        """``question: ... title: ... context: ...`` of each passage as uint16[tokens], end token included.

        Args:
            example: From ``draw``.
            passage_length: Maximum tokens of a prompt, if fewer than the reader's.
        """
        kept = (passage_length or self.passage_length) - 1
        question = self.words.encode(f"question: {example.question}")
        head = np.array(question, dtype=np.uint16)
        prompts = []
        for title, text, position in zip(example.titles, example.texts, example.positions, strict=True):
            if position is None:
                tail = np.array(self.words.encode(f"title: {title} context: {text}"), dtype=np.uint16)
            else:
                tail = self._tails[position]
            ids = np.concatenate((head, tail))[:kept]
            prompts.append(np.append(ids, np.uint16(EOS_ID)))
        return prompts

    def target_ids(self, example: Example) -> list[int]:
        """The answer's ids with the end token, at most ``MAX_TARGET_TOKENS``."""
        return [*self.words.encode(example.answer)[: MAX_TARGET_TOKENS - 1], EOS_ID]


def write_fid_examples(source: ExampleSource, file: pathlib.Path, count: int, mixture: Mixture, seed: int) -> int:
    """Write drawn examples in FiD's format, for what reads FiD's data files; the same for the same arguments."""
    rng = random.Random(seed)

    def records() -> Iterable[dict[str, Any]]:
        for _ in range(count):
            example = source.draw(rng, mixture)
            ctxs = [{"title": title, "text": text} for title, text in zip(example.titles, example.texts, strict=True)]
            yield {"question": example.question, "answers": [example.answer], "ctxs": ctxs}

    file.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(file, records())
