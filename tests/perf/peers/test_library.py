"""The peers compute what our reader computes, on a CPU; in place of QuACK's kernels stands what they are documented to do."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from perf.peers import library, quack_layers
from perf.peers.decoder_step import StaticDecoder
from perf.peers.encoders import FP8, UnsupportedReaderError, activation_scales, by_linear, encoder_weights, layers_of, plain, quantize
from perf.peers.library import Decoding, Setting, answer, questions_per_s, relative_error, summary_of
from perf.peers.quack_layers import EDITS, LibraryMissingError, QuackEncoder, edited_package
from tests.conftest import FID, FIDO, GROUPED, RELEASED_FID, T5_V1_0, VOCAB_SIZE, random_reader

LENGTH = 9


def token_ids(passages: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, (passages, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_the_plain_encoder_is_our_reader_s():
    reader, ids = random_reader(FID), token_ids(5)
    wanted = reader.encoder(reader.embedding(ids), torch.ones_like(ids))
    encoder = plain(encoder_weights(reader, LENGTH))
    torch.testing.assert_close(encoder(ids), wanted)
    assert relative_error(encoder, wanted[:2], ids) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cross", ["products", "sdpa"])
@pytest.mark.parametrize("config", [FID, FIDO, GROUPED], ids=["fid", "fido", "grouped"])
def test_every_step_gives_the_logits_of_a_full_pass(config, cross):
    reader, batch, passages = random_reader(config), 3, 4
    ids = token_ids(batch * passages)
    hidden, mask = reader.encode(ids.view(batch, passages, LENGTH), torch.ones(batch, passages, LENGTH, dtype=torch.int64))
    decoder = StaticDecoder(reader, batch, passages * LENGTH, 6, cross)
    for _ in range(2):  # a second time, over buffers that are not empty
        decoder.read(hidden)
        so_far = torch.full((batch, 1), config.decoder_start_token_id)
        for step in range(6):
            wanted = reader.decode(so_far, hidden, mask)[:, -1]
            torch.testing.assert_close(decoder.logits(), wanted, atol=1e-4, rtol=1e-4)
            decoder.step()
            wanted[:, config.eos_token_id] = float("-inf")
            assert decoder.answers[step].tolist() == wanted.argmax(-1).tolist()
            so_far = torch.cat([so_far, decoder.answers[step][:, None]], 1)


@torch.no_grad()
@pytest.mark.parametrize("call", [12, 4])
def test_answers_are_our_reader_s(call):
    reader, setting = random_reader(FIDO), Setting(3, 4, LENGTH, 7, call, 1, "cpu")
    ids = token_ids(setting.all_passages)
    shaped = ids.view(3, 4, LENGTH)
    wanted = reader.generate(shaped, torch.ones_like(shaped), 7, min_new_tokens=8).tokens
    decoding = Decoding(reader, setting, "products", compiles=False)
    encoder = plain(encoder_weights(reader, LENGTH))
    assert answer(encoder, decoding, ids, setting).t().tolist() == wanted
    assert questions_per_s(lambda: answer(encoder, decoding, ids, setting), 3, 2)["min"] > 0


def test_readers_that_the_peers_have_no_code_for_are_refused():
    with pytest.raises(UnsupportedReaderError, match="gated-gelu, got relu"):
        encoder_weights(random_reader(T5_V1_0), LENGTH)
    with pytest.raises(UnsupportedReaderError, match="no bias on cross-attention"):
        StaticDecoder(random_reader(dataclasses.replace(RELEASED_FID, feed_forward_proj="gated-gelu")), 1, LENGTH, 2)


def fake_quack() -> types.SimpleNamespace:
    """What QuACK's documentation says of the calls that are made, in plain PyTorch."""

    def gemm_norm_act(a: Tensor, b: Tensor, rstd: Tensor, postact_out: Tensor, activation: str | None = None) -> None:
        made = (a @ b) * rstd[:, None]
        if activation == "geglu":
            made = functional.gelu(made[:, ::2], approximate="tanh") * made[:, 1::2]
        postact_out.copy_(made)

    def norm_act_call(a, b, preact, out, c, rstd, *, activation, dynamic_scheduler, tuned, alpha) -> None:
        assert a.dtype == b.dtype == FP8 and preact is None and c is None
        gemm_norm_act(a.float() * alpha, b.float(), rstd, out, activation)

    def rms_call(a, b, out, c, norm_weight, premult_out, *, dynamic_scheduler, tuned, alpha=1.0) -> Tensor:
        made = a.float() @ b.float() * alpha + c
        out.copy_(made if norm_weight is None else made * norm_weight)
        if premult_out is not None:
            premult_out.copy_(made)
        return torch.stack([made[:, :5].square().sum(-1), made[:, 5:].square().sum(-1)], -1)

    return types.SimpleNamespace(gemm_norm_act=gemm_norm_act, _gemm_norm_act_call=norm_act_call, _gemm_rms_call=rms_call)


@pytest.fixture
def quack_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_products(weights):
        return lambda query, key, value: torch.softmax(query @ key.transpose(-1, -2) + weights.bias, -1) @ value

    monkeypatch.setattr(quack_layers, "import_quack", fake_quack)
    monkeypatch.setattr(quack_layers, "by_cudnn", by_products)
    monkeypatch.setattr(torch, "compile", lambda work, **_: work)


@torch.no_grad()
def test_the_encoder_from_library_kernels_is_the_plain_one(quack_on_cpu):
    weights, ids = encoder_weights(random_reader(FID), LENGTH), token_ids(5)
    torch.testing.assert_close(QuackEncoder(weights, 5)(ids), plain(weights)(ids))


@torch.no_grad()
def test_fp8_is_near_the_plain_one(quack_on_cpu):
    weights, ids = encoder_weights(random_reader(FID), LENGTH), token_ids(5)
    scales = activation_scales(weights, ids)
    assert [sorted(layer) for layer in scales] == [["o", "qkv", "wi", "wo"]] * 2
    wanted = plain(weights)(ids)
    assert relative_error(quack_layers.library_fp8_encoder(weights, scales, 5), wanted, ids) < 0.1

    def rounded(x: Tensor, i: int, product: str) -> Tensor:
        weight = quantize(getattr(weights.layers[i], product))
        return functional.linear((x / scales[i][product]).to(FP8).float(), weight.values.float()) * weight.scale * scales[i][product]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.transpose(-1, -2) + weights.bias, -1) @ value

    assert 1e-3 < relative_error(layers_of(weights, rounded, attend), wanted, ids) < 0.1
    assert relative_error(layers_of(weights, by_linear(weights), attend), wanted, ids) < 1e-5


def test_quack_is_edited_in_a_copy_and_only_where_it_is_known(tmp_path: Path):
    package = tmp_path / "quack"
    for file, old, _ in EDITS:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(f"before {old} after")
    edited_package(package, tmp_path / "copy")
    for file, old, new in EDITS:
        assert (package / file).read_text() == f"before {old} after"
        assert (tmp_path / "copy" / file).read_text() == f"before {new} after"
    (package / EDITS[0][0]).write_text("another version")
    with pytest.raises(LibraryMissingError, match="found it 0 times; pip install"):
        edited_package(package, tmp_path / "other")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LibraryMissingError, match="quack-kernels"):
        quack_layers.import_quack()


def test_the_summary_holds_the_best_of_each_kind():
    row = {"all_ms": {"median": 80.0}, "one_question_ms": {"median": 3.5}, "questions_per_s": {"fid": {"median": 100.0}}}
    other = {**row, "all_ms": {"median": 83.0}, "questions_per_s": {"fid": {"median": 101.0}}}
    result = {
        "decoders": {"fid": {"step_ms": {"median": 4.0}}, "fido": {"error": "no"}},
        "ways": {"library_bf16": row, "library_fp16": other, "library_fp8": {"all_ms": {"median": 60.0}}, "hand_bf16": {"error": "no"}},
    }
    assert summary_of(result) == {
        "library_pytorch_encoder_ms": 80.0,
        "library_pytorch_encoder_one_question_ms": 3.5,
        "library_pytorch_fid_questions_per_s": 101.0,
        "library_pytorch_encoder_fp8_ms": 60.0,
        "compiled_pytorch_fid_step_ms": 4.0,
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_run_measures_every_row_and_keeps_what_failed(quack_on_cpu, monkeypatch: pytest.MonkeyPatch):
    def milliseconds(work):
        work()
        return 2.0

    monkeypatch.setattr(library, "gpu_ms", milliseconds)
    configs, setting = {"fid": FID, "fido": dataclasses.replace(FIDO, feed_forward_proj="relu")}, Setting(3, 4, LENGTH, 5, 6, 2, "cpu")
    result = library.measure(configs.__getitem__, ["hand_bf16", "library_fp16", "hand_fp8"], ["fid", "fido"], setting, True)
    assert set(result["decoders"]["fid"]["by_cross_attention"]) == {"products", "sdpa", "flex"}
    assert "UnsupportedReaderError" in result["decoders"]["fido"]["error"]
    for way in ("hand_bf16", "library_fp16"):
        row = result["ways"][way]
        assert row["all_ms"]["median"] == 4.0 and row["one_question_ms"]["median"] == 2.0  # two calls for all, one for a question
        assert row["relative_error"] < 0.05 and row["questions_per_s"]["fid"]["min"] > 0
    assert "error" in result["ways"]["hand_fp8"] or result["ways"]["hand_fp8"]["relative_error"] < 0.2  # not every CPU multiplies these
    summary = summary_of(result)
    assert summary["hand_pytorch_encoder_ms"] == summary["library_pytorch_encoder_ms"] == 4.0
    assert summary["compiled_pytorch_fid_step_ms"] == 0.4


def test_it_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        library.main([])
    assert "finds no GPU" in capsys.readouterr().err
