"""One configuration class for FiD and FiDO, and the published sizes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from export.checkpoint.config import ConfigError, ReaderConfig, reader_preset, stack_preset
from export.checkpoint.hugging_face import t5_faults
from export.checkpoint.source_files import listed, one_line
from export.checkpoint.weights import expected_shapes
from tests.conftest import CONFIGS, FID, FIDO, RELEASED_FID, T5_V1_0


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


@pytest.mark.parametrize(
    ("least", "too_little", "message"),
    [
        ({"passage_length": 2}, {"passage_length": 1}, "passage_length: wanted at least 2 tokens, got 1"),
        ({"encoder_decoder_attention_period": 3}, {"encoder_decoder_attention_period": 4}, "wanted 1 to decoder.num_layers=3, got 4"),
        ({"encoder_decoder_attention_period": 1}, {"encoder_decoder_attention_period": 0}, "wanted 1 to decoder.num_layers=3, got 0"),
        ({"relative_attention_num_buckets": 4}, {"relative_attention_num_buckets": 0}, "wanted a multiple of 4, got 0"),
        ({"relative_attention_num_buckets": 8}, {"relative_attention_num_buckets": 10}, "wanted a multiple of 4, got 10"),
        ({"relative_attention_max_distance": 17}, {"relative_attention_max_distance": 16}, "more than half of .*=32, got 16"),
        ({"layer_norm_epsilon": 1e-30}, {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon: wanted a positive number, got 0.0"),
        ({"layer_norm_epsilon": 1}, {"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon: wanted a positive number, got inf"),
        ({"pad_token_id": 96}, {"pad_token_id": 97}, "pad_token_id: wanted 0 to vocab_size-1=96, got 97"),
        ({"eos_token_id": 0}, {"eos_token_id": -1}, "eos_token_id: wanted 0 to vocab_size-1=96, got -1"),
        ({"append_eos": False}, {"append_eos": 0}, "append_eos: wanted bool, got 0"),
        ({"passage_length": 3}, {"passage_length": True}, "passage_length: wanted int, got True"),
        ({"feed_forward_proj": "relu"}, {"feed_forward_proj": "silu"}, "feed_forward_proj: wanted 'relu' or 'gated-gelu', got 'silu'"),
    ],
    ids=str,
)
def test_bounds_hold_at_their_edges(least, too_little, message):
    dataclasses.replace(FID, **least)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FID, **too_little)


@pytest.mark.parametrize("template", ["{question} {context}", "a {question} b {title} c {context} d", "{{x}} {question}{context}"])
def test_templates_that_are_prompts(template):
    assert dataclasses.replace(FID, prompt_template=template).prompt_template == template


@pytest.mark.parametrize(
    "template",
    ["{context} {question}", "{question}", "{question} {title}", "{question!r} {context}", "{question:>9} {context}", "{question"],
)
def test_templates_that_are_none(template):
    for field in ("prompt_template", "prompt_template_without_title"):
        with pytest.raises(ConfigError, match=f"{field}: wanted .*question"):
            dataclasses.replace(FID, **{field: template})


def test_a_template_without_title_has_none():
    assert dataclasses.replace(FID, prompt_template_without_title="{question} {context}") != FID
    with pytest.raises(ConfigError, match=r"prompt_template_without_title: wanted no \{title\}"):
        dataclasses.replace(FID, prompt_template_without_title=FID.prompt_template)


def test_a_stack_that_is_no_object_or_has_other_fields_is_named():
    fields = json.loads(FID.to_json())
    with pytest.raises(
        ConfigError, match=r"encoder: wanted an object, got 3; decoder: wanted exactly the fields .*'num_layers'.*, got \['d_kv'\]"
    ):
        ReaderConfig.from_dict({**fields, "encoder": 3, "decoder": {"d_kv": 3}})
    del fields["encoder"]
    with pytest.raises(ConfigError, match=r"^reader configuration: missing field 'encoder'$"):
        ReaderConfig.from_dict(fields)


def test_presets_take_other_periods_and_heads():
    assert reader_preset("small", fido=True).cross_attention_layers == (5,)
    ablation = reader_preset("base", fido=True, period=4, num_kv_heads=3)
    assert ablation.cross_attention_layers == (3, 7, 11) and ablation.decoder.num_kv_heads == 3
    assert ablation.encoder.num_kv_heads == 12 and ablation.kind == "fido"
    multi_query = reader_preset("base", fido=False, num_kv_heads=1)
    assert multi_query.kind == "fido" and len(multi_query.cross_attention_layers) == 12
    assert reader_preset("base", fido=True).decoder.num_kv_heads == 1 and reader_preset("BASE", fido=False).kind == "fid"


def test_everything_that_transformers_t5_has_no_place_for_is_named():
    square = dataclasses.replace(T5_V1_0, decoder=T5_V1_0.encoder)
    assert t5_faults(square) == []
    decoder = dataclasses.replace(square.decoder, num_kv_heads=1)
    assert t5_faults(dataclasses.replace(square, decoder=decoder)) == ["decoder.num_kv_heads: wanted num_heads=3, got 1"]
    wide = dataclasses.replace(square.decoder, d_model=22, d_kv=3, d_ff=17, num_heads=6, num_kv_heads=6)
    assert [fault.split(":")[0] for fault in t5_faults(dataclasses.replace(square, decoder=wide))] == [
        f"decoder.{size}" for size in ("d_model", "d_kv", "d_ff", "num_heads")
    ]
    assert "encoder_decoder_attention_period: wanted 1, got 2" in t5_faults(FIDO)
    assert t5_faults(RELEASED_FID)[-1].startswith("cross_attention_relative_bias: wanted none")


def test_texts_and_lists_in_errors_are_bounded():
    assert one_line(" a\n b\t") == "a b"
    assert one_line("x" * 200) == "x" * 200 and one_line("x" * 201) == "x" * 200 + "..."
    assert listed("abcde") == "a, b, c, d, e" and listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed([1, 2, 3], 2, "; ") == "1; 2 and 1 more"
