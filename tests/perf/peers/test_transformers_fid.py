"""The peer is the same reader: transformers' greedy tokens are ours; what it cannot run is refused; the command writes its result."""

from __future__ import annotations

import collections
import dataclasses
import json

import pytest
import torch

from export.checkpoint.config import ReaderConfig
from export.checkpoint.files import save_reader
from perf.peers import transformers_fid
from perf.peers.transformers_fid import (
    FusionPeer,
    Passages,
    PeerError,
    Question,
    cast_as_from_pretrained,
    hugging_face_fid,
    measure,
    random_questions,
)
from perf.served.workload import WORKLOADS, Uniform, WorkloadSpec, exactly
from tests.conftest import FID, FIDO, GROUPED, RELEASED_FID, VOCAB_SIZE, random_passages, random_reader

# transformers has one width for both stacks; unequal depths it can have
PLAIN = dataclasses.replace(FID, encoder=dataclasses.replace(FID.encoder, num_layers=3), decoder=FID.encoder)
SCALED = dataclasses.replace(PLAIN, feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True)
TIED = dataclasses.replace(PLAIN, tie_word_embeddings=True)
SHAPES = ((3, 9), (5, 7), (1, 24), (4, 16))  # passages and their width, of four questions


@pytest.fixture
def questions() -> list[Passages]:
    made = [random_passages(n, width, seed) for seed, (n, width) in enumerate(SHAPES)]
    return [(ids[0], mask[0]) for ids, mask in made]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_tokens_are_those_of_our_reader(seed, questions):
    reader = random_reader(PLAIN, seed)
    # without end tokens: whether the last forced token may be one is where the two differ
    wanted = [reader.generate(ids[None], mask[None], 12, min_new_tokens=13).tokens[0] for ids, mask in questions]
    assert FusionPeer(hugging_face_fid(reader)).answer(questions, 12, 12) == wanted
    assert len({token for tokens in wanted for token in tokens}) > 4


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, SCALED, TIED], ids=["untied", "scaled", "tied"])
def test_logits_are_those_of_our_reader(config):
    reader = random_reader(config)
    ids, mask = random_passages(1, 24, 0, batch=3)
    targets = torch.randint(2, VOCAB_SIZE, (3, 6), generator=torch.Generator().manual_seed(0))
    theirs = hugging_face_fid(reader)(input_ids=ids[:, 0], attention_mask=mask[:, 0], decoder_input_ids=targets).logits
    torch.testing.assert_close(theirs, reader(ids, mask, targets), atol=1e-4, rtol=0)


def test_an_answer_ends_at_its_own_end_token(questions):
    ending = random_reader(PLAIN).generate(*(tensor[None] for tensor in questions[0]), 12).tokens[0][3]
    reader = random_reader(dataclasses.replace(PLAIN, eos_token_id=ending))
    wanted = [reader.generate(ids[None], mask[None], 12).tokens[0] for ids, mask in questions]
    assert FusionPeer(hugging_face_fid(reader)).answer(questions, 12) == wanted
    assert len({len(tokens) for tokens in wanted}) > 1


def test_batch_of_n_equals_n_of_one_and_forced_lengths_are_exact(questions):
    peer = FusionPeer(hugging_face_fid(random_reader(PLAIN)))
    for length in (1, 7):
        together = peer.answer(questions, length, length)
        assert [len(tokens) for tokens in together] == [length] * len(questions)
        assert together == [peer.answer([question], length, length)[0] for question in questions]


@pytest.mark.slow
def test_compiled_tokens_are_the_eager_ones(questions):
    one_layer = dataclasses.replace(FID.encoder, num_layers=1)
    model = hugging_face_fid(random_reader(dataclasses.replace(PLAIN, encoder=one_layer, decoder=one_layer)))
    assert FusionPeer(model, compiled=True).answer(questions, 6, 6) == FusionPeer(model).answer(questions, 6, 6)


def test_half_precision_is_that_of_from_pretrained_and_leaves_the_reader_alone(tmp_path):
    reader = random_reader(TIED)
    model = hugging_face_fid(reader)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        ours = cast_as_from_pretrained(hugging_face_fid(reader), dtype, "cpu")
        theirs = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert {n: w.dtype for n, w in ours.named_parameters()} == {n: w.dtype for n, w in theirs.named_parameters()}
        assert ours.lm_head.weight is ours.shared.weight
    assert {weight.dtype for weight in reader.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FIDO, r"cannot run FiDO(.|\n)*attention_period: wanted 1, got 2(.|\n)*num_kv_heads: wanted num_heads=6, got 1"),
        (GROUPED, r"cannot run FiDO(.|\n)*num_kv_heads: wanted num_heads=6, got 2"),
        (FID, r"cannot run this FiD reader(.|\n)*d_ff: wanted the encoder's 7, got 11(.|\n)*num_heads: wanted the encoder's 3, got 4"),
        (RELEASED_FID, "cross_attention_relative_bias: wanted none"),
        (dataclasses.replace(PLAIN, decoder=dataclasses.replace(FID.encoder, num_layers=4)), "num_layers: wanted at most the encoder's 3"),
    ],
)
def test_what_transformers_cannot_run_is_refused(config, message):
    with pytest.raises(PeerError, match=message):
        hugging_face_fid(random_reader(config))


def test_random_questions_have_the_lengths_of_the_workload():
    spec = WorkloadSpec(Uniform(1, 3), Uniform(5, 9), exactly(4))
    made = random_questions(spec, 60, 0, VOCAB_SIZE)
    assert {len(question.lengths()) for question in made} == {1, 2, 3}
    assert {length for question in made for length in question.lengths()} == set(range(5, 10))
    assert all(question.new_tokens == 4 and question.passages[0].shape[1] == max(question.lengths()) for question in made)
    assert all(torch.equal(a.passages[0], b.passages[0]) for a, b in zip(made, random_questions(spec, 60, 0, VOCAB_SIZE), strict=True))


def test_a_variant_that_fails_leaves_the_others_measured(questions):
    class Failing(FusionPeer):
        def answer(self, questions, max_new_tokens, min_new_tokens=0):
            raise RuntimeError("no compiler here\nand pages more")

    model = hugging_face_fid(random_reader(PLAIN))
    rows = measure({"bad": Failing(model), "good": FusionPeer(model)}, [Question(q, 2) for q in questions], [2], 1)
    assert rows[0] == {"name": "bad", "batch": 2, "error": "RuntimeError: no compiler here"}
    assert rows[1]["questions_per_s"]["min"] > 0


class ScriptedPeer:
    """A peer whose batches take stated seconds of a clock that only it moves."""

    def __init__(self, clock: list[float], first_s: float, later_s: float, *, compiled: bool):
        self._clock, self._seconds, self.compiled = clock, (first_s, later_s), compiled
        self._calls_of_size: collections.Counter[int] = collections.Counter()
        self.calls: list[tuple[int, int, int]] = []

    def answer(self, questions, max_new_tokens, min_new_tokens=0):
        self.calls.append((len(questions), max_new_tokens, min_new_tokens))
        self._calls_of_size[len(questions)] += 1
        self._clock[0] += self._seconds[0] if self._calls_of_size[len(questions)] == 1 else self._seconds[1]
        return [[1] * max_new_tokens for _ in questions]


def test_rates_leave_out_the_first_pass_and_compiled_peers_run_only_the_batches_asked_for(questions, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(transformers_fid.time, "perf_counter", lambda: clock[0])
    eager, compiled = ScriptedPeer(clock, 5.0, 0.5, compiled=False), ScriptedPeer(clock, 20.0, 0.25, compiled=True)
    asked = [Question(question, new_tokens) for question, new_tokens in zip(questions, (2, 2, 2, 3), strict=True)]
    rows = measure({"eager": eager, "compiled": compiled}, asked, [1, 4], 2, compiled=[4])
    assert [(row["name"], row["batch"]) for row in rows] == [("eager", 1), ("eager", 4), ("compiled", 4)]
    assert [row["questions_per_s"]["median"] for row in rows] == [2.0, 8.0, 16.0]
    assert [row["p50_ms"]["max"] for row in rows] == [500.0, 500.0, 250.0]
    assert [row.get("compile_s") for row in rows] == [None, None, 19.8]
    # two rounds and the uncounted pass; a batch is forced to its longest answer
    assert compiled.calls == [(4, 3, 3)] * 3
    assert sorted(eager.calls) == [(1, 2, 2)] * 9 + [(1, 3, 3)] * 3 + [(4, 3, 3)] * 3


def checkpoint(config: ReaderConfig, directory, tokenizer_json: str) -> str:
    tokenizer = directory / "words.json"
    tokenizer.write_text(tokenizer_json)
    save_reader(directory / "reader", random_reader(config), tokenizer, torch.float32)
    return str(directory / "reader")


def test_the_command_writes_a_row_for_each_batch(tmp_path, tokenizer_json, monkeypatch, capsys):
    monkeypatch.setitem(WORKLOADS, "paper", WorkloadSpec(Uniform(1, 3), exactly(20), Uniform(2, 5)))
    out = tmp_path / "deep" / "peers.json"
    run = ["--fid", checkpoint(PLAIN, tmp_path, tokenizer_json), "--requests", "4", "--batches", "1", "4", "--rounds", "2"]
    assert transformers_fid.main([*run, "--passages", "2", "--new-tokens", "3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["peers"]] == [1, 4]
    for row in result["peers"]:
        assert row["name"] == "transformers generate, eager, float32" and row["reader"] == "fid"
        assert (row["passages"], row["passage_tokens"], row["new_tokens"]) == (2, 20, 3)
        assert row["excludes"] == "tokenization, network" and set(row["versions"]) == {"torch", "transformers"}
        for numbers in (row["questions_per_s"], row["p50_ms"]):
            assert 0 < numbers["min"] <= numbers["median"] <= numbers["max"]
    assert result["settings"]["requests"] == 4
    capsys.readouterr()
    assert transformers_fid.main([*run, "--batches", "3"]) == 1
    assert "wanted a multiple of every batch" in capsys.readouterr().err


def test_questions_of_a_file_are_answered_as_long_as_the_reader_likes(tmp_path, tokenizer_json):
    data, out = tmp_path / "data.json", tmp_path / "peers.json"
    entry = {"question": "w1 w2", "answers": ["w3"], "ctxs": [{"title": "w4", "text": "w5 w6"}, {"title": "w7", "text": "w8"}]}
    data.write_text(json.dumps([entry] * 2))
    run = ["--fid", checkpoint(PLAIN, tmp_path, tokenizer_json), "--workload", "real", "--data", str(data), "--batches", "2"]
    assert transformers_fid.main([*run, "--rounds", "1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["peers"]
    assert row["passages"] == 2 and row["new_tokens"] == "at most 32"


def test_the_command_refuses_fido(tmp_path, tokenizer_json, capsys):
    assert transformers_fid.main(["--fid", checkpoint(FIDO, tmp_path, tokenizer_json)]) == 1
    assert "error: transformers' T5 cannot run FiDO" in capsys.readouterr().err
    assert transformers_fid.main(["--preset", "base-xl"]) == 1
    assert "decoder.d_model: wanted the encoder's 768, got 2048" in capsys.readouterr().err
