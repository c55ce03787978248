"""The corpus: the same every time, honestly split, answerable."""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from training.corpus import answers
from training.corpus import build as corpus_module
from training.corpus.examples import MAX_TARGET_TOKENS, ExampleSource, Mixture, normalized_question, read_jsonl, real_questions
from training.corpus.relations import RELATIONS, Passage, facts_from_passage
from training.corpus.retrieval import PassageIndex
from training.corpus.templates import HELD_OUT, TRAIN, ask, with_article
from training.corpus.tokenizer import WordEncoder
from training.fit.batches import FROM_SCRATCH, BatchFactory, BatchPlan, batch_plan, learning_rate, make_batch


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


# Reading short answers off Factbook values, by worked cases.


@pytest.mark.parametrize(
    ("extract", "value", "wanted"),
    [
        (answers.clause, "civil law system; Constitutional Court reviews", ["civil law system"]),
        (answers.clause, "metropolitan France: cool winters", []),
        (answers.measure, "42.7 years (2025 est.)", ["42.7 years", "42.7"]),
        (answers.measure, "$62,500 (2023 est.)", ["$62,500", "$62,500"]),
        (answers.share, "81.8% of total population (2023)", ["81.8%"]),
        (answers.items, "Italy 476 km; Spain 646 km", ["Italy", "Spain"]),
        (answers.items, "French (official) 100%, Breton, other 2%", ["French", "Breton"]),
        (answers.place, "Mont Blanc 4,810", ["Mont Blanc"]),
        (answers.place, "unnamed location 5 m", []),
        (answers.leader, "President Emmanuel MACRON (since 14 May 2017)", ["Emmanuel MACRON", "President Emmanuel MACRON"]),
        (answers.leader, "Ambassador (vacant)", []),
        (answers.titled_leader("prime minister"), "President Emmanuel MACRON", []),
        (
            answers.government,
            "federal parliamentary democracy under a constitutional monarchy",
            ["constitutional monarchy", "federal parliamentary democracy under a constitutional monarchy"],
        ),
        (answers.government, "formerly", []),
        (answers.currency, "euros (EUR) per US dollar -", ["euros", "EUR", "euro"]),
        (answers.largest_city, "11.208 million PARIS (capital), 1.761 million Lyon", ["PARIS"]),
        (answers.date, "15 August 1960 (from France)", ["15 August 1960"]),
        (answers.former_ruler, "15 August 1960 (from France)", ["France"]),
        (answers.holiday_date, "Independence Day, 4 October (1966)", ["4 October"]),
        (answers.anthem, '"La Marseillaise" (The Song of Marseille)', ["La Marseillaise"]),
        (answers.time_zone, "UTC+1 (6 hours ahead of Washington, DC)", ["UTC+1"]),
        (answers.river, "Rhin (Rhine) (shared with Germany) - 1,233 km", ["Rhin", "Rhine"]),
        (answers.code, ".de; note - also", [".de"]),
        (answers.region, "metropolitan France: Europe French Guiana: South America", ["Europe"]),
        (answers.comparison, "about 0.7 times the size of Washington, D.C.", ["about 0.7 times the size of Washington, D.C."]),
    ],
)
def test_extractors(extract, value, wanted):
    assert extract(value) == wanted


# Tokenizer, examples and batches.

PASSAGE_LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer(corpus) -> Tokenizer:
    return Tokenizer.from_file(str(corpus / "tokenizer.json"))


@pytest.fixture(scope="module")
def source(corpus, tokenizer) -> ExampleSource:
    return ExampleSource(corpus, tokenizer, PASSAGE_LENGTH)


def test_special_tokens_have_t5s_ids(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


def test_words_apart_and_together_have_the_same_ids(corpus, tokenizer):
    words = WordEncoder(tokenizer)
    for example in read_jsonl(corpus / "heldout.jsonl")[:150]:
        question, context = f"question: {example['question']}", example["ctxs"][0]
        tail = f"title: {context['title']} context: {context['text']}"
        whole = tokenizer.encode(f"{question} {tail}", add_special_tokens=False).ids
        assert words.encode(question) + words.encode(tail) == whole
        assert 2 not in whole


def test_answers_survive_the_tokenizer(corpus, tokenizer):
    words = WordEncoder(tokenizer)
    for example in read_jsonl(corpus / "heldout.jsonl"):
        for answer in example["answers"]:
            assert tokenizer.decode(words.encode(answer)) == " ".join(answer.split())


def test_examples_hold_their_answer_also_when_counterfactual(source):
    rng = random.Random(3)
    renamed = 0
    for _ in range(600):
        example = source.draw(rng, Mixture(4, 0.6, 0.9))
        gold = source.passages[example.positions[example.gold]] if example.positions[example.gold] is not None else None
        assert example.answer in example.texts[example.gold]
        assert len(set(example.titles)) == 4 == len(example.texts)
        name = example.titles[example.gold].split(": ")[0]
        if gold is None and name not in {passage["country"] for passage in source.passages}:
            renamed += 1
            assert name.lower().removeprefix("the ") in example.question.lower()
    assert renamed > 200


def test_prompts_end_in_the_end_token_and_hold_the_answers_ids(source):
    rng = random.Random(4)
    held = 0
    for _ in range(300):
        example = source.draw(rng, Mixture(2, 1.0, 0.0))
        prompts = source.prompt_ids(example)
        answer = source.target_ids(example)[:-1]
        gold = prompts[example.gold].tolist()
        held += any(gold[i : i + len(answer)] == answer for i in range(len(gold)))
        assert all(prompt[-1] == 1 and len(prompt) <= PASSAGE_LENGTH for prompt in prompts)
    assert held > 0.97 * 300


def test_no_passage_of_a_held_out_country_is_drawn(source, held_out):
    rng = random.Random(5)
    for _ in range(300):
        example = source.draw(rng, Mixture(6, 0.5, 0.3))
        assert not held_out & {title.split(": ")[0] for title in example.titles}


def test_questions_of_people_are_never_asked(source):
    asked = {normalized_question(real["question"]) for real in real_questions()}
    rng = random.Random(6)
    drawn = {normalized_question(source.draw(rng, Mixture(1, 1.0, 0.0)).question) for _ in range(4000)}
    assert not asked & drawn


@pytest.mark.parametrize(("n_passages", "batch_size"), [(1, 7), (3, 2), (40, 1)])
def test_batch_shapes(source, n_passages, batch_size):
    batch = make_batch(source, BatchPlan(0, batch_size, Mixture(n_passages, 0.5, 0.3)), seed=1)
    assert batch.input_ids.shape == (batch_size, n_passages, PASSAGE_LENGTH)
    assert batch.targets.shape == (batch_size, MAX_TARGET_TOKENS)
    assert ((batch.targets == 1).sum(1) == 1).all()


def test_workers_make_the_batches_that_this_process_makes_in_order(source):
    plans = [BatchPlan(step, 3, Mixture(1 + step % 3, 0.5, 0.3)) for step in range(8)]
    with BatchFactory(source, seed=2, num_workers=2) as factory:
        for plan in plans:
            factory.plan(plan)
        for plan in plans:
            got, batch = factory.next()
            assert got == plan
            assert np.array_equal(batch.input_ids, make_batch(source, plan, 2).input_ids)


def test_schedule_reaches_every_served_count():
    first = {batch_plan(FROM_SCRATCH, 0.05, step, 0).mixture.n_passages for step in range(50)}
    last = {batch_plan(FROM_SCRATCH, 0.9, step, 0).mixture.n_passages for step in range(2000)}
    assert first == {1}
    assert last >= {1, 2, 4, 8, 10, 20, 40}


def test_learning_rate_warms_up_holds_and_falls():
    rates = [learning_rate(1.0, progress, step, 10, 0.5) for progress, step in ((0.0, 0), (0.2, 50), (0.5, 90), (1.0, 200))]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.02])
