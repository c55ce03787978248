"""Three layouts in, one error for all faults, and nothing unpickled into code."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint.config import ConfigError, ReaderConfig, reader_preset, stack_preset
from export.checkpoint.files import load_checkpoint, load_reader, save_reader
from export.checkpoint.weights import CheckpointError, expected_shapes, fido_from_fid, hf_name
from tests.conftest import CONFIGS, FID, FIDO, RELEASED_FID, T5_V1_0, VOCAB_SIZE, random_passages, random_reader


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
    import dataclasses

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
    import dataclasses

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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trips(config):
    assert ReaderConfig.from_dict(json.loads(config.to_json())) == config


def test_cross_attention_layers_follow_the_period():
    large = reader_preset("large", fido=True)
    assert large.cross_attention_layers == (5, 11, 17, 23)
    assert FID.cross_attention_layers == (0, 1, 2) and FID.kind == "fid" and FIDO.kind == "fido"


# Parameters in millions without embeddings, counted by hand from the layer sizes: per layer 4 d h (attention) and 3 d f (gated MLP).
@pytest.mark.parametrize(
    ("name", "fido", "encoder_millions", "decoder_millions"),
    [
        ("base", False, 85, 113),
        ("base", True, 85, 75),
        ("large", False, 308, 409),
        ("base-xl", True, 85, 997),
        ("large-xxl", True, 308, 3973),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, fido, encoder_millions, decoder_millions):
    shapes = expected_shapes(reader_preset(name, fido=fido))

    def millions(stack):
        return sum(a * b for n, (a, b) in ((n, s) for n, s in shapes.items() if len(s) == 2) if n.startswith(f"{stack}.")) / 1e6

    assert round(millions("encoder")) == encoder_millions
    assert round(millions("decoder")) == decoder_millions


def test_asymmetric_reader_has_an_embedding_for_each_side_and_no_bridge():
    shapes = expected_shapes(reader_preset("base-xl", fido=True))
    assert shapes["embedding.weight"] == (32128, 768) and shapes["decoder_embedding.weight"] == (32128, 2048)
    assert shapes["decoder.layers.5.cross_attention.k.weight"] == (64, 768)
    assert shapes["decoder.layers.5.cross_attention.q.weight"] == (2048, 2048)


def test_all_faults_of_a_configuration_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(
            FID,
            encoder=dataclasses.replace(FID.encoder, num_kv_heads=1),
            encoder_decoder_attention_period=9,
            eos_token_id=1000,
            passage_length=1,
        )
    for fault in (
        "encoder.num_kv_heads: wanted num_heads=3",
        "period: wanted 1 to decoder.num_layers=3, got 9",
        "eos_token_id",
        "passage_length",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "wanted a divisor of num_heads=4, got 3"),
        ({"d_ff": 0}, "decoder.d_ff: wanted a positive integer, got 0"),
    ],
)
def test_decoder_sizes_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FID, decoder=dataclasses.replace(FID.decoder, **change))


def test_unknown_and_missing_fields_are_named():
    fields = json.loads(FID.to_json())
    del fields["vocab_size"]
    with pytest.raises(ConfigError, match=r"unknown field 'beams'[\s\S]*missing field 'vocab_size'"):
        ReaderConfig.from_dict({**fields, "beams": 4})


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match="wanted one of small, base, large, xl, xxl, got 'huge'"):
        stack_preset("huge")
