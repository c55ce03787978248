"""What our modules compute, against transformers, against an independent implementation, and against themselves in other forms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from export.checkpoint.config import ReaderConfig
from export.checkpoint.files import load_checkpoint
from export.checkpoint.weights import hf_name
from export.model.reader import Reader
from tests.conftest import CONFIGS, FID, FIDO, GROUPED, T5_V1_0, VOCAB_SIZE, random_passages, random_reader
from tests.export.model import numpy_reader

TOLERANCE = 1e-4
SEEDS = (0, 1, 2)


@pytest.fixture(params=["v1.0", "v1.1"])
def hf_t5(request, tmp_path, tokenizer_json):
    """transformers' T5 with random weights, and what our loader makes of its saved directory."""
    torch.manual_seed(7)
    old = request.param == "v1.0"
    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=12,
            d_kv=5,
            d_ff=7,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=3,
            feed_forward_proj="relu" if old else "gated-gelu",
            tie_word_embeddings=old,
            initializer_factor=5.0,
        )
    ).eval()
    if not old:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 12))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    return theirs, load_checkpoint(tmp_path).reader


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_one_passage_equals_transformers_t5(hf_t5, seed):
    theirs, ours = hf_t5
    ids, mask = random_passages(1, 40, seed, batch=3)
    targets = torch.randint(2, VOCAB_SIZE, (3, 6), generator=torch.Generator().manual_seed(seed))
    wanted = theirs(input_ids=ids[:, 0], attention_mask=mask[:, 0], decoder_input_ids=targets).logits
    torch.testing.assert_close(ours(ids, mask, targets), wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_fusion_equals_transformers_decoder_on_concatenated_passages(hf_t5, seed):
    theirs, ours = hf_t5
    ids, mask = random_passages(4, 9, seed)
    targets = torch.randint(2, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(seed))
    encoded = [theirs.encoder(input_ids=ids[:, n], attention_mask=mask[:, n]).last_hidden_state for n in range(4)]
    wanted = theirs(
        encoder_outputs=BaseModelOutput(torch.cat(encoded, 1)), attention_mask=mask.reshape(1, -1), decoder_input_ids=targets
    ).logits
    torch.testing.assert_close(ours(ids, mask, targets), wanted, atol=TOLERANCE, rtol=0)


def numpy_weights(reader: Reader) -> numpy_reader.Weights:
    return {hf_name(name): weight.numpy().astype(np.float64) for name, weight in reader.state_dict().items()}


def numpy_arguments(reader: Reader, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> tuple:
    passages = [row[valid.bool()].tolist() for row, valid in zip(ids[0], mask[0], strict=True)]
    return passages, targets[0].tolist(), numpy_weights(reader)


def numpy_sizes(config: ReaderConfig) -> dict:
    return {
        "layers": config.encoder.num_layers,
        "decoder_layers": config.decoder.num_layers,
        "d_kv": config.encoder.d_kv,
        "decoder_d_kv": config.decoder.d_kv,
        "period": config.encoder_decoder_attention_period,
        "scale": config.scale_decoder_outputs,
        "passage_length": config.passage_length,
    }


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reader_equals_independent_numpy_implementation(name, seed):
    config = CONFIGS[name]
    reader = random_reader(config, seed)
    length = config.passage_length
    ids, mask = random_passages(3, length, seed)
    targets = torch.randint(2, VOCAB_SIZE, (1, 7), generator=torch.Generator().manual_seed(seed))
    wanted = numpy_reader.logits(*numpy_arguments(reader, ids, mask, targets), **numpy_sizes(config))
    np.testing.assert_allclose(reader(ids, mask, targets)[0].numpy(), wanted, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_cross_attention_bias_changes_the_answer_after_the_first_token_only():
    config = dataclasses.replace(T5_V1_0, cross_attention_relative_bias=True)
    with_bias = random_reader(config)
    without = Reader(dataclasses.replace(config, cross_attention_relative_bias=False)).eval()
    without.load_state_dict({k: v for k, v in with_bias.state_dict().items() if "cross_relative" not in k})
    ids, mask = random_passages(2, 8, 0)
    targets = torch.tensor([[0, 5, 6, 7]])
    difference = (with_bias(ids, mask, targets) - without(ids, mask, targets)).abs().amax(-1)[0]
    assert difference[0] < 1e-5 < difference[1:].min()


@torch.no_grad()
def test_grouped_query_with_tied_heads_equals_multi_head():
    grouped = random_reader(GROUPED)
    heads, kv_heads, d_kv = 6, 2, GROUPED.decoder.d_kv
    multi = Reader(dataclasses.replace(GROUPED, decoder=dataclasses.replace(GROUPED.decoder, num_kv_heads=heads))).eval()

    def repeated(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name.startswith("decoder.") and name.endswith(("attention.k.weight", "attention.v.weight")):
            return weight.view(kv_heads, 1, d_kv, -1).expand(-1, heads // kv_heads, -1, -1).reshape(heads * d_kv, -1)
        return weight

    multi.load_state_dict({name: repeated(name, weight) for name, weight in grouped.state_dict().items()})
    ids, mask = random_passages(3, 9, 0)
    targets = torch.tensor([[0, 5, 6, 7]])
    torch.testing.assert_close(grouped(ids, mask, targets), multi(ids, mask, targets), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("config", [FID, FIDO], ids=["fid", "fido"])
def test_batch_of_n_equals_n_batches_of_one(config: ReaderConfig):
    reader = random_reader(config)
    ids, mask = random_passages(3, 9, 0, batch=4)
    targets = torch.randint(2, VOCAB_SIZE, (4, 5), generator=torch.Generator().manual_seed(0))
    together = reader(ids, mask, targets)
    for i in range(4):
        torch.testing.assert_close(reader(ids[i : i + 1], mask[i : i + 1], targets[i : i + 1])[0], together[i], atol=1e-5, rtol=0)


def test_layers_without_cross_attention_own_no_weights_for_it():
    names = {name.split(".")[2] for name in random_reader(FIDO).state_dict() if ".cross_attention" in name}
    assert names == {"1", "3"} == {str(i) for i in FIDO.cross_attention_layers}


@torch.no_grad()
def test_min_new_tokens_keeps_the_answer_going_and_max_ends_it():
    ids, mask = random_passages(2, 9, 0, batch=6)
    ending = random_reader(FID).generate(ids, mask, 12).tokens[0][3]  # a token that the reader writes by itself, taken for the end token
    reader = random_reader(dataclasses.replace(FID, eos_token_id=ending))
    free = reader.generate(ids, mask, 12).tokens
    forced = reader.generate(ids, mask, 12, min_new_tokens=12).tokens
    assert len(free[0]) <= 4 and free[0][-1] == ending
    assert all(len(tokens) == 12 and ending not in tokens[:-1] for tokens in forced)
