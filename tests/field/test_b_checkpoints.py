"""Section B of the field's faults, rows B1 to B6: tokenizers, numbers and settings of checkpoints as people have them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from export.checkpoint.files import load_checkpoint
from export.checkpoint.weights import CheckpointError
from export.compare import transformers_model
from serving.pipeline.prompt import PromptEncoder
from tests.conftest import VOCAB_SIZE
from tests.field.tiny_t5 import assert_as_transformers, edit, t5, weights_of, write_weights

pytest_plugins = ("tests.field.tiny_t5",)


# --- B1


def words() -> Iterable[str]:
    """Text enough for a vocabulary of 1,000 pieces, the same every time."""
    for number in range(4000):
        yield " ".join(f"{a}{b}" for a in ("ba", "do", "ki", "lu", "ter", "mon") for b in ("n", "rak", "s", str(number % 97)))
        yield f"the Year {number} was (at its best) a year of {number * 7919 % 10007} questions, and of answers: café, naïve, 1½!"


def words_sample() -> list[str]:
    return [text for text, _ in zip(words(), range(200), strict=False)]


def trained(**settings: Any) -> bytes:
    content = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words()), model_writer=content, vocab_size=1000, hard_vocab_limit=False, minloglevel=2, **{**ids, **settings}
    )
    return content.getvalue()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return trained()


TEXTS = [
    "the Year 1999 was a year of questions",
    "  two  spaces,\ta tab\nand\r\nlines  ",
    "",
    "   ",
    "ﷺ ① ½ Ⅻ ﬁ ＡＢＣ",  # noqa: RUF001
    "Việt Nam Vie\u0323\u0302t cafe\u0301 nai\u0308ve",
    "☃☄ snow ☃ ☃ 한국어 \u1112\u1161\u11ab हिन्दी ไทย 👩‍👩‍👧",
    "x▁y ▁z▁",
    "zero\u200bwidth \ufeffbom \u3000wide\u00a0space \x7f \x01",
    "a" * 300 + " " + "☃" * 50,
]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False},
        {"byte_fallback": True},
        {"user_defined_symbols": ["<sep>", "ter"]},
    ],
    ids=str,
)
def test_b1_spiece_model_alone(settings: dict[str, Any], checkpoint: Path, spiece: bytes):
    """A tokenizer as spiece.model alone has SentencePiece's own ids, for any text and any of the trainer's settings that T5s have."""
    content = trained(**settings) if settings else spiece
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    edit(checkpoint / "config.json", vocab_size=len(pieces) + 100)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "spiece.model").write_bytes(content)
    weights = weights_of(checkpoint)
    resized = [name for name, tensor in weights.items() if tensor.shape[0] == VOCAB_SIZE]
    write_weights(checkpoint, {**weights, **{name: torch.randn(len(pieces) + 100, 12) for name in resized}})
    tokenizer = Tokenizer.from_str(load_checkpoint(checkpoint).tokenizer_json)
    for text in [*TEXTS, *words_sample()]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text), text
    known = [text for text in words_sample() if pieces.unk_id() not in pieces.encode(text)]
    assert known and all(tokenizer.decode(pieces.encode(text)) == pieces.decode(pieces.encode(text)) for text in known)
    sentinels = tokenizer.encode("<extra_id_0> the Year <extra_id_99>", add_special_tokens=False).ids
    assert (sentinels[0], sentinels[-1]) == (len(pieces) + 99, len(pieces))
    assert tokenizer.token_to_id("<extra_id_41>") == len(pieces) + 58


def test_b1_fields_of_fixed_width_are_passed_over(tmp_path: Path, spiece: bytes):
    """Newer trainers may write fields of any kind; a file with such fields is the same model."""
    from export.checkpoint.tokenizer import read_tokenizer

    file = tmp_path / "spiece.model"
    file.write_bytes(spiece)
    plain = read_tokenizer(file)
    more = b"\xc1\x3e" + bytes(range(8)) + b"\xc5\x3e" + bytes(range(4))  # field 1000, of 8 bytes and of 4
    file.write_bytes(more + spiece + more)
    assert read_tokenizer(file) == plain
    file.write_bytes(spiece + more[:5])
    with pytest.raises(CheckpointError, match="field 1000 ends after the file"):
        read_tokenizer(file)


def test_b1_needs_no_sentencepiece_and_no_protobuf(tmp_path: Path, spiece: bytes):
    """What broke was generated code of sentencepiece that wants another protobuf: neither is imported."""
    (tmp_path / "spiece.model").write_bytes(spiece)
    code = (
        "import sys; sys.modules.update({'sentencepiece': None, 'google.protobuf': None, 'transformers': None});"
        "from pathlib import Path; from export.checkpoint.tokenizer import read_tokenizer;"
        f"print(len(read_tokenizer(Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 10_000, done.stderr


def test_b1_an_embedding_without_rows_for_sentinels_gets_none(tmp_path: Path, spiece: bytes):
    from export.checkpoint.tokenizer import read_tokenizer

    (tmp_path / "other.name").write_bytes(spiece)
    number = len(sentencepiece.SentencePieceProcessor(model_proto=spiece))
    for vocab_size, size in ((number, number), (number + 128, number + 100)):
        assert Tokenizer.from_str(read_tokenizer(tmp_path / "other.name", vocab_size)).get_vocab_size() == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"not a model", "spiece.model: wanted a SentencePiece model"),
        (lambda: trained()[:5000], "spiece.model: wanted a SentencePiece model"),
        (lambda: trained(model_type="bpe"), "model_type: wanted unigram, as T5 has, got BPE"),
        (lambda: trained(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix is not supported"),
    ],
)
def test_b1_other_models_are_refused(content: Callable[[], bytes], message: str, checkpoint: Path, refused: Callable[..., str]):
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "spiece.model").write_bytes(content())
    assert message in refused(checkpoint)


# --- B2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["shared.weight", "decoder.block.1.layer.1.EncDecAttention.k.weight", "encoder.final_layer_norm.weight"])
def test_b2_nan_in_a_weight(name: str, value: float, checkpoint: Path, refused: Callable[..., str]):
    """A weight that is not finite is refused by its name in the file."""
    weights = weights_of(checkpoint)
    weights[name].view(-1)[3] = value
    write_weights(checkpoint, weights)
    assert f"wanted finite weights, got NaN or infinity in {name}" in refused(checkpoint)


# --- B3


def test_b3_the_main_file_is_transformers_choice(checkpoint: Path):
    """model.safetensors, its index, pytorch_model.bin, its index; a variant beside them is never read."""
    right = weights_of(checkpoint)
    wrong = {name: tensor + 1 for name, tensor in right.items()}
    for variant in ("pytorch_model.fp16.bin", "pytorch_model.z.bin", "pytorch_model.bin"):
        torch.save(wrong, checkpoint / variant)
    for variant in ("model.fp16.safetensors", "optimizer.safetensors", "model.z.safetensors"):
        save_file(wrong, str(checkpoint / variant), {"format": "pt"})
    assert_as_transformers(checkpoint)
    assert torch.equal(load_checkpoint(checkpoint).reader.embedding.weight, right["shared.weight"])
    # shards, and then a pickle
    names = sorted(right)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, kept in shards.items():
        save_file({name: right[name] for name in kept}, str(checkpoint / file), {"format": "pt"})
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, kept in shards.items() for name in kept}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_as_transformers(checkpoint)
    assert torch.equal(load_checkpoint(checkpoint).reader.embedding.weight, right["shared.weight"])
    (checkpoint / "model.safetensors.index.json").unlink()
    torch.save(right, checkpoint / "pytorch_model.bin")
    assert torch.equal(load_checkpoint(checkpoint).reader.embedding.weight, right["shared.weight"])


def test_b3_variants_alone_are_named_and_not_read(checkpoint: Path, refused: Callable[..., str]):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.fp16.safetensors")
    line = refused(checkpoint)
    assert "no weights; wanted model.safetensors, pytorch_model.bin" in line and "found model.fp16.safetensors" in line


# --- B4


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward_proj": "relu"},
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "relu", "dense_act_fn": "gelu_new", "is_gated_act": True},
        {"feed_forward_proj": "gated-silu", "dense_act_fn": "gelu_pytorch_tanh"},
        {"layer_norm_epsilon": 0.3},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "scale_decoder_outputs": True},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},
        {"d_kv": 3},
        {"num_decoder_layers": None},
        {"dtype": "bfloat16"},
        {"dropout_rate": 0.9, "initializer_factor": 5.0, "use_cache": False, "is_decoder": True},
    ],
    ids=str,
)
def test_b4_what_changes_numbers_is_honoured(changes: dict[str, Any], tmp_path: Path, tokenizer_json: str):
    """Every field of T5Config that the graphs can compute means what it means in transformers."""
    model = t5(**changes)
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    assert_as_transformers(tmp_path)


def test_b4_aliases_are_transformers(checkpoint: Path):
    fields = json.loads((checkpoint / "config.json").read_text())
    fields["hidden_size"], fields["head_dim"], fields["num_attention_heads"] = (
        fields.pop("d_model"),
        fields.pop("d_kv"),
        fields.pop("num_heads"),
    )
    (checkpoint / "config.json").write_text(json.dumps(fields))
    assert_as_transformers(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "relu", "dense_act_fn": "silu", "is_gated_act": False}, "got silu, false (feed_forward_proj relu)"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "got gelu, true"),
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, "got silu, true"),
        ({"is_gated_act": False}, "got gelu_new, false"),
        ({"feed_forward_proj": "swish-glu"}, "config.json: transformers' T5Config refuses it"),
        ({"dense_act_fn": None}, "got None, true"),
        ({"d_model": "12"}, "'d_model' expected int, got str"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: wanted a positive number, got nan"),
        ({"relative_attention_num_buckets": 6}, "relative_attention_num_buckets: wanted a multiple of 4, got 6"),
        ({"scale_decoder_outputs": "no"}, "scale_decoder_outputs: wanted true or false, got 'no'"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder: wanted False or none, got True"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder: wanted True or none, got False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"num_heads": 0}, "num_heads: wanted a positive integer, got 0"),
        ({"model_type": "umt5"}, "model_type: wanted t5 or fid-reader, got 'umt5'"),
    ],
    ids=str,
)
def test_b4_what_the_graphs_lack_is_refused(changes: dict[str, Any], message: str, checkpoint: Path, refused: Callable[..., str]):
    """Every other field that changes numbers is refused by its name."""
    edit(checkpoint / "config.json", **changes)
    assert message in refused(checkpoint)


# --- B5, B6


def test_b5_generation_config_is_obeyed_and_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    """Other start and end tokens in generation_config.json are used, as by generate(), and a warning names both values."""
    edit(checkpoint / "generation_config.json", eos_token_id=7, decoder_start_token_id=[5], num_beams=4)
    loaded = load_checkpoint(checkpoint)
    config, stderr = loaded.reader.config, capsys.readouterr().err
    assert (config.eos_token_id, config.decoder_start_token_id, config.pad_token_id) == (7, 5, 0)
    assert "eos_token_id: generation_config.json's [7] is used, config.json has [1]" in stderr
    assert "decoder_start_token_id: generation_config.json's [5] is used, config.json has [0]" in stderr
    assert re.search(r"generation_config\.json: num_beams=4: not applied, because readers decode greedily", stderr)
    generated = (
        transformers_model(loaded)[0].generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, num_beams=1, use_cache=False)[0].tolist()
    )
    ours = loaded.reader.generate(torch.tensor([[[5, 6, 7]]]), torch.ones(1, 1, 3, dtype=torch.int64), 6).tokens[0]
    assert generated == [5, *ours]


@pytest.mark.parametrize(
    ("setting", "neutral", "other"),
    [
        ("guidance_scale", [None, 1, 1.0], 2),
        ("repetition_penalty", [None, 1, 1.0], 1.2),
        ("encoder_repetition_penalty", [None, 1.0], 2),
        ("no_repeat_ngram_size", [None, 0], 3),
        ("encoder_no_repeat_ngram_size", [None, 0], 1),
        ("min_length", [None, 0], 1),
        ("min_new_tokens", [None, 0], 1),
        ("penalty_alpha", [None, 0.0], 0.6),
        ("do_sample", [None, False], True),
        ("suppress_tokens", [None, []], [3]),
        ("sequence_bias", [None, {}], {"5": -1.0}),
        ("forced_bos_token_id", [None], 0),
    ],
)
def test_b5_a_setting_that_is_not_applied_is_named_unless_it_changes_nothing(
    setting: str, neutral: list[Any], other: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    """generation_config.json is full of defaults: they need no line. What generate() would obey and readers do not does."""
    for value in neutral:
        edit(checkpoint / "generation_config.json", **{setting: value})
        load_checkpoint(checkpoint)
        assert setting not in capsys.readouterr().err
    edit(checkpoint / "generation_config.json", **{setting: other})
    load_checkpoint(checkpoint)
    assert f"generation_config.json: {setting}=" in capsys.readouterr().err


def test_b5_inputs_still_end_with_the_tokenizers_token(checkpoint: Path, tmp_path: Path):
    """The token at which answers stop is not the token that ends inputs."""
    from export.manifest_writer import describe_reader

    edit(checkpoint / "generation_config.json", eos_token_id=7)
    loaded = load_checkpoint(checkpoint)
    (tmp_path / "files").mkdir()
    manifest = describe_reader(loaded, tmp_path / "files", 18, {})
    encoded = PromptEncoder(Tokenizer.from_str(loaded.tokenizer_json), manifest).encode("w1", ["w2"])
    assert manifest.eos_token_id == 7 and encoded.input_ids[0][encoded.attention_mask[0] == 1][-1] == 1


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"eos_token_id": [1]}, (1, 0, 0)),
        ({"eos_token_id": [1, 32000]}, (1, 0, 0)),  # the reader has no token 32000
        ({"pad_token_id": None}, (1, 1, 0)),
        ({"decoder_start_token_id": None}, (1, 0, 0)),
        ({"decoder_start_token_id": None, "bos_token_id": 9}, (1, 0, 9)),
        ({"eos_token_id": [5, 5], "pad_token_id": None}, (5, 5, 0)),
    ],
    ids=str,
)
def test_b6_lists_and_nulls_of_tokens(changes: dict[str, Any], tokens: tuple[int, ...], checkpoint: Path):
    """Lists of one token and null mean what they mean to generate()."""
    edit(checkpoint / "config.json", **changes)
    (checkpoint / "generation_config.json").unlink()
    config = load_checkpoint(checkpoint).reader.config
    assert (config.eos_token_id, config.pad_token_id, config.decoder_start_token_id) == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": [1, 5]}, "eos_token_id: wanted one token, at which a reader stops, got [1, 5]"),
        ({"eos_token_id": None}, "eos_token_id: wanted one token, at which a reader stops, got none"),
        ({"eos_token_id": 32000}, "eos_token_id: wanted 0 to vocab_size-1=96, got 32000"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"decoder_start_token_id": [0, 3]}, "decoder_start_token_id: wanted one token, got [0, 3]"),
        ({"decoder_start_token_id": "0"}, "decoder_start_token_id"),
        ({"decoder_start_token_id": None, "pad_token_id": None}, "decoder_start_token_id: wanted a token, got none"),
    ],
    ids=str,
)
def test_b6_other_tokens_are_refused(changes: dict[str, Any], message: str, checkpoint: Path, refused: Callable[..., str]):
    edit(checkpoint / "config.json", **changes)
    (checkpoint / "generation_config.json").unlink()
    assert message in refused(checkpoint)
