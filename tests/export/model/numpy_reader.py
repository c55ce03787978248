"""FiD and FiDO once more, in NumPy, one question at a time, written from the definitions and not from our modules.

Fusion-in-Decoder: Izacard & Grave (2021). Layer-sparse cross-attention and multi-query attention: de Jong et al. (2022), Shazeer (2019).
T5: Raffel et al. (2020). Works on a dictionary of weights by transformers' names; loops where our code vectorises.
"""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def bucket(relative: int, *, bidirectional: bool, buckets: int = 32, max_distance: int = 128) -> int:
    """T5's bucket of a key that lies `relative` positions after the query."""
    offset = 0
    if bidirectional:
        buckets //= 2
        if relative > 0:
            offset = buckets
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    if distance < buckets // 2:
        return offset + distance
    exact = buckets // 2
    return offset + min(buckets - 1, exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)))


def attention(x, source, w: Weights, prefix: str, d_kv: int, allowed, bias, seen: list | None = None) -> np.ndarray:
    """Seen takes the weights of query 0, one array a head.

    allowed(i, j): whether query i may see key j; bias(head, i, j): added to the score. Heads are counted from the weights' shapes."""
    q, k, v = (a @ w[f"{prefix}.{n}.weight"].T for a, n in ((x, "q"), (source, "k"), (source, "v")))
    heads, kv_heads = q.shape[1] // d_kv, k.shape[1] // d_kv
    mixed = np.zeros_like(q)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        for i in range(len(x)):
            keys = [j for j in range(len(source)) if allowed(i, j)]
            qi = q[i, head * d_kv : (head + 1) * d_kv]
            scores = np.array([qi @ k[j, shared * d_kv : (shared + 1) * d_kv] + bias(head, i, j) for j in keys])
            weights = softmax(scores)
            if seen is not None and i == 0:
                seen.append(weights)
            for weight, j in zip(weights, keys, strict=True):
                mixed[i, head * d_kv : (head + 1) * d_kv] += weight * v[j, shared * d_kv : (shared + 1) * d_kv]
    return mixed @ w[f"{prefix}.o.weight"].T


def feed_forward(x: np.ndarray, w: Weights, prefix: str) -> np.ndarray:
    if f"{prefix}.wi.weight" in w:
        inner = np.maximum(x @ w[f"{prefix}.wi.weight"].T, 0)
    else:
        gate = x @ w[f"{prefix}.wi_0.weight"].T
        gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        inner = gelu * (x @ w[f"{prefix}.wi_1.weight"].T)
    return inner @ w[f"{prefix}.wo.weight"].T


def encode_passage(ids, w: Weights, layers: int, d_kv: int) -> np.ndarray:
    x = w["shared.weight"][ids]
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        normed = norm(x, w[f"{block}.0.layer_norm.weight"])
        x = x + attention(
            normed,
            normed,
            w,
            f"{block}.0.SelfAttention",
            d_kv,
            lambda i, j: True,
            lambda h, i, j: table[bucket(j - i, bidirectional=True), h],
        )
        x = x + feed_forward(norm(x, w[f"{block}.1.layer_norm.weight"]), w, f"{block}.1.DenseReluDense")
    return norm(x, w["encoder.final_layer_norm.weight"])


def logits(
    passages,
    targets,
    w: Weights,
    *,
    layers,
    decoder_layers,
    d_kv,
    decoder_d_kv,
    period,
    scale,
    passage_length,
    attribution: list | None = None,
) -> np.ndarray:
    """float[target_length, vocab] of one question.

    Args:
        passages: one list of token ids each, without padding.
        attribution: takes the cross-attention weights of the first target position: an array a head and cross-attending layer.
        passage_length: to which facebookresearch/FiD would have padded each passage; places the keys for its cross-attention bias.
    """
    hidden = np.concatenate([encode_passage(ids, w, layers, d_kv) for ids in passages])
    places = [n * passage_length + t for n, ids in enumerate(passages) for t in range(len(ids))]
    y = w.get("decoder_embedding.weight", w["shared.weight"])[targets]
    self_table = w["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    cross_table = w.get("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    for layer in range(decoder_layers):
        block = f"decoder.block.{layer}.layer"
        normed = norm(y, w[f"{block}.0.layer_norm.weight"])
        y = y + attention(
            normed,
            normed,
            w,
            f"{block}.0.SelfAttention",
            decoder_d_kv,
            lambda i, j: j <= i,
            lambda h, i, j: self_table[bucket(j - i, bidirectional=False), h],
        )
        if (layer + 1) % period == 0:
            y = y + attention(
                norm(y, w[f"{block}.1.layer_norm.weight"]),
                hidden,
                w,
                f"{block}.1.EncDecAttention",
                decoder_d_kv,
                lambda i, j: True,
                lambda h, i, j: 0.0 if cross_table is None else cross_table[bucket(places[j] - i, bidirectional=False), h],
                attribution,
            )
        y = y + feed_forward(norm(y, w[f"{block}.2.layer_norm.weight"]), w, f"{block}.2.DenseReluDense")
    y = norm(y, w["decoder.final_layer_norm.weight"])
    if scale:
        y = y * y.shape[1] ** -0.5
    head = w.get("lm_head.weight", w.get("decoder_embedding.weight", w["shared.weight"]))
    return y @ head.T
