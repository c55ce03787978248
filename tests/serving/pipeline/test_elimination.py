"""Token elimination: an answer is that of transformers with the dropped tokens masked, whoever shares its steps."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache

from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.pipeline.beam_search import BeamSearch
from serving.pipeline.elimination import Elimination, EliminationOptions
from serving.pipeline.request import RequestError, read_request
from serving.pipeline.scheduler import DecodeSequence, Scheduler
from tests.conftest import CONFIGS, CPU_BACKENDS, random_passages
from tests.export.graphs.test_cpu import loaded, packed
from tests.serving.pipeline.test_beam_search import decoder_in_transformers

PASSAGES, TOKENS = (1, 3, 6, 9), 14
OPTIONS = [
    None,
    EliminationOptions(1, 0.5),
    EliminationOptions(3, 0.2),
    EliminationOptions(2, 1.0, 2),
    EliminationOptions(1, 0.4, 3),
    EliminationOptions(4, 0.01),
]


class Prepared:
    """A reader with encoded questions."""

    def __init__(self, engines, name: str, backend: str):
        self.checkpoint, directory = engines[name]
        self.eos = Manifest.load(directory).eos_token_id
        encoder, self.decoder = loaded(directory, backend, slots=3)
        length = CONFIGS[name].passage_length
        self.questions, self.lengths = [], []
        for seed, n in enumerate(PASSAGES):
            ids, mask = random_passages(n, length, seed)
            self.questions.append(packed(encoder, ids[0], mask[0], length))
            self.lengths.append(mask[0].sum(1).numpy())


@pytest.fixture(scope="module")
def prepared(engines):
    made: dict[tuple[str, str], Prepared] = {}

    def prepare(name: str, backend: str = "onnxruntime") -> Prepared:
        if (name, backend) not in made:
            made[name, backend] = Prepared(engines, name, backend)
        return made[name, backend]

    return prepare


class Asked:
    """One question in flight, of TOKENS tokens."""

    def __init__(self, reader: Prepared, which: int, options: EliminationOptions | None, search: BeamSearch | None = None):
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.errors: list[Exception | None] = []
        self._done = threading.Event()
        self.sequence = DecodeSequence(
            *reader.questions[which],
            TOKENS,
            TOKENS + 1,  # the end token is forbidden: random readers end early or never
            self._on_token,
            self._on_end,
            search=search,
            elimination=None if options is None else Elimination(options, reader.lengths[which]),
        )

    def _on_token(self, token: int, log_prob: float) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)

    def _on_end(self, error: Exception | None) -> None:
        self.errors.append(error)
        self._done.set()

    def wait(self) -> Asked:
        assert self._done.wait(30) and self.errors == [None]
        return self


def answered(reader: Prepared, *asked: Asked) -> list[Asked]:
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=99)
    for one in asked:
        loop.submit(one.sequence)
    try:
        return [one.wait() for one in asked]
    finally:
        loop.stop()


@torch.no_grad()
def by_transformers(reader: Prepared, which: int, options: EliminationOptions) -> tuple[list[int], list[float]]:
    """Greedy tokens and log-probabilities of T5's own cached decoder; after `drop_after` steps its mask loses the dropped tokens."""
    t5 = decoder_in_transformers(reader.checkpoint.reader)
    t5.config._attn_implementation = t5.decoder.config._attn_implementation = "eager"
    hidden = torch.from_numpy(reader.questions[which][0])[None]
    passages = np.repeat(np.arange(len(reader.lengths[which])), reader.lengths[which])
    mask, mass = torch.ones(1, hidden.shape[1], dtype=torch.long), np.zeros(hidden.shape[1])
    cache, token = EncoderDecoderCache(DynamicCache(), DynamicCache()), 0
    tokens, log_probs = [], []
    for step in range(1, TOKENS + 1):
        out = t5(
            encoder_outputs=(hidden,),
            attention_mask=mask,
            decoder_input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
        )
        logits = out.logits[0, -1]
        logits[reader.eos] = -torch.inf
        token = int(logits.argmax())
        tokens.append(token)
        log_probs.append(float(logits.log_softmax(-1)[token]))
        mass += torch.stack(out.cross_attentions).double().mean((0, 1, 2, 3)).numpy()
        if step == options.drop_after:
            kept = np.arange(len(mass))
            if options.keep_passages is not None:
                weights = np.array([mass[passages == number].sum() for number in range(len(reader.lengths[which]))])
                kept = kept[np.isin(passages, weights.argsort()[::-1][: options.keep_passages])]
            count = max(1, int(np.ceil(options.keep_encoder_tokens * len(kept))))
            kept = kept[mass[kept].argsort()[::-1][:count]]
            mask = torch.zeros_like(mask)
            mask[0, kept] = 1
    return tokens, log_probs


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "t5_v1_0"])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_answers_are_those_of_transformers_with_the_dropped_tokens_masked(prepared, name, backend, options):
    reader = prepared(name, backend)
    for which in range(len(PASSAGES)):
        (found,) = answered(reader, Asked(reader, which, options))
        tokens, log_probs = by_transformers(reader, which, options)
        assert found.tokens == tokens
        np.testing.assert_allclose(found.log_probs, log_probs, atol=2e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "fido", "grouped", "released_fid"])
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(st.tuples(st.integers(0, len(PASSAGES) - 1), st.sampled_from(OPTIONS), st.booleans()), min_size=2, max_size=7))
def test_answers_do_not_depend_on_who_else_is_in_flight(prepared, name, backend, mix):
    reader = prepared(name, backend)
    alone = [answered(reader, Asked(reader, which, options))[0] for which, options, _ in mix]
    beams = [Asked(reader, which, None, BeamSearch(2, 1.0, TOKENS, reader.eos, 0, ())) for which, _, has_beams in mix if has_beams]
    together = answered(reader, *(Asked(reader, which, options) for which, options, _ in mix), *beams)
    for one, same in zip(alone, together, strict=False):
        assert one.tokens == same.tokens
        np.testing.assert_allclose(one.log_probs, same.log_probs, atol=2e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fido", "grouped", "released_fid"])
def test_a_slot_that_keeps_some_tokens_is_one_that_was_given_these_alone(prepared, name, backend):
    """For readers that transformers cannot hold: keys and values, and where the tokens stood, which the bias in cross-attention reads."""
    decoder = prepared(name, backend).decoder
    (hidden, positions), beside = (prepared(name, backend).questions[which] for which in (3, 2))
    kept = np.arange(3, len(hidden), 4)

    def log_probs(rows: np.ndarray) -> np.ndarray:
        decoder.admit(0, 0, hidden[rows], positions[rows])
        decoder.admit(1, 1, *beside)
        if len(rows) > len(kept):
            decoder.keep(0, 2, kept)
        tokens = np.full(2, 7, np.int32)
        return np.array([decoder.step(tokens, np.full(2, at, np.int32), np.zeros(2, np.float32))[1] for at in range(4)])

    whole = np.arange(len(hidden))
    np.testing.assert_allclose(log_probs(whole), log_probs(kept), atol=1e-4)


def test_keeping_everything_is_the_same_to_the_bit_as_not_asking(prepared):
    reader = prepared("fido")
    for options in (EliminationOptions(2, 1.0), EliminationOptions(1, 1.0, 6)):
        plain, asked = (answered(reader, Asked(reader, 2, each))[0] for each in (None, options))
        assert (plain.tokens, plain.log_probs) == (asked.tokens, asked.log_probs)


def test_dropped_tokens_give_their_memory_back_and_the_counts_say_how_many(prepared):
    reader = prepared("fid")
    hidden, positions = reader.questions[3]
    decoder = reader.decoder
    decoder.admit(0, 0, hidden, positions)
    whole = decoder.reserved_bytes()
    decoder.keep(0, 1, np.arange(0, len(hidden), 10))
    assert decoder.reserved_bytes() < 0.6 * whole
    loop = Scheduler(decoder, start_token=0, eos_token=reader.eos, max_waiting=9)
    asked = Asked(reader, 3, EliminationOptions(2, 0.25))
    loop.submit(asked.sequence)
    asked.wait()
    assert loop.counts().dropped_tokens == len(hidden) - int(np.ceil(0.25 * len(hidden)))
    loop.stop()


def test_the_heaviest_tokens_and_passages_stay_in_their_order():
    lengths, attention = np.array([2, 3, 1]), np.array([1, 8, 2, 2, 2, 5], np.float32)
    assert Elimination(EliminationOptions(1, 0.5), lengths).kept_after(attention).tolist() == [1, 2, 5]
    assert Elimination(EliminationOptions(1, 1.0, 2), lengths).kept_after(attention).tolist() == [0, 1, 2, 3, 4]
    assert Elimination(EliminationOptions(1, 0.4, 2), lengths).kept_after(attention).tolist() == [1, 2]
    two = Elimination(EliminationOptions(2, 0.1), lengths)
    assert two.kept_after(attention) is None
    assert two.kept_after(np.array([100, 0, 0, 0, 0, 1], np.float32)).tolist() == [0], "each step counts as much as any other"
    assert two.kept_after(attention) is None, "once"


def test_what_cannot_be_dropped_is_refused_by_name(prepared):
    def asked(limits: Limits, **options):
        tensors = {"question": np.array([b"w1"], object), "passages": np.array([b"w2", b"w3"], object)}
        return read_request(tensors | {name: np.array([value]) for name, value in options.items()}, limits)

    assert asked(Limits(), keep_encoder_tokens=0.3, drop_after=2).elimination == EliminationOptions(2, pytest.approx(0.3))
    assert asked(Limits(), keep_passages=1).elimination == EliminationOptions(1, 1.0, 1)
    assert asked(Limits(), keep_encoder_tokens=1.0).elimination is None and asked(Limits()).elimination is None
    for options, fault in (
        ({"keep_encoder_tokens": 0.0}, "keep_encoder_tokens: wanted a share above 0 and at most 1, got 0"),
        ({"keep_encoder_tokens": np.nan}, "keep_encoder_tokens: wanted a share above 0 and at most 1, got nan"),
        ({"keep_passages": 0}, "keep_passages: wanted at least 1, got 0"),
        ({"keep_passages": 1, "drop_after": 0}, "drop_after: wanted 1 to 512, got 0"),
        ({"drop_after": 3}, "drop_after: wanted keep_encoder_tokens or keep_passages with it"),
        ({"keep_passages": 1, "num_beams": 2}, "keep_passages: wanted none beside num_beams and allowed_answers"),
    ):
        with pytest.raises(RequestError, match=fault):
            asked(Limits(), **options)
    with pytest.raises(RequestError, match="keep_passages: wanted none, as this reader keeps all encoder tokens"):
        asked(Limits(token_elimination=0), keep_passages=1)
    reader = prepared("fid")
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.eos, max_waiting=9)
    with pytest.raises(ValueError, match="elimination: wanted none beside beam search"):
        loop.submit(Asked(reader, 0, OPTIONS[1], BeamSearch(2, 1.0, TOKENS, reader.eos, 0, ())).sequence)
    loop.stop()
