"""The demo readers' sizes.

FiD and FiDO share the encoder, the vocabulary and the training budget. FiDO's decoder has cross-attention in every
second layer only (layer-sparse) and one key/value head (multi-query); the savings pay for more and wider layers.
"""

from __future__ import annotations

from export.checkpoint.config import ReaderConfig, StackConfig
from training.corpus.tokenizer import VOCAB_SIZE

PASSAGE_LENGTH = 128
FIDO_PERIOD = 2
READERS = ("fid", "fido")


def reader_config(name: str, vocab_size: int = VOCAB_SIZE) -> ReaderConfig:
    """The configuration of a demo reader.

    Args:
        name: "fid" or "fido".
        vocab_size: Of the tokenizer.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in READERS:
        raise ValueError(f"reader: wanted one of {', '.join(READERS)}, got {name!r}")
    encoder = StackConfig(d_model=192, d_kv=32, d_ff=384, num_layers=4, num_heads=6, num_kv_heads=6)
    if name == "fid":
        decoder = StackConfig(d_model=192, d_kv=32, d_ff=384, num_layers=2, num_heads=6, num_kv_heads=6)
    else:
        decoder = StackConfig(d_model=192, d_kv=32, d_ff=512, num_layers=4, num_heads=6, num_kv_heads=1)
    return ReaderConfig(
        encoder=encoder,
        decoder=decoder,
        vocab_size=vocab_size,
        encoder_decoder_attention_period=1 if name == "fid" else FIDO_PERIOD,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        scale_decoder_outputs=True,
        append_eos=True,
        passage_length=PASSAGE_LENGTH,
    )
