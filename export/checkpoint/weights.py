"""Names of weights: ours, those of Hugging Face's T5, and those that the wrappers of facebookresearch/FiD left in its checkpoints.

Comes in: tensors by the names of a checkpoint. Goes out: the same tensors by our names, or one `CheckpointError` with every fault. Reads no
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from export.errors import CheckpointError as CheckpointError
from export.model.reader import Reader

from .config import ReaderConfig

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
        CheckpointError: naming every missing, extra and misshapen weight at once.
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
        raise CheckpointError(f"{source}: {len(faults)} weights do not fit its config.json:\n  " + "\n  ".join(sorted(faults)))
    return {ours: weights[name].to(torch.float32) for name, ours in names.items()}


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
