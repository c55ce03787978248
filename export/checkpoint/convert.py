"""FiD -> FiDO: the weights that FiDO keeps, mean-pooled where it has fewer heads.

Comes in: a FiD reader. Goes out: a FiDO reader. It answers badly until it is trained further ("up-trained"), because layers have lost
their cross-attention and heads share keys and values. Does not train.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from export.errors import ConfigError
from export.model.reader import Reader


def fido_from_fid(reader: Reader, period: int, num_kv_heads: int) -> Reader:
    """A FiDO reader initialised from the weights of a FiD reader.

    Key and value heads of the decoder are averaged over groups of neighbouring heads. Ainslie et al. (2023) found the mean better than the
    first head or a random one. Cross-attention outside every `period`-th layer is dropped.

    Args:
        reader: has cross-attention at least in the layers where the result has it.
        period: encoder_decoder_attention_period of the result.
        num_kv_heads: key/value heads of the result's decoder, a divisor of those of `reader`.

    Raises:
        ConfigError: if the period or the number of heads does not fit.
    """
    config, heads = reader.config, reader.config.decoder.num_kv_heads
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ConfigError(f"num_kv_heads: wanted a divisor of the checkpoint's {heads}, got {num_kv_heads}")
    target_config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, num_kv_heads=num_kv_heads),
        encoder_decoder_attention_period=period,
    )
    absent = sorted(set(target_config.cross_attention_layers) - set(config.cross_attention_layers))
    if absent:
        raise ConfigError(
            f"period {period}: needs cross-attention in layers {absent}, but the checkpoint has it in {list(config.cross_attention_layers)}"
        )

    def pooled(weight: Tensor) -> Tensor:
        """float[heads * d_kv, d_source] -> float[num_kv_heads * d_kv, d_source]."""
        d_kv = config.decoder.d_kv
        return weight.view(num_kv_heads, heads // num_kv_heads, d_kv, -1).mean(1).reshape(num_kv_heads * d_kv, -1)

    target = Reader(target_config)
    source = reader.state_dict()
    state = {}
    with torch.no_grad():
        for name in target.state_dict():
            is_kv = name.startswith("decoder.") and name.endswith(("attention.k.weight", "attention.v.weight"))
            state[name] = pooled(source[name]) if is_kv else source[name].clone()
    target.load_state_dict(state)
    return target.eval()
