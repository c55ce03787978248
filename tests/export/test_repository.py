"""Rendered configurations: parsed back by Triton's own protobuf, and those committed are those rendered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.checkpoint.files import Checkpoint, load_reader
from export.graphs.cpu import engine_sizes
from export.graphs.gpu import export_gpu_reader
from export.repository import (
    HEADER,
    READERS,
    encoder_config,
    native_encoder_config,
    reader_config,
    render_config,
    repository_from_engines,
    write_models,
)
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, ManifestError
from serving.contract.tensors import READER_TENSORS, EngineSizes
from tests.conftest import FIDO, random_reader, wide

ROOT = Path(__file__).parents[2]


def parsed(text: str) -> dict:
    return json_format.MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True)


def test_reader_configuration_has_the_tensors_of_the_contract():
    config = parsed(render_config(reader_config("fido", Limits(), stream=False)))
    assert [i["name"] for i in config["input"]] == [spec.name for spec in READER_TENSORS.inputs]
    assert [i["name"] for i in config["input"] if i.get("optional")] == ["titles", "max_new_tokens", "min_new_tokens"]
    assert [o["name"] for o in config["output"]] == ["answer", "log_prob", "tokens", "passage_scores", "token_log_probs"]
    assert "model_transaction_policy" not in config


def test_stream_configuration_differs_in_name_and_policy_only():
    unary, stream = (parsed(render_config(reader_config("fid", Limits(), stream=s))) for s in (False, True))
    assert stream.pop("model_transaction_policy") == {"decoupled": True}
    assert stream.pop("name") == "fid_stream" and unary.pop("name") == "fid"
    assert stream == unary


def test_largest_question_fits_in_one_encoder_batch(engines):
    sizes = Manifest.load(engines["fid"][1]).sizes
    config = parsed(render_config(encoder_config("fid", sizes, Limits(max_passages=77))))
    assert config["max_batch_size"] == 77 and config["dynamic_batching"] == {}
    assert config["output"] == [{"name": "encoder_hidden_states", "data_type": "TYPE_FP32", "dims": ["-1", "12"]}]


def test_max_batch_size_is_written_even_when_zero():
    assert "\nmax_batch_size: 0\n" in render_config(reader_config("fid", Limits(), stream=False))


def test_limits_survive_the_configuration():
    limits = Limits(max_passages=7, slots=3, max_new_tokens=99)
    config = parsed(render_config(reader_config("fid", limits, stream=False)))
    assert Limits.from_parameters(config["parameters"]) == limits


@pytest.mark.parametrize("reader", READERS)
def test_committed_configurations_are_those_rendered(reader, tmp_path):
    """After a change of tensors or limits: `make export`, look at the diff, commit it."""
    sizes = engine_sizes(load_reader(ROOT / "checkpoints" / reader).config)
    write_models(tmp_path, reader, sizes, Limits())
    for path in sorted(tmp_path.glob("*/**/*")):
        if path.is_file():
            assert (ROOT / "model_repository" / path.relative_to(tmp_path)).read_text() == path.read_text(), path.name


def test_damaged_engines_are_not_placed(engines, tmp_path):
    import shutil

    shutil.copytree(engines["fid"][1], tmp_path / "engines")
    (tmp_path / "engines" / "encoder.onnx").write_bytes(b"x")
    (tmp_path / "engines" / "tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"encoder.onnx: SHA-256 wanted[\s\S]*tokenizer.json: missing"):
        repository_from_engines(tmp_path / "engines", tmp_path / "repository", "fid", Limits())
    assert not (tmp_path / "repository").exists()


def test_the_encoder_for_nvidias_container_is_a_native_tensorrt_model() -> None:
    """Parsed by Triton's own protobuf; the text is what was reviewed."""
    sizes = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)
    text = render_config(native_encoder_config("fido", sizes, Limits(encoder_batch=120)))
    assert text_format.Parse(text, ModelConfig()).instance_group[0].profile == ["0"]
    assert text.removeprefix(HEADER) == (
        'name: "fido_encoder"\nmax_batch_size: 120\n'
        'input {\n  name: "input_ids"\n  data_type: TYPE_INT32\n  dims: -1\n}\n'
        'input {\n  name: "attention_mask"\n  data_type: TYPE_INT32\n  dims: -1\n}\n'
        'output {\n  name: "encoder_hidden_states"\n  data_type: TYPE_FP16\n  dims: -1\n  dims: 768\n}\n'
        'instance_group {\n  count: 1\n  gpus: 0\n  kind: KIND_GPU\n  profile: "0"\n}\n'
        'default_model_filename: "model.plan"\n'
        "dynamic_batching {\n  max_queue_delay_microseconds: 1000\n}\n"
        'backend: "tensorrt"\n'
    )


def test_gpu_models_are_placed_on_the_gpu_and_take_half_precision() -> None:
    sizes = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)
    limits = Limits(max_passages=40, encoder_batch=120)
    encoder = json_format.ParseDict(encoder_config("fid", sizes, limits, on_gpu=True), ModelConfig())
    assert encoder.instance_group[0].kind == ModelConfig().instance_group.add().KIND_GPU and encoder.max_batch_size == 120
    assert encoder.output[0].data_type == 10  # TYPE_FP16
    reader = json_format.ParseDict(reader_config("fid", limits, stream=True, on_gpu=True), ModelConfig())
    assert list(reader.instance_group[0].gpus) == [0] and reader.model_transaction_policy.decoupled


def test_a_native_encoder_wants_tensorrt_engines(engines, tmp_path: Path):
    with pytest.raises(ManifestError, match="wanted TensorRT engines for Triton's tensorrt backend, got onnxruntime"):
        repository_from_engines(engines["fid"][1], tmp_path / "repository", "fid", Limits(), native_encoder=True)
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_the_encoder_must_be_what_its_backend_runs(whole: bool, tmp_path: Path, tokenizer_json: str) -> None:
    """A whole one for Triton's own backend, gemms for ours: the other is refused, and so are files of a build that never ran."""
    checkpoint = Checkpoint(random_reader(wide(FIDO)), tokenizer_json, "test", "own")
    graphs = tmp_path / "graphs"
    manifest = export_gpu_reader(checkpoint, graphs, whole_encoder=whole)
    if whole:
        with pytest.raises(ManifestError, match="wanted the encoder as its gemms; export without --whole-encoder"):
            repository_from_engines(graphs, tmp_path / "repository", "fido", Limits())
        return
    (graphs / "manifest.json").write_text(dataclasses.replace(manifest, engine="tensorrt").to_json())
    with pytest.raises(ManifestError, match="wanted the encoder as one graph; export with --whole-encoder"):
        repository_from_engines(graphs, tmp_path / "repository", "fido", Limits(), native_encoder=True)
    (graphs / "manifest.json").write_text(manifest.to_json())
    repository_from_engines(graphs, tmp_path / "repository", "fido", Limits())
    placed = {path.name for path in (tmp_path / "repository" / "fido_encoder" / "1").iterdir()}
    assert placed >= {"encoder.qkv.onnx", "encoder.01.wo.npy", "encoder_embedding.npy", "encoder_norms.npy", "encoder_bias.npy"}
    placed = {path.name for path in (tmp_path / "repository" / "fido" / "1").iterdir()}
    assert placed >= {"decoder.cross_q.onnx", "decoder_head.npy", "decoder_norms.npy", "decoder_bias.npy"} and not [
        name for name in placed if name.startswith("encoder")
    ]
