"""Training: it learns, and a resumed run is the run that was not cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint.config import ReaderConfig, StackConfig
from export.checkpoint.files import load_reader
from export.checkpoint.weights import fido_from_fid
from export.model.reader import Reader
from training.corpus.examples import ExampleSource, Mixture, read_jsonl
from training.fit import trainer as trainer_module
from training.fit.batches import BatchPlan, make_batch
from training.fit.evaluation import predict, score, scores_by_relation
from training.fit.trainer import Trainer, TrainOptions


@pytest.fixture(autouse=True)
def one_thread():
    # Matrices this small only wait for each other's threads, on a busy machine for long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_reader(*, fido: bool = False) -> Reader:
    stack = StackConfig(d_model=48, d_kv=12, d_ff=56, num_layers=2, num_heads=4, num_kv_heads=4)
    reader = Reader(
        ReaderConfig(
            encoder=stack,
            decoder=dataclasses.replace(stack, num_kv_heads=1) if fido else stack,
            vocab_size=3072,
            encoder_decoder_attention_period=2 if fido else 1,
            tie_word_embeddings=True,
            scale_decoder_outputs=True,
            passage_length=64,
        )
    )
    reader.reset_parameters(0)
    return reader


def options(corpus, out, steps, **changes) -> TrainOptions:
    fixed = {"device": "cpu", "num_workers": 0, "passages_per_batch": 12, "evaluation_questions": 2, "warmup_steps": 2, "bfloat16": False}
    return TrainOptions(corpus, out, steps=steps, **{**fixed, **changes})


def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path):
    whole = Trainer(tiny_reader(), options(corpus, tmp_path / "whole", 6))
    whole.run()
    Trainer(tiny_reader(), options(corpus, tmp_path / "cut", 6)).run(stop_after_steps=3)
    resumed = Trainer(tiny_reader(), options(corpus, tmp_path / "cut", 6))
    assert resumed.step == 3
    resumed.run()
    for name, weight in whole.reader.state_dict().items():
        assert torch.equal(weight, resumed.reader.state_dict()[name]), name
    for name, weight in whole.averaged.state_dict().items():
        assert torch.equal(weight, resumed.averaged.state_dict()[name]), name


def test_saved_checkpoints_load_and_convert(corpus, tmp_path):
    Trainer(tiny_reader(), options(corpus, tmp_path / "fid", 2)).run()
    assert {weight.dtype for weight in load_file(tmp_path / "fid" / "model.safetensors").values()} == {torch.float16}
    loaded = load_reader(tmp_path / "fid")
    converted = fido_from_fid(loaded, 2, 1)
    trainer = Trainer(converted, options(corpus, tmp_path / "converted", 2, up_training=True))
    trainer.run()
    assert trainer.reader.config.kind == "fido"
    assert (tmp_path / "converted" / "model.safetensors").stat().st_size < (tmp_path / "fid" / "model.safetensors").stat().st_size
    predictions = predict(load_reader(tmp_path / "converted").float(), trainer.tokenizer, read_jsonl(corpus / "heldout.jsonl")[:5], 3)
    assert len(predictions) == 5
    assert score(predictions).count == 5
    assert sum(part.count for part in scores_by_relation(predictions).values()) == 5


@pytest.mark.parametrize("fido", [False, True])
def test_a_tiny_reader_learns_a_batch_by_heart(corpus, tmp_path, fido):
    trainer = Trainer(tiny_reader(fido=fido), options(corpus, tmp_path, 10_000, dropout_rate=0.0, peak_learning_rate=5e-3))
    source = ExampleSource(corpus, trainer.tokenizer, 64)
    batch = make_batch(source, BatchPlan(0, 3, Mixture(1, 1.0, 0.0), 48), seed=0)
    losses = [float(trainer.train_step(batch)) for _ in range(80)]
    assert losses[0] > 6.0
    assert losses[-1] < 0.3


@pytest.mark.parametrize("budget", [{"seconds": 1.0, "steps": 1}, {}])
def test_both_budgets_or_none_are_refused(corpus, tmp_path, budget):
    with pytest.raises(ValueError, match="either seconds or steps"):
        TrainOptions(corpus, tmp_path, **budget)


def test_a_budget_of_steps_is_exact(corpus, tmp_path):
    trainer = Trainer(tiny_reader(), options(corpus, tmp_path, 3))
    trainer.run()
    assert trainer.step == 3
    assert [line["step"] for line in read_jsonl(tmp_path / "training_log.jsonl")] == [3]


def test_a_budget_of_seconds_counts_the_time_before_a_resumption(corpus, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: clock[0])

    class TenSecondSteps(Trainer):
        def train_step(self, batch):
            clock[0] += 10
            return super().train_step(batch)

    seconds = options(corpus, tmp_path, None, seconds=45.0, evaluate_every_s=1e9, save_every_s=1e9)
    TenSecondSteps(tiny_reader(), seconds).run(stop_after_steps=2)
    clock[0] += 1000  # between the runs, which is not training
    resumed = TenSecondSteps(tiny_reader(), seconds)
    assert (resumed.step, resumed.progress(resumed.step)) == (2, 20 / 45)
    resumed.run()
    assert resumed.step == 5
    (line,) = read_jsonl(tmp_path / "training_log.jsonl")
    assert (line["step"], line["elapsed_s"]) == (5, 50.0)
