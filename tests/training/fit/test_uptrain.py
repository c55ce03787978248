"""Up-training: the packed pass is the padded one, growth changes nothing, any number of processes and any interruption give the same."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from export.build import export_graphs
from export.checkpoint.config import ConfigError
from export.checkpoint.files import Checkpoint, load_checkpoint, save_reader
from export.checkpoint.weights import fido_from_fid, with_larger_decoder
from export.errors import UsageError
from serving.pipeline.prompt import PromptEncoder
from tests.conftest import CONFIGS, FID, FIDO, T5_V1_0, random_passages, random_reader
from training.fit.fid_data import BatchOrder, DataError, PackedBatch, packed, tokenized
from training.fit.packed import LossWeights, Objective, PackedReader, Pass
from training.fit.uptrain import uptrain
from training.fit.uptrain_options import UptrainOptions, learning_rate, starting_reader

ROOT = pathlib.Path(__file__).parents[3]
WORDS = [f"w{i}" for i in range(80)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_data(file: pathlib.Path, questions: int, seed: int = 0) -> pathlib.Path:
    """Questions with 2 to 4 passages; the answer is the passages' first word."""
    rng = np.random.default_rng(seed)
    with file.open("w") as stream:
        for _ in range(questions):
            answer = str(rng.choice(WORDS))
            texts = [" ".join([answer, *rng.choice(WORDS, rng.integers(1, 15))]) for _ in range(rng.integers(2, 5))]
            ctxs = [{"title": "w1", "text": text} for text in texts]
            stream.write(json.dumps({"question": "w2 w3", "answers": [answer], "ctxs": ctxs}) + "\n")
    return file


@pytest.fixture
def checkpoint(tmp_path, tokenizer_json) -> pathlib.Path:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(tokenizer_json)
    save_reader(tmp_path / "my fid", random_reader(FID), tokenizer, torch.float32)
    return tmp_path / "my fid"


def options(checkpoint, data, out, **changes) -> UptrainOptions:
    fixed = {
        "period": 3,
        "num_kv_heads": 1,
        "n_passages": (2, 4),
        "target_length": 4,
        "steps": 4,
        "batch_questions": 6,
        "micro_questions": 2,
    }
    fixed |= {"device": "cpu", "warmup_steps": 2, "learning_rate": 1e-2, "evaluate_every": 2, "log_every": 1, "save_every": 2, "threads": 1}
    return UptrainOptions(str(checkpoint), data, out, **{**fixed, "tensorboard": False, **changes})


def log_of(directory: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]


# ---- The pass ----


def ragged_batch(config, passages_per_chunk: int = 3) -> tuple[PackedBatch, torch.Tensor]:
    """Questions of 3, 5 and 1 passages, packed; and the same padded, int64[3, 5, passage_length]."""
    rng = np.random.default_rng(0)
    questions = [[rng.integers(3, 90, rng.integers(1, 20)) for _ in range(count)] for count in (3, 5, 1)]
    targets = [rng.integers(3, 90, length) for length in (2, 5, 4)]
    padded = torch.zeros(3, 5, config.passage_length, dtype=torch.long)
    for row, passages in enumerate(questions):
        for place, ids in enumerate(passages):
            padded[row, place, : len(ids)] = torch.from_numpy(ids)
    return packed(questions, targets, config, passages_per_chunk), padded


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_packed_pass_and_its_gradients_are_those_of_the_padded_batch(name, recompute):
    config = CONFIGS[name]
    batch, padded = ragged_batch(config)
    valid = batch.targets != -100
    grown = []
    for is_packed in (True, False):
        reader = random_reader(config).requires_grad_(True)
        if is_packed:
            logits, shares = PackedReader(reader, Pass(recompute=recompute))(batch, shares=True)
            assert torch.allclose(shares.sum(-1)[valid], torch.ones(int(valid.sum())), atol=1e-5)
            assert float(shares.detach()[2, :, 1:].sum()) == 0.0, "the third question has one passage"
        else:
            logits = reader(padded, (padded != 0).long(), functional.pad(batch.targets, (1, 0))[:, :-1].clamp(min=0))
        functional.cross_entropy(logits[valid], batch.targets[valid]).backward()
        grown.append((logits.detach()[valid], {key: weight.grad for key, weight in reader.named_parameters()}))
    (logits, gradients), (wanted, wanted_gradients) = grown
    assert torch.allclose(logits, wanted, atol=1e-5)
    for key, gradient in wanted_gradients.items():
        assert torch.allclose(gradients[key], gradient, atol=1e-5), key


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_answers_are_the_readers(name):
    config = CONFIGS[name]
    batch, padded = ragged_batch(config)
    reader = random_reader(config)
    wanted = reader.generate(padded, (padded != 0).long(), 6).tokens
    assert PackedReader(reader, Pass()).answers(batch, 6) == [[token for token in row if token != 1] for row in wanted]


def test_shares_without_softmax_by_library_are_its_attention():
    batch, _ = ragged_batch(FIDO)
    model = PackedReader(random_reader(FIDO), Pass())
    with torch.no_grad():
        assert torch.allclose(model(batch, shares=True)[0], model(batch)[0], atol=1e-5)


def test_losses_of_parts_add_up_and_a_reader_has_nothing_to_learn_from_itself():
    batch, _ = ragged_batch(FID)
    reader = random_reader(FID)
    student = PackedReader(reader, Pass())
    taught = student(batch, shares=True)
    tokens, count = int((batch.targets != -100).sum()), len(batch.targets)
    loss, parts = Objective(student, LossWeights(1.0, 2.0, 3.0, 1.5))(batch, taught, tokens, count)
    assert parts[1:].abs().max() < 1e-5
    assert torch.allclose(loss, parts[0], atol=1e-4)
    halves = Objective(student, LossWeights())(batch, taught, 2 * tokens, 2 * count)[0]
    assert torch.allclose(2 * halves, parts[0], atol=1e-4)
    other = PackedReader(random_reader(FID, seed=1), Pass())(batch, shares=True)
    _, apart = Objective(student, LossWeights())(batch, other, tokens, count)
    assert float(apart[1]) > 0.01 and float(apart[2]) > 1e-4


# ---- Growth ----


@pytest.mark.parametrize("name", ["fid", "fido", "t5_v1_0", "released_fid"])
@pytest.mark.parametrize(
    "change", [{"num_layers": 2}, {"d_ff": 9}, {"num_heads": 2}, {"d_model": 9}, {"num_layers": 2, "d_ff": 3, "d_model": 40}]
)
def test_a_larger_decoder_computes_the_same_and_every_new_weight_can_learn(name, change):
    config = CONFIGS[name]
    old = config.decoder
    factor = change.get("num_layers", 1)
    sizes = {key: getattr(old, key) * factor if key == "num_layers" else getattr(old, key) + more for key, more in change.items()}
    decoder = dataclasses.replace(old, **sizes)
    if old.num_kv_heads == old.num_heads:
        decoder = dataclasses.replace(decoder, num_kv_heads=decoder.num_heads)
    reader = random_reader(config)
    larger = with_larger_decoder(reader, decoder, config.encoder_decoder_attention_period * factor)
    ids, mask = random_passages(3, 9, 0, batch=2)
    targets = torch.randint(3, 90, (2, 4))
    assert torch.allclose(larger(ids, mask, targets), reader(ids, mask, targets), atol=1e-4)
    assert sum(w.numel() for w in larger.parameters()) > sum(w.numel() for w in reader.parameters())
    # Whatever writes the residual stream starts at zero where it is new. After two steps nothing is at rest any more.
    larger.requires_grad_(True)
    before = {key: weight.detach().clone() for key, weight in larger.named_parameters()}
    optimizer = torch.optim.SGD(larger.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(larger(ids, mask, targets).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    still = [key for key, weight in larger.named_parameters() if "decoder.layers" in key and torch.equal(weight, before[key])]
    assert still == []


def test_growth_that_does_not_fit_is_refused():
    reader = random_reader(CONFIGS["grouped"])
    with pytest.raises(ConfigError, match="num_heads: wanted 6, because heads of grouped-query attention cannot be added, got 8"):
        with_larger_decoder(reader, dataclasses.replace(reader.config.decoder, num_heads=8), 2)
    with pytest.raises(ConfigError, match="num_layers: wanted at least 5, got 2"):
        with_larger_decoder(reader, dataclasses.replace(reader.config.decoder, num_layers=2), 2)


def test_training_starts_from_the_grown_and_converted_reader(tmp_path):
    reader = random_reader(T5_V1_0)
    asked = options("x", tmp_path, tmp_path, period=6, num_kv_heads=2, decoder_layers=6, decoder_d_ff=20)
    start = starting_reader(reader, asked)
    assert start.config.decoder == dataclasses.replace(T5_V1_0.decoder, num_layers=6, d_ff=20, num_kv_heads=2)
    assert start.config.cross_attention_layers == (5,)
    plain = starting_reader(reader, options("x", tmp_path, tmp_path, period=3))
    for name, weight in fido_from_fid(reader, 3, 1).state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name


# ---- The data ----


def test_tokens_are_what_a_served_reader_would_get(tmp_path, engines):
    checkpoint, directory = engines["fid"]
    from serving.contract.manifest import Manifest

    data = tokenized(
        write_data(tmp_path / "d.jsonl", 5), FID, checkpoint.tokenizer_json, n_passages=3, target_length=4, cache=tmp_path / "cache"
    )
    from tokenizers import Tokenizer

    encoder = PromptEncoder(Tokenizer.from_str(checkpoint.tokenizer_json), Manifest.load(directory))
    for row, line in enumerate((tmp_path / "d.jsonl").read_text().splitlines()):
        example = json.loads(line)
        ctxs = example["ctxs"][:3]
        served = encoder.encode(example["question"], [c["text"] for c in ctxs], [c["title"] for c in ctxs])
        mine = data.example_prompts(row, 3)
        assert [ids.tolist() for ids in mine] == [
            ids[: mask.sum()].tolist() for ids, mask in zip(served.input_ids, served.attention_mask, strict=True)
        ]


def test_every_example_is_trained_on_once_an_epoch_and_batches_are_of_like_length(tmp_path, tokenizer_json):
    data = tokenized(write_data(tmp_path / "d.jsonl", 40), FID, tokenizer_json, n_passages=4, target_length=4, cache=tmp_path)
    order = BatchOrder(np.arange(40), 4, (4,), seed=0)
    epochs = [[order.batch(data, step)[0] for step in range(first, first + 10)] for first in (0, 10)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).tolist()) == list(range(40))
    assert [rows.tolist() for rows in epochs[0]] != [rows.tolist() for rows in epochs[1]]
    tokens = data.example_tokens(4)
    inside = np.mean([np.ptp(tokens[rows]) for rows in epochs[0]])
    assert inside < 0.5 * np.ptp(tokens)
    again = BatchOrder(np.arange(40), 4, (4,), seed=0).batch(data, 13)
    assert again[0].tolist() == order.batch(data, 13)[0].tolist()


def test_data_without_a_usable_example_are_refused(tmp_path, tokenizer_json):
    (tmp_path / "d.jsonl").write_text('{"question": "w1", "answers": [], "ctxs": [{"title": "", "text": "w1"}]}\n')
    with pytest.raises(DataError, match="wanted examples with passages and answers, got none among 1"):
        tokenized(tmp_path / "d.jsonl", FID, tokenizer_json, n_passages=4, target_length=4, cache=tmp_path)


# ---- Runs ----


def test_a_resumed_run_is_the_run_that_was_not_cut(tmp_path, checkpoint):
    data = write_data(tmp_path / "d.jsonl", 40)
    more = {"dropout": 0.1, "ema": 0.9, "recompute": True}
    uptrain(options(checkpoint, data, tmp_path / "whole", **more))
    uptrain(options(checkpoint, data, tmp_path / "cut", **more), stop_after=3)
    with (tmp_path / "cut" / "training_log.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss": "of the process that was killed"}\n')
    uptrain(options(checkpoint, data, tmp_path / "cut", **more))
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "cut")]
    for name, weight in states[0]["reader"].items():
        assert torch.equal(weight, states[1]["reader"][name]), name
    assert all(torch.equal(a, b) for a, b in zip(states[0]["averaged"], states[1]["averaged"], strict=True))
    losses = [[line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with pytest.raises(UsageError, match=r"holds another run \(seed: 0 there, 1 here\)"):
        uptrain(options(checkpoint, data, tmp_path / "cut", **more, seed=1))


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one(tmp_path, checkpoint, shard):
    data = write_data(tmp_path / "d.jsonl", 40)
    one, two = (options(checkpoint, data, tmp_path / name, shard=shard and name == "two") for name in ("one", "two"))
    uptrain(one)
    words = ["uptrain", str(checkpoint), str(data), "--out", str(two.out)]
    for name, value in two.as_json().items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("checkpoint", "data", "out") or value is None:
            continue
        words += (
            [flag if value else f"--no-{flag[2:]}"]
            if isinstance(value, bool)
            else [flag, *map(str, value if isinstance(value, list) else [value])]
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "training", *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "clients")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [[line for line in log_of(run.out) if "loss" in line] for run in (one, two)]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-4), (mine, theirs)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    readers = [load_checkpoint(run.out).reader.state_dict() for run in (one, two)]
    for name, weight in readers[0].items():
        assert torch.allclose(weight, readers[1][name], atol=2e-4), name


def test_training_raises_em_and_what_it_writes_exports_with_its_provenance(tmp_path, checkpoint):
    data, dev = write_data(tmp_path / "d.jsonl", 60), write_data(tmp_path / "dev.jsonl", 12, seed=1)
    done = uptrain(
        options(
            checkpoint, data, tmp_path / "out", dev=dev, test=dev, steps=150, batch_questions=12, micro_questions=12, logits_weight=0.0,
            passages_weight=0.0, learning_rate=1e-2, evaluate_every=50, log_every=50, save_every=1000, n_passages=(4,)
        )
    )  # fmt: skip
    lines = log_of(tmp_path / "out")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert done["test_em"] == done["dev_em"] == max(line.get("dev_em", 0.0) for line in lines) > lines[0]["dev_em"]
    assert all(line["tokens_per_s"] > 0 for line in lines if "loss" in line)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.reader.config.kind == "fido"
    manifest = export_graphs(loaded, tmp_path / "engines", gpu=False)
    noted = manifest.provenance["uptrained"]
    assert noted["checkpoint"]["source"] == "my fid" and noted["teacher"] is None
    assert noted["data"]["examples"] == 60 and len(noted["data"]["sha256"]) == 64
    assert noted["options"]["period"] == 3 and noted["versions"]["torch"] == torch.__version__
    assert noted["test_em"] == done["test_em"]


def test_a_run_whose_em_does_not_rise_stops_early(tmp_path, checkpoint):
    data = write_data(tmp_path / "d.jsonl", 40)
    uptrain(options(checkpoint, data, tmp_path / "out", steps=100, learning_rate=0.0, evaluate_every=2, patience=2))
    assert max(line["step"] for line in log_of(tmp_path / "out")) == 4


def test_schedules():
    asked = options("x", ROOT, ROOT, steps=110, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    assert [learning_rate(asked, step) for step in (0, 9, 60)] == pytest.approx([0.1, 1.0, 0.55])
    assert learning_rate(asked, 110) == pytest.approx(0.1)
    constant = dataclasses.replace(asked, schedule="constant")
    assert [learning_rate(constant, step) for step in (4, 50, 109)] == pytest.approx([0.5, 1.0, 1.0])


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, checkpoint, tokenizer_json):
    other = tmp_path / "other"
    (tmp_path / "t.json").write_text(tokenizer_json.replace("w79", "v79"))
    save_reader(other, random_reader(FID), tmp_path / "t.json", torch.float32)
    with pytest.raises(UsageError, match="its logits mean other tokens"):
        uptrain(options(checkpoint, write_data(tmp_path / "d.jsonl", 40), tmp_path / "out", teacher=str(other)))


def test_checkpoints_of_other_makers_have_no_notes_of_training(tokenizer_json):
    assert Checkpoint(random_reader(FID), tokenizer_json, "x", "own").uptrained is None


@pytest.mark.slow
def test_the_demo_raises_em_from_nothing_and_exports(tmp_path, corpus):
    questions = corpus / "heldout.jsonl"
    made = [word for file in (ROOT / ".venv/.dev", questions) for word in ("-o", str(file))]
    made += ["-o", ".venv/.dev"]
    command = ["make", *made, "uptrain-demo", f"PY={sys.executable}", f"CORPUS={questions}", f"DEMO_TRAINING={tmp_path}/demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluations = [line["dev_em"] for line in log_of(tmp_path / "demo/fido") if "questions" in line]
    assert evaluations[0] < 10 and evaluations[-1] > evaluations[0] + 20, evaluations
    manifest = json.loads((tmp_path / "demo/engines/manifest.json").read_text())
    assert manifest["reader"] == "fido" and manifest["provenance"]["uptrained"]["teacher"]["source"] == "fid"


def test_the_scripts_for_a_gpu_run_through(tmp_path):
    """With a tiny reader on the CPU: every part but Trainer's, which needs accelerate."""
    command = [sys.executable, "-m", "training.bench", "--preset", "tiny", "--passages", "2", "--passage-tokens", "32", "--questions", "2"]
    command += ["--steps", "1", "--warmup", "1", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path / "training.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["tokens_per_s_1"] > 0 and result["rows"]["fido"]["uptrain"]["tokens_per_s"] > 0
    write_data(tmp_path / "heldout.jsonl", 4)
    write_data(tmp_path / "heldout_second.jsonl", 4)
    write_data(tmp_path / "train.jsonl", 30)
    command = [sys.executable, "-m", "training.ablation", "--corpus", str(tmp_path), "--out", str(tmp_path), "--passages", "2"]
    command += ["--steps", "2", "--batch", "4", "--device", "cpu", "--parallel", "2", "--rows", "GQA-2", "period 3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert list(rows) == ["GQA-2, period 2", "MQ, period 3, 6 decoder layers"]
    assert all(row["test_em"] >= 0 and row["passages"] == 16 for row in rows.values())
    assert "| FiD, the teacher |" in (tmp_path / "ablation.md").read_text()
