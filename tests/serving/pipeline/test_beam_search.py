"""Beams and choices over the real CPU engines: transformers' answers, scores and order, whoever else is in flight."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from export.checkpoint.files import load_checkpoint
from export.checkpoint.hugging_face import t5_from_reader
from export.graphs.templates import fill_template
from export.model.reader import Reader
from serving.contract.manifest import Manifest
from serving.pipeline.beam_search import BeamSearch, ChoiceScoring, Hypothesis, search_of
from serving.pipeline.prompt import PromptEncoder
from serving.pipeline.request import BeamOptions, Choices, ReaderRequest, RequestError
from serving.pipeline.scheduler import CancelledError, DecodeSequence, Scheduler
from tests.conftest import CONFIGS, CPU_BACKENDS, random_passages
from tests.export.graphs.test_cpu import loaded, packed

ROOT = Path(__file__).parents[3]
PASSAGES, SLOTS, LONGEST = (1, 4, 2, 9), 12, 14
EOS = 1  # of the random readers


class Prepared:
    """A reader with encoded questions, and its decoder."""

    def __init__(self, engines, name: str, backend: str):
        self.checkpoint, directory = engines[name]
        self.eos = Manifest.load(directory).eos_token_id
        encoder, self.decoder = loaded(directory, backend, slots=SLOTS)
        length = CONFIGS[name].passage_length
        self.inputs = [random_passages(n, length, seed) for seed, n in enumerate(PASSAGES)]
        self.questions = [packed(encoder, ids[0], mask[0], length) for ids, mask in self.inputs]
        self.alone: dict[tuple, object] = {}  # what each kind of request is answered when nothing else is in flight


@pytest.fixture(scope="module")
def prepared(engines):
    made: dict[tuple[str, str], Prepared] = {}

    def prepare(name: str, backend: str) -> Prepared:
        if (name, backend) not in made:
            made[name, backend] = Prepared(engines, name, backend)
        return made[name, backend]

    return prepare


class Asked:
    """One request in flight: greedy where num_beams is 0, or with `allowed` a choice among all of these, `most` at a time."""

    def __init__(
        self, reader: Prepared, which: int, num_beams: int, penalty: float, most: int, allowed: tuple = (), cancelled: bool = False
    ):
        self.found: list[Hypothesis] = []
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.attribution: list[np.ndarray] = []
        self.errors: list[Exception | None] = []
        self._done = threading.Event()
        search = BeamSearch(num_beams, penalty, most, reader.eos, 0, allowed) if num_beams else None
        self.sequence = DecodeSequence(
            *reader.questions[which],
            most,
            0,
            self._on_token,
            self._on_end,
            lambda attention: self.attribution.append(attention.copy()),  # the engine owns it
            lambda: CancelledError("cancelled") if cancelled and self.attribution else None,
            search=ChoiceScoring(allowed, most, 0) if allowed and not num_beams else search,
            on_hypotheses=self.found.extend,
        )

    def _on_token(self, token: int, log_prob: float) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)

    def _on_end(self, error: Exception | None) -> None:
        self.errors.append(error)
        self._done.set()

    def wait(self) -> None:
        assert self._done.wait(30)
        assert len(self.errors) == 1


def answered(reader: Prepared, *requests: tuple) -> list[Asked]:
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=99)
    asked = [Asked(reader, *request) for request in requests]
    for one in asked:
        loop.submit(one.sequence)
    for one in asked:
        one.wait()
    loop.stop()
    return asked


def decoder_in_transformers(reader: Reader) -> T5ForConditionalGeneration:
    """The reader's decoder in transformers' T5, which wants an encoder of the same sizes; that one is not used."""
    same = Reader(dataclasses.replace(reader.config, encoder=reader.config.decoder))
    same.load_state_dict({**same.state_dict(), **{n: w for n, w in reader.state_dict().items() if not n.startswith("encoder.")}})
    return t5_from_reader(same)


def by_transformers(
    t5: T5ForConditionalGeneration, hidden: np.ndarray, end: int, most: int, num_beams: int, penalty: float, allowed: tuple = ()
) -> tuple[list[list[int]], list[float]]:
    """The answers of transformers' beam search, and their scores; with one beam it decodes greedily and has none."""
    states = torch.from_numpy(hidden)[None]
    options: dict = {"num_return_sequences": num_beams, "length_penalty": penalty, "early_stopping": False} if num_beams > 1 else {}
    if allowed:
        options["prefix_allowed_tokens_fn"] = lambda _, prefix: following(allowed, tuple(prefix.tolist()[1:])) or [end]
    found = t5.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
        max_new_tokens=most,
        eos_token_id=end,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        num_beams=num_beams,
        **options,
    )
    sequences = [sequence[1:] for sequence in found.sequences.tolist()]  # padded, by end tokens too, to the longest
    sequences = [sequence[: sequence.index(end) + 1] if end in sequence else sequence for sequence in sequences]
    return sequences, found.sequences_scores.tolist() if num_beams > 1 else []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "t5_v1_0"])
@pytest.mark.parametrize(("num_beams", "penalty"), [(1, 1.0), (2, 0.0), (4, 1.0), (4, -1.5), (5, 2.0), (10, 0.6)])
def test_answers_scores_and_order_are_those_of_transformers(prepared, name, backend, num_beams, penalty):
    reader = prepared(name, backend)
    t5 = decoder_in_transformers(reader.checkpoint.reader)
    # A random reader hardly ever says its end token. One that its answers have in their midst ends them at all lengths.
    tried = answered(reader, *[(which, 4, 0.0, LONGEST) for which in range(len(PASSAGES))])
    said = collections.Counter(token for one in tried for hypothesis in one.found for token in hypothesis.tokens[1:7])
    eos, reader.eos = reader.eos, said.most_common(1)[0][0]
    requests = [(which, num_beams, penalty, most) for which in range(len(PASSAGES)) for most in (1, LONGEST)]
    asked, end, reader.eos = answered(reader, *requests), reader.eos, eos
    ended_early = 0
    for (which, _, _, most), one in zip(requests, asked, strict=True):
        assert one.errors == [None]
        sequences, scores = by_transformers(t5, reader.questions[which][0], end, most, num_beams, penalty)
        assert [list(hypothesis.tokens) for hypothesis in one.found] == sequences
        if num_beams > 1:
            np.testing.assert_allclose([h.score for h in one.found], scores, rtol=1e-6, atol=2e-4)
        for hypothesis in one.found:
            assert hypothesis.log_prob == pytest.approx(sum(hypothesis.log_probs), abs=1e-4)
            ended_early += hypothesis.tokens[-1] == end and len(hypothesis.tokens) < most
    # the end token takes part, not max_new_tokens alone; a penalty above 1 prefers the longest answers
    assert ended_early or num_beams < 4 or penalty > 1


def following(allowed: tuple, prefix: tuple[int, ...]) -> list[int]:
    """The tokens that may follow a prefix of an allowed answer."""
    return sorted({tokens[len(prefix)] for tokens in allowed if len(tokens) > len(prefix) and tokens[: len(prefix)] == prefix})


def demo_reader(directory: Path, name: str) -> types.SimpleNamespace:
    """A demo reader with the demo's questions, encoded."""
    manifest = fill_template(ROOT / "checkpoints" / name, directory / name)
    encoder, decoder = loaded(directory / name, "onnxruntime", slots=8)
    prompt = PromptEncoder(Tokenizer.from_file(str(directory / name / "tokenizer.json")), manifest)
    reader = types.SimpleNamespace(eos=manifest.eos_token_id, decoder=decoder, questions=[], prompt=prompt, inputs=[])
    for line in (ROOT / "examples/demo_questions.jsonl").read_text().splitlines():
        asked = json.loads(line)
        tokens = prompt.encode(asked["question"], [c["text"] for c in asked["ctxs"]], [c["title"] for c in asked["ctxs"]])
        (states,) = encoder.encode([(tokens.input_ids, tokens.attention_mask)])
        reader.questions.append((states[tokens.attention_mask.astype(bool)], tokens.encoder_positions))
        reader.inputs.append(tuple(torch.from_numpy(array)[None].long() for array in (tokens.input_ids, tokens.attention_mask)))
    return reader


def test_the_demo_reader_answers_as_transformers_does(tmp_path):
    reader = demo_reader(tmp_path, "fid")
    t5 = decoder_in_transformers(load_checkpoint(ROOT / "checkpoints/fid").reader)
    for (hidden, _), one in zip(reader.questions, answered(reader, *[(i, 4, 1.0, 32) for i in range(len(reader.questions))]), strict=True):
        wanted, scores = by_transformers(t5, hidden, reader.eos, 32, 4, 1.0)
        assert [list(hypothesis.tokens) for hypothesis in one.found] == wanted
        np.testing.assert_allclose([h.score for h in one.found], scores, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fido", "grouped", "released_fid"])
def test_readers_that_transformers_cannot_hold_answer_as_full_passes_without_a_cache_do(prepared, name, backend):
    reader = prepared(name, backend)
    requests = [(which, 4, 1.0, 8) for which in range(len(PASSAGES))]
    for (which, beams, penalty, most), one in zip(requests, answered(reader, *requests), strict=True):
        search, model = BeamSearch(beams, penalty, most, reader.eos, 0), reader.checkpoint.reader
        ids, mask = reader.inputs[which]
        texts, ended = [[0]] * beams, False
        while not ended:
            with torch.no_grad():
                logits = model(ids.expand(beams, -1, -1), mask.expand(beams, -1, -1), torch.tensor(texts))[:, -1].numpy()
            ended = search.advance(logits)
            texts = [[*texts[p], t] for p, t in zip(search.parents.tolist(), search.last_tokens.tolist(), strict=True)]
        assert [h.tokens for h in one.found] == [h.tokens for h in search.hypotheses()]
        np.testing.assert_allclose([h.score for h in one.found], [h.score for h in search.hypotheses()], rtol=1e-6, atol=2e-4)


# answers that begin alike, that are the beginning of others, and that have nothing in common
CHOICES = st.lists(st.lists(st.integers(3, 8), min_size=1, max_size=5), min_size=1, max_size=12, unique_by=tuple).map(
    lambda answers: tuple((*answer, EOS) for answer in answers)
)


def by_full_passes(model: Reader, ids: torch.Tensor, mask: torch.Tensor, allowed: tuple) -> np.ndarray:
    """float[choices]: the log-probability of each allowed answer, by one pass over all of it without a cache."""
    with torch.no_grad():
        hidden, hidden_mask = model.encode(ids, mask)
        passes = [model.decode(torch.tensor([[0, *tokens[:-1]]]), hidden, hidden_mask)[0].log_softmax(-1) for tokens in allowed]
    return np.array([float(found[range(len(tokens)), tokens].sum()) for found, tokens in zip(passes, allowed, strict=True)])


def check_choices(one: Asked, allowed: tuple, wanted: np.ndarray) -> None:
    """Every choice once, the most probable first, with its own log-probability and its share among the choices."""
    assert one.errors == [None]
    order = [-1 if h.choice is None else h.choice for h in one.found]
    assert sorted(order) == list(range(len(allowed)))
    assert [h.tokens for h in one.found] == [allowed[choice] for choice in order]
    np.testing.assert_allclose([h.log_prob for h in one.found], wanted[order], atol=2e-4)
    np.testing.assert_allclose([h.score for h in one.found], wanted[order] - np.logaddexp.reduce(wanted), atol=2e-4)
    assert [h.score for h in one.found] == sorted((h.score for h in one.found), reverse=True)
    assert one.attribution[0].shape == one.sequence.encoder_positions.shape


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "fido", "grouped", "released_fid"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, len(PASSAGES) - 1), allowed=CHOICES, at_a_time=st.integers(1, SLOTS))
def test_choices_are_scored_as_full_passes_over_each_of_them_score_them(prepared, name, backend, which, allowed, at_a_time):
    reader = prepared(name, backend)
    (one,) = answered(reader, (which, 0, 0.0, at_a_time, allowed))
    check_choices(one, allowed, by_full_passes(reader.checkpoint.reader, *reader.inputs[which], allowed))
    assert one.sequence.search.num_beams <= at_a_time


@pytest.mark.parametrize("name", ["fid", "fido"])
def test_a_demo_reader_chooses_among_texts(tmp_path, name):
    reader = demo_reader(tmp_path, name)
    model = load_checkpoint(ROOT / "checkpoints" / name).reader
    texts = ["Paris", "Pari", "the city of Paris", "Brussels", "French", "1842", "no", "yes", "Canberra", "Lyon"]
    for which in range(len(reader.questions)):
        request = ReaderRequest("", [], None, 512, 0, choices=Choices(texts, 1))
        search = search_of(request, reader.prompt.answer_ids, most_beams=4, eos_token=reader.eos, start_token=0)
        (one,) = answered(reader, (which, 0, 0.0, 4, tuple(search._choices)))
        check_choices(one, tuple(search._choices), by_full_passes(model, *reader.inputs[which], search._choices))
        assert reader.prompt.text(one.found[0].tokens) == texts[one.found[0].choice]


@pytest.mark.parametrize("name", ["fid", "t5_v1_0"])
@pytest.mark.parametrize("num_beams", [1, 2, 4])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, len(PASSAGES) - 1), allowed=CHOICES)
def test_beams_that_follow_the_choices_are_those_of_transformers(prepared, name, num_beams, which, allowed):
    reader = prepared(name, "onnxruntime")
    t5 = decoder_in_transformers(reader.checkpoint.reader)
    (one,) = answered(reader, (which, num_beams, 1.0, LONGEST, allowed))
    sequences, scores = by_transformers(t5, reader.questions[which][0], reader.eos, LONGEST, num_beams, 1.0, allowed)
    # where fewer than num_beams answers are allowed, transformers fills up with beams that nothing may continue
    found = [i for i, sequence in enumerate(sequences) if tuple(sequence) in allowed and (not scores or scores[i] > -1e8)]
    assert one.errors == [None] and [list(h.tokens) for h in one.found] == [sequences[i] for i in found]
    if scores:
        np.testing.assert_allclose([h.score for h in one.found], [scores[i] for i in found], atol=2e-4)
    assert one.found and all(allowed[h.choice] == h.tokens for h in one.found)


def test_answers_that_the_reader_cannot_give_are_refused_by_name():
    spelled = {"a": (3, EOS), "b": (3, EOS), "c": (4, 5, 6, EOS), "d": (4, EOS, 5, EOS), "e": (EOS,)}

    def search(*answers: str, beams: BeamOptions | None = None):
        request = ReaderRequest("", [], None, 3, 0, beams=beams, choices=Choices(list(answers), 1))
        return search_of(request, lambda texts: [spelled[text] for text in texts], most_beams=4, eos_token=EOS, start_token=0)

    for beams in (None, BeamOptions(2, 1, 1.0)):
        with pytest.raises(RequestError) as caught:
            search(*spelled, "a", beams=beams)
        assert str(caught.value).split("; allowed") == [
            "allowed_answers[1]: wanted an answer of its own, got the tokens of allowed_answers[0]; leave one of them out",
            "_answers[2]: wanted at most max_new_tokens=3 tokens, the end token included, got 4",
            "_answers[3]: wanted at most max_new_tokens=3 tokens, the end token included, got 4",
            "_answers[4]: wanted text that the reader can spell, got no token; leave it out",
            "_answers[5]: wanted an answer of its own, got the tokens of allowed_answers[0]; leave one of them out",
        ]
    spelled["d"] = (EOS, 5, EOS)
    with pytest.raises(RequestError, match=r"^allowed_answers\[0\]: wanted no end token in it"):
        search("d")
    assert isinstance(search("a"), ChoiceScoring) and isinstance(search("a", beams=BeamOptions(2, 1, 1.0)), BeamSearch)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, len(PASSAGES) - 1),
        st.sampled_from([0, 0, 1, 2, 4, 7, SLOTS]),
        st.sampled_from([0.0, 1.0]),
        st.integers(1, LONGEST).map(lambda most: min(most, SLOTS)),
        st.sampled_from([(), ()]) | CHOICES,
        st.booleans(),
        st.sampled_from([0.0, 0.0, 0.002]),
    ),
    min_size=2,
    max_size=9,
)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "fido", "released_fid"])
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS)
def test_answers_do_not_depend_on_who_else_is_in_flight(prepared, name, backend, requests):
    reader = prepared(name, backend)
    for *request, _, _ in requests:
        if tuple(request) not in reader.alone:
            (reader.alone[tuple(request)],) = answered(reader, tuple(request))
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=99)
    asked = []
    for *request, cancelled, pause in requests:
        asked.append(Asked(reader, *request, cancelled))
        loop.submit(asked[-1].sequence)
        assert loop.counts().beams <= SLOTS
        time.sleep(pause)
    for one, (*request, cancelled, _) in zip(asked, requests, strict=True):
        one.wait()
        if cancelled and isinstance(one.errors[0], CancelledError):
            continue
        alone = reader.alone[tuple(request)]
        assert one.errors == [None] and one.tokens == alone.tokens
        assert [h.tokens for h in one.found] == [h.tokens for h in alone.found]
        assert [h.choice for h in one.found] == [h.choice for h in alone.found]
        np.testing.assert_allclose([h.log_prob for h in one.found], [h.log_prob for h in alone.found], atol=1e-4)
        np.testing.assert_allclose(one.attribution[0], alone.attribution[0], atol=1e-5)
    loop.stop()
    assert loop.counts().beams == 0


def test_a_greedy_answer_beside_beams_is_the_same_to_the_bit_as_without(prepared):
    """Within one batch size: another size makes the engine add numbers in another order."""
    reader = prepared("fid", "onnxruntime")
    first = answered(reader, *[(1, 0, 1.0, LONGEST)] * 3)[0]
    beside = answered(reader, (1, 0, 1.0, LONGEST), (1, 2, 1.0, LONGEST))[0]
    assert beside.tokens == first.tokens
    np.testing.assert_allclose(beside.log_probs, first.log_probs, atol=1e-5)


def test_more_beams_than_slots_and_a_greedy_engine_are_refused_by_name(prepared):
    reader = prepared("fid", "onnxruntime")
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=9)
    with pytest.raises(ValueError, match=f"num_beams: wanted at most {SLOTS}"):
        loop.submit(Asked(reader, 0, SLOTS + 1, 1.0, 3).sequence)
    reader.decoder.has_beams = False
    try:
        with pytest.raises(ValueError, match="num_beams: wanted 1, because this reader's engine decodes greedily"):
            loop.submit(Asked(reader, 0, 2, 1.0, 3).sequence)
    finally:
        del reader.decoder.has_beams
    loop.stop()


def test_a_question_with_many_beams_is_not_overtaken(prepared):
    """Half of the slots are taken; the next question needs all of them, and those behind it wait, though they would fit."""
    reader = prepared("fid", "onnxruntime")
    order: list[str] = []
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=99)
    asked = [Asked(reader, 0, beams, 1.0, LONGEST) for beams in (SLOTS // 2, SLOTS, 0, 0)]
    for name, one in zip(("half", "all", "third", "fourth"), asked, strict=True):
        one.sequence.on_admitted = lambda name=name: order.append(name)
        loop.submit(one.sequence)
    for one in asked:
        one.wait()
    loop.stop()
    assert order == ["half", "all", "third", "fourth"]


def test_a_logit_that_is_no_number_ends_the_question_with_an_error():
    with pytest.raises(FloatingPointError):
        BeamSearch(2, 1.0, 5, 1, 0).advance(np.full((2, 9), np.nan, np.float32))
