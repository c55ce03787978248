"""Three layouts in, one error for all faults, and nothing unpickled into code."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, processors

from export.checkpoint.config import ConfigError
from export.checkpoint.files import load_checkpoint, load_reader, save_reader
from export.checkpoint.tokenizer import end_token_id, require_embeddings
from export.checkpoint.weights import CheckpointError, fido_from_fid, hf_name
from tests.conftest import FIDO, RELEASED_FID, T5_V1_0, VOCAB_SIZE, random_passages, random_reader


@pytest.fixture
def tokenizer_file(tmp_path, tokenizer_json):
    path = tmp_path / "some-tokenizer.json"
    path.write_text(tokenizer_json)
    return path


@pytest.fixture
def own(tmp_path, tokenizer_file):
    save_reader(tmp_path / "own", random_reader(FIDO), tokenizer_file, torch.float32, {"steps": 3})
    return tmp_path / "own"


def fid_directory(path, reader, bias=True):
    """A directory as facebookresearch/FiD writes it: wrapped names, pytorch_model.bin, transformers 3.0.2's config.json."""
    path.mkdir()
    weights = {}
    for name, weight in reader.state_dict().items():
        if name == "decoder.cross_relative_bias.weight" and not bias:
            continue
        wrapped = re.sub(r"^encoder\.block\.(\d+)\.", r"encoder.encoder.block.\1.module.", hf_name(name))
        wrapped = re.sub(r"^encoder\.final_layer_norm", "encoder.encoder.final_layer_norm", wrapped)
        weights[wrapped] = weight.clone()
    weights["encoder.encoder.embed_tokens.weight"] = weights["decoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    weights["lm_head.weight"] = weights["shared.weight"].clone()
    torch.save(weights, path / "pytorch_model.bin")
    e, d = reader.config.encoder, reader.config.decoder
    fields = {"vocab_size": VOCAB_SIZE, "d_model": e.d_model, "d_kv": e.d_kv, "d_ff": e.d_ff, "num_layers": e.num_layers}
    fields |= {"num_heads": e.num_heads, "num_decoder_layers": d.num_layers, "model_type": "t5", "layer_norm_epsilon": 1e-6}
    (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.fixture
def released(tmp_path):

    stack = RELEASED_FID.encoder
    config = dataclasses.replace(RELEASED_FID, decoder=dataclasses.replace(stack, num_layers=3), passage_length=200)
    reader = random_reader(config)
    return reader, fid_directory(tmp_path / "nq_reader", reader)


def test_own_layout_round_trips(own):
    reader = load_reader(own)
    assert reader.config == FIDO
    assert all(torch.equal(a, b) for a, b in zip(reader.state_dict().values(), random_reader(FIDO).state_dict().values(), strict=True))
    assert json.loads((own / "config.json").read_text())["notes"] == {"steps": 3}


@torch.no_grad()
def test_released_fid_layout_keeps_its_cross_attention_bias_and_takes_no_eos(released, tokenizer_file):
    reader, directory = released
    loaded = load_checkpoint(directory, tokenizer=tokenizer_file)
    assert loaded.layout == "facebookresearch/FiD"
    assert loaded.reader.config == reader.config
    assert loaded.reader.config.cross_attention_relative_bias and not loaded.reader.config.append_eos
    ids, mask = random_passages(2, 9, 0)
    targets = torch.tensor([[0, 5, 6]])
    assert torch.equal(loaded.reader(ids, mask, targets), reader(ids, mask, targets))


def test_released_fid_needs_a_tokenizer_and_says_so(released):
    with pytest.raises(CheckpointError, match=r"no tokenizer.json or spiece.model; pass one with --tokenizer"):
        load_checkpoint(released[1])


def test_every_missing_extra_and_misshapen_weight_is_in_one_error(own):
    weights = load_file(str(own / "model.safetensors"))
    del weights["decoder.layers.1.cross_attention.k.weight"]
    weights["decoder.layers.0.cross_attention.k.weight"] = torch.zeros(3, 12)
    weights["encoder.final_norm.weight"] = torch.zeros(13)
    save_file(weights, str(own / "model.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        load_reader(own)
    message = str(caught.value)
    assert "3 weights" in message
    assert "missing decoder.layers.1.cross_attention.k.weight [3, 12]" in message
    assert "extra decoder.layers.0.cross_attention.k.weight [3, 12]" in message
    assert "misshapen encoder.final_norm.weight: wanted [12], got [13]" in message


def test_a_copy_of_the_embedding_that_differs_is_refused(tmp_path, tokenizer_file):

    config = dataclasses.replace(T5_V1_0, decoder=dataclasses.replace(T5_V1_0.encoder, num_layers=3))
    directory = fid_directory(tmp_path / "fid", random_reader(config))
    weights = torch.load(directory / "pytorch_model.bin", weights_only=True)
    weights["encoder.encoder.embed_tokens.weight"] += 1
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight differs from shared.weight"):
        load_checkpoint(directory, tokenizer=tokenizer_file)


class Malicious:
    def __reduce__(self):
        return (open, ("/tmp/this-file-must-not-appear", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(released, tokenizer_file, tmp_path):
    from pathlib import Path

    (released[1] / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Malicious()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_checkpoint(released[1], tokenizer=tokenizer_file)
    assert not Path("/tmp/this-file-must-not-appear").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "model_type: wanted t5 or fid-reader, got 'bert'"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_damaged_directories_are_named(own, damage, message):
    damage(own)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(own)


def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub():
    with pytest.raises(CheckpointError, match="wanted a directory"):
        load_checkpoint("./no/such/place")


def test_weights_that_overflow_the_stored_type_are_not_saved(tmp_path, tokenizer_file):
    reader = random_reader(FIDO)
    with torch.no_grad():
        reader.embedding.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"not finite in torch.float16: embedding.weight"):
        save_reader(tmp_path / "new", reader, tokenizer_file, torch.float16)
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_conversion_pools_heads_and_drops_cross_attention():
    fid = random_reader(T5_V1_0)
    fido = fido_from_fid(fid, period=3, num_kv_heads=2)
    assert fido.config.kind == "fido" and fido.config.cross_attention_layers == (2,)
    old, new = fid.decoder.layers[2].cross_attention.k.weight, fido.decoder.layers[2].cross_attention.k.weight
    torch.testing.assert_close(new[:5], (old[:5] + old[5:10]) / 2)
    assert torch.equal(fido.decoder.layers[2].cross_attention.q.weight, fid.decoder.layers[2].cross_attention.q.weight)
    assert not any(f"layers.{i}.cross" in name for name in fido.state_dict() for i in (0, 1))
    ids, mask = random_passages(2, 9, 0)
    assert torch.equal(fido.encode(ids, mask)[0], fid.encode(ids, mask)[0])
    with pytest.raises(ConfigError, match="wanted a divisor of the checkpoint's 4, got 3"):
        fido_from_fid(fid, 3, 3)


@torch.no_grad()
def test_conversion_that_changes_nothing_answers_the_same():
    fid = random_reader(T5_V1_0)
    ids, mask = random_passages(2, 9, 0)
    targets = torch.tensor([[0, 5, 6]])
    assert torch.equal(fido_from_fid(fid, 1, 4)(ids, mask, targets), fid(ids, mask, targets))


def test_command_line_tells_faults_without_a_traceback():
    done = subprocess.run([sys.executable, "-m", "export", "onnx", "./nowhere", "out"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ./nowhere") and "Traceback" not in done.stderr


# One configuration class for FiD and FiDO, and the published sizes.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository in a directory; returns the directory and the patterns of each download."""
    files, asked = tmp_path / "hub", []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        if name != "org/reader":
            raise OSError("404 Client Error.\nRepository Not Found")
        snapshot = tmp_path / f"snapshot{len(asked)}"
        snapshot.mkdir()
        for path in files.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (snapshot / path.name).write_bytes(path.read_bytes())
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return files, asked


def test_a_reader_of_the_hub_is_downloaded_without_what_is_not_read(hub, own):
    files, asked = hub
    own.rename(files)
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "README.md", "training_args.bin"):
        (files / name).write_bytes(b"gigabytes")
    loaded = load_checkpoint("org/reader")
    assert loaded.reader.config == FIDO and loaded.source == "org/reader" and len(asked) == 1
    assert sorted(path.name for path in loaded.directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_reader_of_the_hub_without_safetensors_is_downloaded_as_a_pickle(hub, released, tokenizer_file):
    files, asked = hub
    released[1].rename(files)
    (files / "flax_model.msgpack").write_bytes(b"gigabytes")
    loaded = load_checkpoint("org/reader", tokenizer=tokenizer_file)
    assert loaded.layout == "facebookresearch/FiD" and len(asked) == 2
    assert sorted(path.name for path in loaded.directory.iterdir()) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("name", ["org/other", "t5-nothing"])
def test_what_the_hub_does_not_have_is_told_in_one_line(hub, name):
    message = f"{name}: no such directory, and the hub does not have it: 404 Client Error. Repository Not Found"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_checkpoint(name)


@pytest.mark.parametrize("place", ["/no/such/place", "~/place", "../place", "a/b/c"])
def test_what_can_only_be_a_path_is_not_looked_up_on_the_hub(hub, place):
    with pytest.raises(CheckpointError, match=f"^{re.escape(place)}: wanted a directory with config.json"):
        load_checkpoint(place)
    assert hub[1] == []


def test_options_come_before_what_the_checkpoint_states_and_only_what_nobody_states_is_assumed(released, own, tokenizer_file, capsys):
    options = {"passage_length": 99, "append_eos": True, "prompt_template": "{question} {context}"}
    for directory in (released[1], own):
        config = load_checkpoint(directory, tokenizer=tokenizer_file, **options).reader.config
        assert {name: getattr(config, name) for name in options} == options
        assert "assumed" not in capsys.readouterr().err
    load_checkpoint(released[1], tokenizer=tokenizer_file, append_eos=True)
    assert re.fullmatch(
        r"warning: .*nq_reader: assumed the prompt 'question: .*', 200 tokens of it, which its files do not state; "
        r"--prompt-template, --passage-length would\n",
        capsys.readouterr().err,
    )
    load_checkpoint(own)
    assert capsys.readouterr().err == ""


@torch.no_grad()
def test_the_bias_of_cross_attention_is_applied_as_stated_and_named_where_it_is_not(released, tokenizer_file, capsys):
    directory = released[1]
    loaded = load_checkpoint(directory, tokenizer=tokenizer_file, cross_attention_bias=False)
    assert not loaded.reader.config.cross_attention_relative_bias
    assert "the cross-attention bias is not applied; --cross-attention-bias applies it" in capsys.readouterr().err
    loaded = load_checkpoint(directory, tokenizer=tokenizer_file)
    assert loaded.reader.config.cross_attention_relative_bias and "cross-attention bias" not in capsys.readouterr().err
    assert not loaded.reader.training and not any(weight.requires_grad for weight in loaded.reader.parameters())
    assert not load_reader(directory).training and all(weight.requires_grad for weight in load_reader(directory).parameters())


def test_a_reader_is_saved_over_a_former_one_and_keeps_nothing_else_there(own, tokenizer_file):
    (own / "notes.txt").write_text("mine")
    save_reader(own, random_reader(FIDO, seed=1), tokenizer_file)
    assert sorted(path.name for path in own.iterdir()) == ["config.json", "model.safetensors", "notes.txt", "tokenizer.json"]
    assert json.loads((own / "config.json").read_text())["notes"] == {}
    stored = load_file(str(own / "model.safetensors"))
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert torch.equal(load_reader(own).embedding.weight, random_reader(FIDO, seed=1).embedding.weight.half().float())


def test_inputs_end_with_the_token_that_the_tokenizer_puts_there(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    assert end_token_id(tokenizer.to_str()) == 1  # no post-processor: </s>
    for text, token in (("w5", tokenizer.token_to_id("▁w5")), ("</s>", 1)):
        ending = Tokenizer.from_str(tokenizer_json)
        name = "▁w5" if text == "w5" else text
        ending.post_processor = processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, token)])
        assert end_token_id(ending.to_str()) == token
        ending.normalizer = normalizers.Prepend("w7 w8")  # even an empty text has tokens of its own
        assert end_token_id(ending.to_str()) == token
    both = Tokenizer.from_str(tokenizer_json)
    both.post_processor = processors.TemplateProcessing(single="<pad> $A ▁w5", special_tokens=[("<pad>", 0), ("▁w5", 11)])
    assert end_token_id(both.to_str()) == 1  # not one token at the end: </s>


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tokenizer_json):
    require_embeddings(tokenizer_json, VOCAB_SIZE, "here")
    with pytest.raises(CheckpointError, match="here: the tokenizer has token id 96, but the embedding has 96 rows"):
        require_embeddings(tokenizer_json, VOCAB_SIZE - 1, "here")
