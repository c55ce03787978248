"""Tokenizer, examples and batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from training.corpus.examples import MAX_TARGET_TOKENS, ExampleSource, Mixture
from training.corpus.records import normalized_question, read_jsonl, real_questions
from training.corpus.tokenizer import WordEncoder
from training.fit.batches import BatchFactory, BatchPlan, make_batch
from training.fit.schedule import FROM_SCRATCH, batch_plan, learning_rate

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
