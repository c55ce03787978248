"""Rendered configurations: parsed back by Triton's own protobuf, and those committed are those rendered."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.checkpoint.files import Checkpoint, load_reader
from export.errors import UsageError
from export.graphs.gpu import export_gpu_reader
from export.manifest_writer import engine_sizes
from export.repository import (
    HEADER,
    configs_of,
    encoder_config,
    native_encoder_config,
    reader_config,
    render_config,
    repository_from_engines,
    write_models,
)
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, ManifestError
from serving.contract.tensors import EngineSizes
from tests.conftest import FIDO, random_reader, wide

ROOT = Path(__file__).parents[2]


def parsed(text: str) -> dict:
    return json_format.MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True)


def test_a_reader_takes_and_answers_what_the_readme_documents():
    """Written out: whoever changes one of these breaks every client."""
    config = parsed(render_config(reader_config("fido", Limits(), stream=False)))
    inputs = {i["name"]: (i["data_type"], i["dims"], i.get("optional", False)) for i in config["input"]}
    assert inputs == {
        "question": ("TYPE_STRING", ["1"], False),
        "passages": ("TYPE_STRING", ["-1"], False),
        "titles": ("TYPE_STRING", ["-1"], True),
        "max_new_tokens": ("TYPE_INT32", ["1"], True),
        "min_new_tokens": ("TYPE_INT32", ["1"], True),
        "num_beams": ("TYPE_INT32", ["1"], True),
        "num_answers": ("TYPE_INT32", ["1"], True),
        "length_penalty": ("TYPE_FP32", ["1"], True),
        "allowed_answers": ("TYPE_STRING", ["-1"], True),
        "keep_encoder_tokens": ("TYPE_FP32", ["1"], True),
        "keep_passages": ("TYPE_INT32", ["1"], True),
        "drop_after": ("TYPE_INT32", ["1"], True),
    }
    assert {o["name"]: (o["data_type"], o["dims"]) for o in config["output"]} == {
        "answer": ("TYPE_STRING", ["1"]),
        "log_prob": ("TYPE_FP32", ["1"]),
        "tokens": ("TYPE_INT32", ["1"]),
        "passage_scores": ("TYPE_FP32", ["-1"]),
        "token_log_probs": ("TYPE_FP32", ["-1"]),
        "answers": ("TYPE_STRING", ["-1"]),
        "answer_log_probs": ("TYPE_FP32", ["-1"]),
    }
    assert "model_transaction_policy" not in config


def test_stream_configuration_differs_in_name_and_policy_only():
    unary, stream = (parsed(render_config(reader_config("fid", Limits(), stream=s))) for s in (False, True))
    assert stream.pop("model_transaction_policy") == {"decoupled": True}
    assert stream.pop("name") == "fid_stream" and unary.pop("name") == "fid"
    assert stream == unary


def test_largest_question_fits_in_one_encoder_batch(engines):
    sizes = Manifest.load(engines["fid"][1]).sizes
    config = parsed(render_config(encoder_config("fid", sizes, Limits(max_passages=77))))
    assert config["max_batch_size"] == 77 and "dynamic_batching" not in config
    config = parsed(render_config(encoder_config("fid", sizes, Limits(max_passages=77, encoder_batch=90))))
    assert config["max_batch_size"] == 90 and config["dynamic_batching"] == {}
    assert parsed(render_config(encoder_config("fid", sizes, Limits(), on_gpu=True)))["dynamic_batching"] == {}
    assert config["output"] == [{"name": "encoder_hidden_states", "data_type": "TYPE_FP32", "dims": ["-1", "12"]}]


def test_max_batch_size_is_written_even_when_zero():
    assert "\nmax_batch_size: 0\n" in render_config(reader_config("fid", Limits(), stream=False))


def test_limits_survive_the_configuration():
    limits = Limits(max_passages=7, slots=3, max_new_tokens=99)
    config = parsed(render_config(reader_config("fid", limits, stream=False)))
    assert Limits.from_parameters(config["parameters"]) == limits


def test_the_page_of_the_repository_shows_what_is_rendered(tmp_path):
    """After a change of tensors or limits: look at the difference, and bring model_repository/README.md up to date."""
    write_models(tmp_path, "fid", engine_sizes(load_reader(ROOT / "checkpoints/fid").config), Limits())
    page = (ROOT / "model_repository/README.md").read_text()
    for name in ("fid/1/model.py", "fid/config.pbtxt", "fid_encoder/config.pbtxt"):
        assert f"\n{(tmp_path / name).read_text()}```\n" in page, name


def test_damaged_engines_are_not_placed(engines, tmp_path):
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
        with pytest.raises(ManifestError, match="wanted the encoder as its GEMMs; export without --whole-encoder"):
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


@pytest.mark.parametrize("name", ["nq", "trivia-qa_2", "fid2"])
def test_a_reader_is_served_under_any_name(engines, name: str, tmp_path: Path) -> None:
    repository_from_engines(engines["fid"][1], tmp_path, name, Limits())
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}_encoder", f"{name}_stream"}
    for model, role in ((name, "reader"), (f"{name}_stream", "reader")):
        config = parsed((tmp_path / model / "config.pbtxt").read_text())
        assert config["name"] == model and config["parameters"][role]["string_value"] == name
    assert parsed((tmp_path / f"{name}_encoder" / "config.pbtxt").read_text())["name"] == f"{name}_encoder"


@pytest.mark.parametrize("name", ["", "a b", "../x", "nq_encoder", "nq_stream", "a.b"])
def test_a_name_that_triton_or_the_other_models_cannot_have_is_refused(engines, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reader name: wanted letters, digits"):
        repository_from_engines(engines["fid"][1], tmp_path / "repository", name, Limits())
    assert not (tmp_path / "repository").exists()


def files_of(model: Path) -> set[str]:
    return {path.name for path in (model / "1").iterdir()}


def test_only_what_belongs_to_the_engines_stays(engines, tmp_path: Path) -> None:
    repository_from_engines(engines["fid"][1], tmp_path, "fid", Limits())
    wanted = {name: files_of(tmp_path / name) for name in ("fid", "fid_encoder", "fid_stream")}
    assert wanted == {
        "fid": {"model.py", "manifest.json", "cross_kv.onnx", "decoder_step.onnx", "tokenizer.json"},
        "fid_encoder": {"model.py", "manifest.json", "encoder.onnx"},
        "fid_stream": {"model.py"},
    }
    for name in wanted:  # of a GPU's engines, of a copy that was interrupted, of a former release
        for stale in ("encoder_norms.npy", "decoder.qkv.plan", "model.plan", ".encoder.onnx.new", "cross_kv.onnx.data"):
            (tmp_path / name / "1" / stale).write_text("stale")
    for _ in range(2):
        repository_from_engines(engines["fid"][1], tmp_path, "fid", Limits())
        assert {name: files_of(tmp_path / name) for name in wanted} == wanted


def compiled(graphs: Path, directory: Path) -> Path:
    """The directory that TensorRT would write: the graphs' files in place of plans."""
    manifest = Manifest.load(graphs)
    directory.mkdir()
    files = {}
    for file, digest in manifest.files.items():
        files[file.replace(".onnx", ".plan")] = digest
        shutil.copyfile(graphs / file, directory / file.replace(".onnx", ".plan"))
    (directory / "manifest.json").write_text(dataclasses.replace(manifest, engine="tensorrt", files=files).to_json())
    return directory


def test_the_encoder_changes_between_python_and_tritons_own_backend(tmp_path: Path, tokenizer_json: str) -> None:
    checkpoint = Checkpoint(random_reader(wide(FIDO)), tokenizer_json, "test", "own")
    for kind in (True, False):
        export_gpu_reader(checkpoint, tmp_path / f"graphs_{kind}", whole_encoder=kind)
    whole, gemms = (compiled(tmp_path / f"graphs_{kind}", tmp_path / f"engines_{kind}") for kind in (True, False))
    encoder = tmp_path / "repository" / "fido_encoder"
    for _ in range(2):
        repository_from_engines(whole, tmp_path / "repository", "fido", Limits(), native_encoder=True)
        assert files_of(encoder) == {"model.plan", "manifest.json"} and 'backend: "tensorrt"' in (encoder / "config.pbtxt").read_text()
        repository_from_engines(gemms, tmp_path / "repository", "fido", Limits())
        assert {"model.py", "manifest.json", "encoder.qkv.plan"} <= files_of(encoder) and "model.plan" not in files_of(encoder)
        assert 'backend: "python"' in (encoder / "config.pbtxt").read_text()


class Crash(BaseException):
    """The process ends here."""


def loadable(repository: Path) -> tuple[str, ...]:
    """What the models would load: the weights and the slots of each; empty if one of them has no manifest.

    Raises ManifestError if a model has a manifest that its files do not match, as the model itself would.
    """
    if not all((repository / model / "1" / "manifest.json").is_file() for model in ("fid", "fid_encoder")):
        return ()
    found = set()
    for model, mine in (("fid", lambda file: not file.startswith("encoder")), ("fid_encoder", lambda file: file.startswith("encoder"))):
        manifest = Manifest.load(repository / model / "1")
        manifest.verify(repository / model / "1", tuple(file for file in manifest.files if mine(file)))
        found.add(manifest.weights_sha256)
    slots = {
        Limits.from_parameters(parsed((repository / m / "config.pbtxt").read_text())["parameters"]).slots for m in ("fid", "fid_stream")
    }
    return (*sorted(found), *map(str, sorted(slots)))


def test_a_crash_at_any_step_leaves_the_former_reader_or_the_new_one_or_none(engines, tmp_path: Path, monkeypatch) -> None:
    """Engines and limits both change. Every removal and every replacement of a file is the last one in turn."""
    former, new = engines["released_fid"][1], engines["fid"][1]
    whole = {}
    for name, directory, slots in (("former", former, 3), ("new", new, 5)):
        repository_from_engines(directory, tmp_path / name, "fid", Limits(slots=slots))
        whole[name] = loadable(tmp_path / name)
    assert len(whole["former"]) == len(whole["new"]) == 2 and whole["former"] != whole["new"]
    replace, unlink, seen = os.replace, os.unlink, []
    for last in range(1, 100):
        repository, count, crashed = tmp_path / f"crash{last}", 0, False
        repository_from_engines(former, repository, "fid", Limits(slots=3))

        def dying(call, last=last):
            def wrapped(*arguments, **options):
                nonlocal count, crashed
                result = call(*arguments, **options)
                count += 1
                if count == last:
                    crashed = True
                    raise Crash
                return result

            return wrapped

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying(replace))
            patched.setattr(os, "unlink", dying(unlink))
            try:
                repository_from_engines(new, repository, "fid", Limits(slots=5))
            except Crash:
                pass
        seen.append(loadable(repository))
        assert seen[-1] in ((), *whole.values()), last
        repository_from_engines(new, repository, "fid", Limits(slots=5))  # the next export repairs it
        assert loadable(repository) == whole["new"]
        if not crashed:
            break
    assert len(seen) > 10 and () in seen and seen[-1] == whole["new"]
    assert json.loads((repository / "fid" / "1" / "manifest.json").read_text())["reader"] == "fid"


# Engine directories: published whole, readable by others, and restored after a crash or a signal.


def test_processes_and_batches_follow_the_limits_and_the_machine(engines) -> None:
    sizes = Manifest.load(engines["fid"][1]).sizes
    limits = Limits(max_passages=40, encoder_batch=120, encoder_instances=2, reader_instances=3, intra_op_threads=5)
    for on_gpu, group, batch in ((False, ("KIND_CPU", 1, None), 120), (True, ("KIND_GPU", 2, [0]), 120)):
        encoder = parsed(render_config(encoder_config("fid", sizes, limits, on_gpu=on_gpu)))
        (instances,) = encoder["instance_group"]
        assert (instances["kind"], instances["count"], instances.get("gpus")) == group and encoder["max_batch_size"] == batch
        assert set(encoder["parameters"]) == {"intra_op_threads", *(("max_passages", "encoder_batch") if on_gpu else ())}
        assert encoder["parameters"]["intra_op_threads"] == {"string_value": "5"}
        for stream in (True, False):
            (instances,) = parsed(render_config(reader_config("fid", limits, stream=stream, on_gpu=on_gpu)))["instance_group"]
            assert (instances["kind"], instances["count"]) == (group[0], 3)
    (native,) = parsed(render_config(native_encoder_config("fid", sizes, limits)))["instance_group"]
    assert (native["kind"], native["count"]) == ("KIND_GPU", 1)


def test_a_reader_is_for_the_cpu_unless_a_gpu_is_asked_for(engines) -> None:
    sizes = Manifest.load(engines["fid"][1]).sizes
    for options, kind, backends in (
        ({}, "KIND_CPU", ["python"] * 3),
        ({"on_gpu": True}, "KIND_GPU", ["python"] * 3),
        ({"on_gpu": True, "native_encoder": True}, "KIND_GPU", ["tensorrt", "python", "python"]),
    ):
        configs = configs_of("fid", sizes, Limits(), **options)
        assert list(configs) == ["encoder", "reader", "stream"]
        assert [config["backend"] for config in configs.values()] == backends
        assert {group["kind"] for config in configs.values() for group in config["instance_group"]} == {kind}


def test_all_files_of_the_models_are_named_and_the_unchanged_ones_are_left_as_they_are(engines, tmp_path: Path) -> None:
    placed = repository_from_engines(engines["fid"][1], tmp_path, "fid", Limits())
    assert sorted(placed) == sorted(path for path in tmp_path.rglob("*") if path.is_file()) and len(placed) == len(set(placed))
    before = {path: path.stat().st_ino for path in placed}
    time.sleep(0.01)
    repository_from_engines(engines["fid"][1], tmp_path, "fid", Limits(slots=3))
    changed = {path.relative_to(tmp_path).as_posix() for path in placed if path.stat().st_ino != before[path]}
    assert changed == {"fid/config.pbtxt", "fid_stream/config.pbtxt"}
    assert (tmp_path / "fid" / "1" / "cross_kv.onnx").samefile(engines["fid"][1] / "cross_kv.onnx")  # a link takes no space


@pytest.mark.parametrize("error", [OSError(18, "Invalid cross-device link"), None], ids=["another file system", "a link"])
def test_engines_are_copied_where_they_cannot_be_linked_and_folders_are_left_alone(engines, error, tmp_path: Path, monkeypatch) -> None:
    def link(source: Path, target: Path) -> None:
        if error:
            raise error
        shutil.copyfile(source, target)

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "fid" / "1" / "__pycache__").mkdir(parents=True)
    for _ in range(2):
        repository_from_engines(engines["fid"][1], tmp_path, "fid", Limits())
        assert loadable(tmp_path) and (tmp_path / "fid" / "1" / "__pycache__").is_dir()
        assert not [path for path in tmp_path.rglob(".*")]
