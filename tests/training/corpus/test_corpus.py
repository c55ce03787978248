"""The corpus: the same every time, honestly split, answerable."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re

import pytest

from training.corpus import build as corpus_module
from training.corpus.factbook import Passage
from training.corpus.records import normalized_question, read_jsonl, real_questions
from training.corpus.relations import RELATIONS, facts_from_passage
from training.corpus.retrieval import PassageIndex
from training.corpus.templates import HELD_OUT, TRAIN, ask, with_article


def _digests(directory: pathlib.Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_corpus_is_the_same_every_time(tmp_path, corpus, passages):
    fields = {p["field"] for p in read_jsonl(corpus / "passages.jsonl")}
    corpus_module.build_corpus(tmp_path, [passage for passage in passages if passage.field in fields], min_facts=20)
    assert _digests(tmp_path) == _digests(corpus)


def test_held_out_countries_are_nowhere_in_training(corpus, held_out):
    everything = read_jsonl(corpus / "passages.jsonl")
    facts = read_jsonl(corpus / "train.jsonl")
    trained = {everything[fact["gold"]]["country"] for fact in facts}
    distractors = {everything[position]["country"] for fact in facts for position in fact["distractors"]}
    assert len(held_out) == corpus_module.N_HELD_OUT_COUNTRIES
    assert not held_out & trained
    assert not held_out & distractors


def test_held_out_questions_are_about_held_out_countries_only(corpus, held_out):
    everything = read_jsonl(corpus / "passages.jsonl")
    for example in read_jsonl(corpus / "heldout.jsonl"):
        assert everything[example["gold"]]["country"] in held_out


def test_held_out_wordings_are_never_trained():
    plain = {name: {normalized_question(ask(t, "X", "x")) for t in templates} for name, templates in TRAIN.items()}
    trained = set().union(*plain.values())
    for name, templates in HELD_OUT.items():
        for template in templates:
            assert normalized_question(ask(template, "X")) not in trained, (name, template)


def test_every_relation_has_its_wordings():
    names = {relation.name for relation in RELATIONS}
    assert names == set(TRAIN) == set(HELD_OUT)
    assert all(len(set(templates)) == len(templates) >= 8 for templates in TRAIN.values())
    assert all(len(templates) >= 2 and "{a}" not in "".join(templates) for templates in HELD_OUT.values())


def test_full_corpus_has_the_promised_size(passages):
    held_out = corpus_module.held_out_countries(passages)
    facts = [fact for passage in passages if passage.country in held_out for fact in facts_from_passage(passage)]
    assert len({fact.relation for fact in facts}) >= 45
    assert len(facts) >= 1100


def test_answers_stand_in_their_passage(passages):
    for passage in passages:
        for fact in facts_from_passage(passage):
            assert passage.text[fact.start :].startswith(fact.answers[0]), (passage.title, fact)


def test_answers_stand_in_the_gold_passage_of_a_held_out_question(corpus):
    for example in read_jsonl(corpus / "heldout.jsonl"):
        gold = [context for context in example["ctxs"] if context["id"] == example["gold"]]
        assert len(gold) == 1
        assert example["answers"][0] in gold[0]["text"]


def test_contexts_are_ten_different_passages_best_first(corpus):
    for example in read_jsonl(corpus / "heldout.jsonl")[:200] + read_jsonl(corpus / "real.jsonl"):
        scores = [context["score"] for context in example["ctxs"]]
        assert len({context["id"] for context in example["ctxs"]}) == 10
        assert scores == sorted(scores, reverse=True)
        assert set(example) >= {"id", "question", "answers", "ctxs"}


def test_committed_real_questions_hold_no_factbook_text():
    assert len(real_questions()) == 157
    assert all(set(question) == {"source", "question", "answers", "gold_title"} for question in real_questions())


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("what money do they use in china", "China: Exchange rates"),
        ("what does french people speak?", "France: Languages"),
        ("who is the president of the usa", "United States: Executive branch"),
        ("which city is the capital of french polynesia", "French Polynesia: Capital"),
        ("what countries border germany", "Germany: Land boundaries"),
    ],
)
def test_retrieval_knows_what_people_call_things(passages, question, title):
    index = _index(passages)
    assert title in [passages[position].title for position, _ in index.search(question, 10)]


_INDEXES: dict[int, PassageIndex] = {}


def _index(passages: list[Passage]) -> PassageIndex:
    return _INDEXES.setdefault(id(passages), PassageIndex(passages))


def test_text_is_clean(passages):
    for passage in passages:
        assert not re.search(r"<[a-z/]|&[a-z]+;|\s\s", passage.title + passage.text), passage.title
        for leaf in passage.leaves:
            assert passage.text[leaf.start :].startswith(leaf.value)


def test_names_in_sentences():
    assert with_article("Netherlands") == "the Netherlands"
    assert with_article("The Bahamas") == "the Bahamas"
    assert with_article("France") == "France"
    assert ask("where is {c}?", "Chad") == "where is chad?"
    with pytest.raises(ValueError, match="wanted an adjective for Chad"):
        ask("what do {a} people speak?", "Chad")


def test_countries_file_names_the_split(corpus, held_out):
    countries = json.loads((corpus / "countries.json").read_text(encoding="utf-8"))
    assert held_out < set(countries)
