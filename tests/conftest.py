"""Tiny readers of odd sizes, so that a transposed axis cannot pass, and a tokenizer that needs no download."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.checkpoint.config import ReaderConfig, StackConfig
from export.checkpoint.files import Checkpoint
from export.model.reader import Reader

VOCAB_SIZE = 97

FID = ReaderConfig(
    encoder=StackConfig(d_model=12, d_kv=5, d_ff=7, num_layers=2, num_heads=3, num_kv_heads=3),
    decoder=StackConfig(d_model=12, d_kv=5, d_ff=11, num_layers=3, num_heads=4, num_kv_heads=4),
    vocab_size=VOCAB_SIZE,
    passage_length=24,
)
# layer-sparse, multi-query, and a decoder wider than the encoder
FIDO = dataclasses.replace(
    FID,
    decoder=StackConfig(d_model=22, d_kv=3, d_ff=17, num_layers=5, num_heads=6, num_kv_heads=1),
    encoder_decoder_attention_period=2,
)
GROUPED = dataclasses.replace(FIDO, decoder=dataclasses.replace(FIDO.decoder, num_kv_heads=2))
T5_V1_0 = dataclasses.replace(FID, feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True)
# facebookresearch/FiD's released readers: T5 v1.0 with a relative bias in cross-attention, no </s> on the inputs
RELEASED_FID = dataclasses.replace(T5_V1_0, cross_attention_relative_bias=True, append_eos=False)
WITHOUT_OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino: `make setup FOR=openvino`")
WITHOUT_BF16 = pytest.mark.skipif(
    not re.search("avx512_bf16|amx_bf16", Path("/proc/cpuinfo").read_text()), reason="bf16: a CPU with avx512_bf16 or amx_bf16"
)
CPU_BACKENDS = ["onnxruntime", pytest.param("openvino", marks=WITHOUT_OPENVINO)]  # that run the same graphs
CONFIGS = {"fid": FID, "fido": FIDO, "grouped": GROUPED, "t5_v1_0": T5_V1_0, "released_fid": RELEASED_FID}


def wide(config: ReaderConfig) -> ReaderConfig:
    """A reader of the tests with sizes that the GPU's kernels have."""
    encoder = dataclasses.replace(config.encoder, d_model=24, d_kv=16, d_ff=40)
    decoder = dataclasses.replace(config.decoder, d_model=24 if config.shares_embedding else 32, d_kv=16, d_ff=48)
    return dataclasses.replace(config, encoder=encoder, decoder=decoder)


def random_reader(config: ReaderConfig, seed: int = 0) -> Reader:
    """A reader whose every weight matters: norms and biases are random too, and the answers do not end at once."""
    reader = Reader(config)
    reader.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for name, weight in reader.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
    return reader.eval()


def random_passages(n_passages: int, passage_length: int, seed: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[batch, n_passages, passage_length] ids and mask; passages of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, passage_length + 1, (batch, n_passages, 1), generator=generator)
    mask = (torch.arange(passage_length) < lengths).long()
    ids = torch.randint(3, VOCAB_SIZE, (batch, n_passages, passage_length), generator=generator)
    return ids * mask, mask


def word_tokenizer() -> Tokenizer:
    """A word-piece-per-word tokenizer over VOCAB_SIZE ids: <pad>, </s>, <unk>, the prompt's words, then w0, w1, ..."""
    words = ["<pad>", "</s>", "<unk>", "▁question:", "▁title:", "▁context:"]
    words += [f"▁w{i}" for i in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>", "<unk>")])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    return word_tokenizer().to_str()


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> dict[str, tuple[Checkpoint, Path]]:
    """Exported engines of every configuration, with the checkpoint they come from; exported once.

    With TEST_ENGINES=DIRECTORY in the environment they stay there and serve later runs too, which then export nothing.
    """
    from export.graphs.onnx_export import export_reader

    kept = os.environ.get("TEST_ENGINES")
    parent = Path(kept) if kept else tmp_path_factory.mktemp("engines")
    exported = {}
    for name, config in CONFIGS.items():
        checkpoint = Checkpoint(random_reader(config), tokenizer_json, name, "own")
        directory = parent / name
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            export_reader(checkpoint, directory)
        exported[name] = (checkpoint, directory)
    return exported
