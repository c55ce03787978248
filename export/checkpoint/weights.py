"""Names of weights: ours, those of Hugging Face's T5, and those that facebookresearch/FiD's wrappers left; FiD -> FiDO; a larger decoder.

Comes in: tensors by the names of a checkpoint. Goes out: the same tensors by our names, or one `CheckpointError` with every fault. Reads no
files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from export.errors import CheckpointError as CheckpointError
from export.errors import ConfigError
from export.model.reader import Reader

from .config import ReaderConfig, StackConfig
from .source_files import listed

HF_CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def hf_name(name: str) -> str:
    """The name of our weight `name` in transformers' T5ForConditionalGeneration.

    Example: decoder.layers.3.cross_attention.k.weight -> decoder.block.3.layer.1.EncDecAttention.k.weight
    """
    whole = {
        "embedding.weight": "shared.weight",
        "encoder.relative_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.relative_bias.weight": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.cross_relative_bias.weight": HF_CROSS_BIAS,
        "encoder.final_norm.weight": "encoder.final_layer_norm.weight",
        "decoder.final_norm.weight": "decoder.final_layer_norm.weight",
    }
    if name in whole:
        return whole[name]
    match = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(self_attention|cross_attention|feed_forward)(_norm)?\.(.+)", name)
    if match is None:
        return name  # lm_head.weight
    stack, layer, part, norm, rest = match.groups()
    feed_forward_index = 1 if stack == "encoder" else 2
    index, module = {
        "self_attention": (0, "SelfAttention"),
        "cross_attention": (1, "EncDecAttention"),
        "feed_forward": (feed_forward_index, "DenseReluDense"),
    }[part]
    return f"{stack}.block.{layer}.layer.{index}.{'layer_norm' if norm else module}.{rest}"


# transformers ties these names. A file holds the shared embedding under one of them or under several.
EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
T5_ROOTS = ("shared", "encoder", "decoder", "lm_head")
FAULTS_SHOWN = 6


def without_common_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the prefix that a wrapper put before every name, such as `module.` of DDP or `_orig_mod.` of torch.compile."""
    found = dict(weights)
    while found:
        roots = {name.partition(".")[0] for name in found}
        (root, *others) = roots
        if others or root in T5_ROOTS or not all("." in name for name in found):
            return found
        found = {name.partition(".")[2]: tensor for name, tensor in found.items()}
    return found


def require_t5(names: Iterable[str], source: str) -> None:
    """Refuse what is no T5 with both stacks, in one line that says what it is.

    Raises:
        CheckpointError: for an adapter, quantised weights, an encoder or a decoder alone, or another model.
    """
    every = list(names)
    adapter = next((name for name in every if re.search(r"\.(lora_|ia3_|adapters?\.|base_layer\.)|prompt_embeddings", name)), None)
    if adapter is not None:
        raise CheckpointError(
            f"{source}: {adapter}: a PEFT adapter; merge it into its base model with merge_and_unload(), save that, and pass the result"
        )
    quantised = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state.*|weight_format|weight_scale|weight_packed)$")
    packed = next((name for name in every if quantised.search(name)), None)
    if packed is not None:
        raise CheckpointError(f"{source}: {packed}: quantised weights are not read: export the model before it was quantised")
    stacks = [stack for stack in ("encoder", "decoder") if any(name.startswith(f"{stack}.block.") for name in every)]
    if stacks == ["encoder"]:
        raise CheckpointError(f"{source}: an encoder-only T5: it has no decoder.block weights; pass an encoder-decoder")
    if stacks == ["decoder"]:
        raise CheckpointError(f"{source}: a decoder alone: it has no encoder.block weights; pass an encoder-decoder")
    if not stacks:
        shown = ", ".join(every[:3]) or "none"
        raise CheckpointError(f"{source}: wanted weights of T5 (encoder.block.0 and so on), got {len(every)} others: {shown}")


def with_shared_embedding(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with shared.weight, which a file may hold under another of its tied names only (safetensors' `save_model`)."""
    name = next((name for name in EMBEDDING_NAMES if name in weights), None)
    return dict(weights) if name is None else {"shared.weight": weights[name], **weights}


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether the names are those of facebookresearch/FiD's EncoderWrapper and CheckpointWrapper."""
    return any(name.startswith("encoder.encoder.") for name in names)


def unwrapped_name(name: str) -> str:
    """FiD's wrapped name -> transformers' name.

    Example: encoder.encoder.block.0.module.layer -> encoder.block.0.layer
    """
    if name.startswith("encoder.encoder."):
        name = name.removeprefix("encoder.")
    return re.sub(r"^(encoder\.block\.\d+)\.module\.", r"\1.", name)


def expected_shapes(config: ReaderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a reader, by our names. Allocates no memory for weights."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in Reader(config).state_dict().items()}


def state_dict_from_weights(config: ReaderConfig, weights: Mapping[str, Tensor], *, source: str, hugging_face: bool) -> dict[str, Tensor]:
    """Our state dict, in float32, from the tensors of a checkpoint.

    Args:
        config: of the checkpoint.
        weights: tensors by our names, or by transformers' names if `hugging_face`.
        source: the checkpoint's name in errors.
        hugging_face: the names are transformers'. Equal copies of the shared embedding under its other names are then accepted.

    Raises:
        CheckpointError: naming the missing, extra and misshapen weights at once, or those with NaN or infinity.
    """
    shapes = expected_shapes(config)
    names = {(hf_name(ours) if hugging_face else ours): ours for ours in shapes}
    faults: list[str] = []
    copies = _embedding_copies(config, weights, faults) if hugging_face else set()
    faults += [f"missing {name} {list(shapes[ours])}" for name, ours in names.items() if name not in weights]
    faults += [f"extra {name} {list(weights[name].shape)}" for name in weights if name not in names and name not in copies]
    for name, ours in names.items():
        if name in weights and tuple(weights[name].shape) != shapes[ours]:
            faults.append(f"misshapen {name}: wanted {list(shapes[ours])}, got {list(weights[name].shape)}")
    if faults:
        shown = listed(sorted(faults), FAULTS_SHOWN, "; ")
        raise CheckpointError(f"{source}: {len(faults)} weights do not fit its config.json: {shown}")
    state = {ours: weights[name].to(torch.float32) for name, ours in names.items()}
    bad = [name for name, ours in names.items() if not torch.isfinite(state[ours]).all()]
    if bad:
        raise CheckpointError(f"{source}: wanted finite weights, got NaN or infinity in {listed(bad, FAULTS_SHOWN)}")
    return state


def _embedding_copies(config: ReaderConfig, weights: Mapping[str, Tensor], faults: list[str]) -> set[str]:
    """Names under which older checkpoints repeat the shared embedding. A copy that differs is added to `faults`."""
    names = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if config.tie_word_embeddings:
        names.add("lm_head.weight")
    shared = weights.get("shared.weight")
    for name in names & set(weights):
        if shared is not None and not torch.equal(weights[name], shared):
            faults.append(f"{name} differs from shared.weight; wanted an equal copy")
    return names


# FiD -> FiDO: the weights that FiDO keeps, mean-pooled where it has fewer heads.
#
# Comes in: a FiD reader. Goes out: a FiDO reader. It answers badly until it is trained further ("up-trained"), because layers have lost
# their cross-attention and heads share keys and values. Does not train.


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


def with_larger_decoder(reader: Reader, decoder: StackConfig, period: int, seed: int = 0) -> Reader:
    """The reader with a larger decoder that computes the same, up to rounding and the norms' epsilon.

    Growth is function-preserving: the old weights keep their places, and whatever a new part writes to the residual stream is zero. New
    layers, heads, inner features and residual features read it with random weights, so that gradients reach them. The old layers are
    spread evenly and the last one stays last. Only cross-attention outside every `period`-th layer is lost, as in `fido_from_fid`.

    Args:
        reader: FiD or FiDO.
        decoder: sizes of the new decoder; d_kv as before, and as many key/value heads as before or one for each query head.
        period: encoder_decoder_attention_period of the result.
        seed: of the random weights.

    Raises:
        ConfigError: if a size is smaller than before, or the form of the attention differs.
    """
    old = reader.config.decoder
    grows = ("d_model", "d_ff", "num_layers", "num_heads")
    faults = [
        f"{name}: wanted at least {getattr(old, name)}, got {getattr(decoder, name)}"
        for name in grows
        if getattr(decoder, name) < getattr(old, name)
    ]
    kv_heads = decoder.num_heads if old.num_kv_heads == old.num_heads else old.num_kv_heads
    if (decoder.d_kv, decoder.num_kv_heads) != (old.d_kv, kv_heads):
        faults.append(f"d_kv and num_kv_heads: wanted {old.d_kv} and {kv_heads}, got {decoder.d_kv} and {decoder.num_kv_heads}")
    if decoder.num_heads > old.num_heads and 1 < old.num_kv_heads < old.num_heads:
        faults.append(
            f"num_heads: wanted {old.num_heads}, because heads of grouped-query attention cannot be added, got {decoder.num_heads}"
        )
    config = reader.config
    if not config.shares_embedding and decoder.d_model == config.encoder.d_model:
        faults.append(f"d_model: wanted other than the encoder's {decoder.d_model}, whose embedding the decoder does not share")
    if faults:
        raise ConfigError(f"larger decoder: {'; '.join(faults)}")
    target = Reader(dataclasses.replace(config, decoder=decoder, encoder_decoder_attention_period=period))
    target.reset_parameters(seed)
    source = {**reader.state_dict(), "decoder_embedding.weight": reader.target_embedding().weight}
    former = {-(-(i + 1) * decoder.num_layers // old.num_layers) - 1: i for i in range(old.num_layers)}
    # The norms divide by the mean square over more features, of which the new ones are zero. The scale of the head makes good for that.
    shrunk = (old.d_model / decoder.d_model) ** 0.5
    with torch.no_grad():
        for name, weight in target.state_dict().items():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            if match is None:
                before = source[name]
            else:
                before = source.get(f"decoder.layers.{former.get(int(match[1]))}.{match[2]}")
            if (name.endswith((".o.weight", ".wo.weight")) and match) or name == "decoder_embedding.weight":
                weight.zero_()
            if before is not None:
                kept = weight[tuple(slice(size) for size in before.shape)]
                kept.copy_(before)
                if (name == "decoder.final_norm.weight" and not config.scale_decoder_outputs) or (match and name.endswith("norm.weight")):
                    kept.mul_(shrunk)
    return target.eval()
