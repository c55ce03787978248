"""Greedy answers of a torch reader to FiD's JSONL questions, and their exact match.

The served readers are compared with these answers, by the client's exact match (``clients/fido_client/metrics.py``).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from export.model.reader import Reader
from fido_client.metrics import exact_match
from training.corpus.examples import MAX_TARGET_TOKENS
from training.corpus.tokenizer import WordEncoder


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question; ``gold_read``: None if the question names no gold passage."""

    id: str
    relation: str
    question: str
    prediction: str
    answers: list[str]
    match: bool
    gold_read: bool | None


@dataclasses.dataclass(frozen=True)
class Score:
    """Exact match in percent over ``count`` questions."""

    em: float
    count: int

    def __str__(self) -> str:
        return f"{self.em:.1f} ({self.count})"


def prompt_array(reader: Reader, words: WordEncoder, examples: Sequence[dict[str, Any]], n_passages: int) -> np.ndarray:
    """int64[batch, n_passages, passage_length], 0 = pad; questions with fewer passages get empty rows."""
    config = reader.config
    kept = config.passage_length - config.append_eos
    ids = np.zeros((len(examples), n_passages, config.passage_length), dtype=np.int64)
    for row, example in enumerate(examples):
        for column, context in enumerate(example["ctxs"][:n_passages]):
            prompt = words.encode(f"question: {example['question']} title: {context['title']} context: {context['text']}")[:kept]
            if config.append_eos:
                prompt = [*prompt, config.eos_token_id]
            ids[row, column, : len(prompt)] = prompt
    return ids


@torch.no_grad()
def predict(
    reader: Reader, tokenizer: Tokenizer, examples: Sequence[dict[str, Any]], n_passages: int, rows_per_batch: int = 640
) -> list[Prediction]:
    """Greedy answers from the first ``n_passages`` passages of each question.

    Args:
        reader: In eval mode; its device is used.
        tokenizer: The reader's.
        examples: FiD's JSONL objects; ``relation``, ``gold`` and ``id`` are optional.
        n_passages: Passages per question.
        rows_per_batch: Passages per encoder call.
    """
    words = WordEncoder(tokenizer)
    device = next(reader.parameters()).device
    batch_size = max(1, rows_per_batch // n_passages)
    predictions = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        ids = torch.from_numpy(prompt_array(reader, words, chunk, n_passages)).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            generation = reader.generate(ids, (ids != reader.config.pad_token_id).long(), MAX_TARGET_TOKENS)
        for number, (example, tokens) in enumerate(zip(chunk, generation.tokens, strict=True), start):
            text = tokenizer.decode([token for token in tokens if token > 2])
            gold = example.get("gold")
            predictions.append(
                Prediction(
                    id=str(example.get("id", number)),
                    relation=example.get("relation", ""),
                    question=example["question"],
                    prediction=text,
                    answers=list(example["answers"]),
                    match=exact_match(text, example["answers"]),
                    gold_read=None if gold is None else any(c.get("id") == gold for c in example["ctxs"][:n_passages]),
                )
            )
    return predictions


def score(predictions: Sequence[Prediction]) -> Score:
    """Exact match over all predictions."""
    return Score(100.0 * sum(p.match for p in predictions) / max(1, len(predictions)), len(predictions))


def scores_by_relation(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """Exact match of each relation, the worst first."""
    groups: dict[str, list[Prediction]] = collections.defaultdict(list)
    for prediction in predictions:
        groups[prediction.relation].append(prediction)
    scores = {relation: score(group) for relation, group in groups.items()}
    return dict(sorted(scores.items(), key=lambda item: (item[1].em, item[0])))
