"""int8: layers that it would spoil stay out, the files are a quarter as large, and the reader still answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export.build import build_reader
from export.errors import ExportError, UsageError
from export.graphs import int8
from export.library.options import AUTO, LibraryOptions
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, ManifestError
from serving.engines.load import load_decoder, load_encoder
from serving.pipeline.in_process import InProcessReader
from tests.conftest import WITHOUT_OPENVINO

ROOT = Path(__file__).parents[3]
QUESTIONS = ROOT / "examples" / "demo_questions.jsonl"
WITHOUT_NNCF = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="nncf: `make setup FOR=openvino`")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Manifest]]:
    """The demo's FiD reader in fp32 and in int8."""
    pytest.importorskip("nncf", reason="nncf: `make setup FOR=openvino`")
    folder, checkpoint = tmp_path_factory.mktemp("engines"), str(ROOT / "checkpoints" / "fid")
    fp32 = build_reader(checkpoint, folder / "fp32", "openvino", Limits())
    made = build_reader(
        checkpoint, folder / "int8", "openvino", Limits(), precision="int8", library=LibraryOptions(AUTO, samples=QUESTIONS)
    )
    return {"fp32": (folder / "fp32", fp32), "int8": (folder / "int8", made)}


def test_an_int8_reader_is_a_quarter_as_large_and_answers_the_demos_questions(exported):
    (plain, _), (small, made) = exported["fp32"], exported["int8"]
    assert made.engine == "openvino" and made.precision in ("int8", "int8-bf16") and Manifest.load(small) == made
    weights = [sum((folder / f).stat().st_size for f in m.files if f != "tokenizer.json") for folder, m in exported.values()]
    assert weights[1] < 0.29 * weights[0], "a quarter, and the text of the graphs"
    done = made.provenance["int8"]
    assert done["samples"] == QUESTIONS.name and done["passages"] == 9 and 0 < done["hidden_states_error"] < 0.05 and not done["left_out"]
    examples = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    with InProcessReader(plain) as wanted, InProcessReader(small) as got:
        for example in examples:
            question = (example["question"], [c["text"] for c in example["ctxs"]], [c["title"] for c in example["ctxs"]])
            first, second = wanted.answer(*question), got.answer(*question)
            assert first.text == second.text and first.log_probs != second.log_probs


def test_an_int8_reader_of_onnxruntime_needs_neither_openvino_nor_samples(monkeypatch, tmp_path):
    packages = SimpleNamespace(find_spec=lambda name: None if name == "openvino" else importlib.util.find_spec(name))
    monkeypatch.setattr("export.build.importlib", SimpleNamespace(util=packages))
    monkeypatch.setattr("export.tensorrt.detect.default_backend", lambda: "onnxruntime")
    checkpoint = str(ROOT / "checkpoints" / "fido")
    plain = build_reader(checkpoint, tmp_path / "fp32", "onnxruntime", Limits())
    made = build_reader(checkpoint, tmp_path / "int8", "auto", Limits(), precision="int8")
    assert (made.engine, made.precision) == ("onnxruntime", "int8") and Manifest.load(tmp_path / "int8") == made
    for name in ("encoder", "decoder_step"):
        sizes = [(tmp_path / kind / f"{name}.onnx").stat().st_size for kind in ("fp32", "int8")]
        assert sizes[1] < 0.29 * sizes[0], name
    ids = np.random.default_rng(0).integers(5, 900, (4, 60)).astype(np.int32)
    folders = ((tmp_path / "fp32", plain), (tmp_path / "int8", made))
    exact, rounded = (load_encoder(*folder, Limits()).encode([(ids, np.ones_like(ids))])[0] for folder in folders)
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.05
    examples = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    with InProcessReader(tmp_path / "fp32") as wanted, InProcessReader(tmp_path / "int8") as got:
        for example in examples:
            question = (example["question"], [c["text"] for c in example["ctxs"]], [c["title"] for c in example["ctxs"]])
            first, second = wanted.answer(*question), got.answer(*question)
            assert first.text == second.text and first.log_probs != second.log_probs


def test_a_row_of_an_int8_step_does_not_depend_on_the_other_rows(tmp_path):
    made = build_reader(str(ROOT / "checkpoints" / "fido"), tmp_path / "int8", "onnxruntime", Limits(), precision="int8")
    rng = np.random.default_rng(1)
    hidden = [rng.standard_normal((30, made.sizes.d_model_encoder)).astype(np.float32) * scale for scale in (0.1, 5.0)]

    def log_probs(rows: list[int]) -> np.ndarray:
        decoder, count = load_decoder(tmp_path / "int8", made, Limits(slots=2)), len(rows)
        for slot, row in enumerate(rows):
            decoder.admit(slot, slot, hidden[row], np.arange(30, dtype=np.int32))
        token, no_penalty = np.full(count, 7, np.int32), np.zeros(count, np.float32)
        return np.array([decoder.step(token, np.full(count, at, np.int32), no_penalty)[1] for at in range(3)])

    np.testing.assert_allclose(log_probs([0, 1])[:, 0], log_probs([0])[:, 0], rtol=1e-4, atol=1e-4)


def test_the_weights_beside_an_int8_graph_are_checked(exported):
    directory, manifest = exported["int8"]
    weights = directory / "encoder.bin"
    content = weights.read_bytes()
    try:
        weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(ManifestError, match=r"encoder\.bin: SHA-256 wanted"):
            load_encoder(directory, manifest, Limits())
    finally:
        weights.write_bytes(content)


@WITHOUT_OPENVINO
def test_a_layer_whose_input_has_outliers_is_found_and_says_why():
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    x = ops.parameter([-1, 16], np.float32, name="x")
    scaled = ops.multiply(x, ops.constant(np.r_[1000.0, np.ones(15)].astype(np.float32)))  # one channel, as T5's feed-forward layers have
    weights = rng.standard_normal((16, 8)).astype(np.float32)
    weights[0] = 0  # what the large channel hides is all that counts
    good, bad = (ops.matmul(i, ops.constant(weights.T), False, True, name=n) for i, n in ((x, "good"), (scaled, "bad")))
    also = ops.matmul(x, ops.constant(weights.T), False, True, name="also")  # reads the tensor that `good` reads
    errors = {
        e.name: e for e in int8.layer_errors(ov.Model([good, bad, also], [x]), [{"x": rng.standard_normal((64, 16)).astype(np.float32)}])
    }
    assert {*errors} == {"good", "bad", "also"} and errors["also"].error == errors["good"].error
    assert errors["good"].error < 0.02 < int8.LARGEST_ERROR < errors["bad"].error
    assert str(errors["bad"]).startswith(f"int8 would change its output by {errors['bad'].error:.0%}")


@WITHOUT_NNCF
@WITHOUT_OPENVINO
def test_a_layer_left_out_is_recorded_and_stays_in_fp32(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "LARGEST_ERROR", 0.05)
    options = LibraryOptions(AUTO, samples=QUESTIONS)
    made = build_reader(str(ROOT / "checkpoints" / "fid"), tmp_path / "made", "openvino", Limits(), precision="int8", library=options)
    left_out = made.provenance["int8"]["left_out"]
    assert left_out and all(name.startswith("encoder: ") and "int8 would change its output by" in why for name, why in left_out.items())
    sizes = [(folder / "encoder.bin").stat().st_size for folder in (exported["int8"][0], tmp_path / "made")]
    assert sizes[1] > sizes[0] + len(left_out) * 192 * 192


def test_what_int8_needs_is_asked_for_before_anything_is_exported(monkeypatch, tmp_path):
    for module in ("export.graphs.openvino", "export.graphs.int8"):
        monkeypatch.setattr(f"{module}.importlib.util.find_spec", lambda name: object())

    def build(samples: Path | None) -> None:
        build_reader("./nowhere", tmp_path / "e", "openvino", Limits(), precision="int8", library=LibraryOptions(AUTO, samples=samples))

    with pytest.raises(UsageError, match=r"precision int8: wanted questions and passages to calibrate on .*, got none; pass SAMPLES=file"):
        build(None)
    with pytest.raises(UsageError, match=r"got \S+missing\.jsonl"):
        build(tmp_path / "missing.jsonl")
    monkeypatch.setattr("export.graphs.int8.importlib.util.find_spec", lambda name: object() if name != "nncf" else None)
    with pytest.raises(UsageError, match=r"wanted the package nncf, .*`make setup FOR=openvino`"):
        build(QUESTIONS)


@pytest.mark.parametrize(
    ("text", "message"), [("", "with passages to calibrate on, got none"), ('{"question": "q"}\n', 'got \'{"question"')]
)
def test_samples_of_another_form_are_refused(engines, tmp_path, text, message):
    _, directory = engines["fid"]
    (tmp_path / "samples").write_text(text)
    with pytest.raises(ExportError, match=message):
        int8.sample_rows(directory, Manifest.load(directory), tmp_path / "samples")


def test_samples_are_tokenized_as_prompts_are(engines, tmp_path):
    _, directory = engines["fid"]
    manifest = Manifest.load(directory)
    example = {"question": "w1 w2", "ctxs": [{"title": "w3", "text": "w4"}, {"text": " ".join(["w5"] * 99)}]}
    (tmp_path / "samples").write_text(json.dumps(example) + "\n")
    short, long = int8.sample_rows(directory, manifest, tmp_path / "samples")
    assert short.dtype == np.int32 and short.shape[1] < long.shape[1] == manifest.prompt.passage_length
    assert short[0, -1] == long[0, -1] == manifest.eos_token_id
