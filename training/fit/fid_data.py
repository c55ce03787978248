"""FiD's data files as token ids, and the batches of up-training: bucketed by length, packed, the same for the same seed and step.

In: a JSON or JSONL file in FiD's format, the tokenizer and the prompt of a reader. Out: `TokenizedData` (kept on disk, read by memory map)
and `PackedBatch`es. A batch depends on data, seed and step alone, so a resumed run, and a run of more processes, sees the same examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from export.checkpoint.config import ReaderConfig
from export.manifest_writer import prompt_of
from fido_client.data.examples import Example, read_examples

EXAMPLES_PER_BLOCK = 256
LENGTH_STEP = 32  # passages of one chunk are padded to a multiple of this
BATCHES_PER_POOL = 64  # batches that are sorted by length together


class DataError(ValueError):
    """A data file that cannot be trained on."""


class PromptTokens:
    """Texts -> token ids as a reader's encoder gets them: truncated, and ended where the reader was trained so."""

    def __init__(self, config: ReaderConfig, tokenizer_json: str):
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prompt = prompt_of(config, tokenizer_json)
        self._eos = config.eos_token_id
        end = self._eos if self._prompt.end_token_id is None else self._prompt.end_token_id
        self._end = [end] * self._prompt.append_eos
        self._room = config.passage_length - len(self._end)

    def texts(self, example: Example) -> list[str]:
        """The encoder inputs of an example's passages, as text."""
        return [self._prompt.text(example.question, context.title or "", context.text) for context in example.contexts]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of encoder inputs."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*row.ids[: self._room], *self._end] for row in encoded]

    def targets(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of answers, each ended by the reader's end token and at most `length` long."""
        return [[*row.ids[: length - 1], self._eos] for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class Ragged:
    """Rows of different lengths in one array: row i is `values[ends[i - 1] : ends[i]]`."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.ends[row] : self.ends[row + 1]]

    def lengths(self) -> np.ndarray:
        """int64[rows]."""
        return np.diff(self.ends)


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """Tokenized examples.

    Attributes:
        prompts: token ids of every passage's encoder input, all examples one after the other.
        passages: rows of `prompts` of each example, as a range (its values are unused).
        targets: token ids of every answer.
        answers: rows of `targets` of each example, as a range.
        gold: each example's accepted answers as text.
        facts: what the data are: name, sha256, examples, those left out.
    """

    prompts: Ragged
    passages: Ragged
    targets: Ragged
    answers: Ragged
    gold: list[list[str]]
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.gold)

    def target(self, example: int, draw: int) -> np.ndarray:
        """The tokens to train on: of answer `draw` modulo the number of answers."""
        first, end = self.answers.ends[example], self.answers.ends[example + 1]
        return self.targets[first + draw % (end - first)]

    def example_prompts(self, example: int, n_passages: int) -> list[np.ndarray]:
        """The ids of the first passages."""
        first, end = self.passages.ends[example], self.passages.ends[example + 1]
        return [self.prompts[row] for row in range(first, min(end, first + n_passages))]

    def example_tokens(self, n_passages: int) -> np.ndarray:
        """int64[examples]: tokens of the first passages."""
        ends = self.passages.ends
        last = np.minimum(ends[1:], ends[:-1] + n_passages)
        return self.prompts.ends[last] - self.prompts.ends[ends[:-1]]


def sha256_of(file: pathlib.Path) -> str:
    """Of a file's content, or of the names and contents of a directory's files."""
    digest = hashlib.sha256()
    for path in sorted(file.iterdir()) if file.is_dir() else [file]:
        if path.is_file():
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def tokenized(
    file: pathlib.Path, config: ReaderConfig, tokenizer_json: str, *, n_passages: int, target_length: int, cache: pathlib.Path
) -> TokenizedData:
    """The examples of a file, tokenized once: later calls map what lies in `cache`.

    Args:
        file: in FiD's format.
        config: of the reader; its prompt and its passage length count.
        tokenizer_json: of the reader.
        n_passages: passages kept of each example.
        target_length: tokens kept of each answer, the end token included.
        cache: directory, created if missing.

    Raises:
        DataError: if no example has passages and answers.
    """
    digest = sha256_of(file)
    fixed = [digest, config.prompt_template, config.prompt_template_without_title, config.append_eos, config.passage_length]
    key = hashlib.sha256(json.dumps([*fixed, config.eos_token_id, tokenizer_json, n_passages, target_length]).encode()).hexdigest()[:16]
    directory = cache / f"{file.stem}-{key}"
    if not directory.is_dir():
        partial = directory.with_name(f".{directory.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            counts = _write_tokens(file, PromptTokens(config, tokenizer_json), n_passages, target_length, partial)
            facts = {"file": file.name, "sha256": digest, **counts}
            (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            if not directory.is_dir():
                partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    gold = json.loads((directory / "gold.json").read_text(encoding="utf-8"))
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    ranges = {name: np.load(directory / f"{name}.npy") for name in ("prompt_ends", "passages", "target_ends", "answers")}
    prompts, targets = (np.memmap(directory / f"{name}.bin", np.uint32, "r") for name in ("prompts", "targets"))
    none = np.zeros(0, np.uint32)
    return TokenizedData(
        Ragged(prompts, ranges["prompt_ends"]),
        Ragged(none, ranges["passages"]),
        Ragged(targets, ranges["target_ends"]),
        Ragged(none, ranges["answers"]),
        gold,
        facts,
    )


def _write_tokens(file: pathlib.Path, words: PromptTokens, n_passages: int, target_length: int, directory: pathlib.Path) -> dict[str, int]:
    lengths: dict[str, list[int]] = {"prompt_ends": [], "passages": [], "target_ends": [], "answers": []}
    gold: list[list[str]] = []
    left_out = 0
    with (directory / "prompts.bin").open("wb") as prompts, (directory / "targets.bin").open("wb") as targets:
        for block in _blocks(read_examples(file, n_context=n_passages)):
            usable = [example for example in block if example.contexts and (example.target or example.answers)]
            left_out += len(block) - len(usable)
            texts = [words.texts(example) for example in usable]
            # As in FiD: the target that the data name, else one of the answers, drawn anew every epoch.
            wanted = [[example.target] if example.target else list(example.answers) for example in usable]
            for stream, name, rows in (
                (prompts, "prompt_ends", words.prompts([text for row in texts for text in row])),
                (targets, "target_ends", words.targets([text for row in wanted for text in row], target_length)),
            ):
                stream.write(np.array([token for row in rows for token in row], np.uint32).tobytes())
                lengths[name] += map(len, rows)
            lengths["passages"] += map(len, texts)
            lengths["answers"] += map(len, wanted)
            gold += [list(example.answers) or [str(example.target)] for example in usable]
    if not gold:
        raise DataError(f"{file}: wanted examples with passages and answers, got none among {left_out}")
    for name, sizes in lengths.items():
        np.save(directory / f"{name}.npy", np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]))
    (directory / "gold.json").write_text(json.dumps(gold, ensure_ascii=False), encoding="utf-8")
    return {"examples": len(gold), "left_out": left_out}


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while block := list(itertools.islice(iterator, EXAMPLES_PER_BLOCK)):
        yield block


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which examples each step trains on.

    An epoch is shuffled; pools of `BATCHES_PER_POOL` batches are sorted by length and cut into batches, which are shuffled again. The
    examples that do not fill the last batch are left out of that epoch.
    """

    rows: np.ndarray  # examples to train on
    batch_questions: int
    n_passages: tuple[int, ...]  # one is drawn for each step
    seed: int
    _epochs: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # of the current one

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self.rows) // self.batch_questions

    def batch(self, data: TokenizedData, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Examples of the step, longest first; a draw for the answer of each; and the number of passages."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self._epoch(data, epoch)
        rows = self._epochs[epoch][place]
        rng = np.random.default_rng((self.seed, 1, step))
        n_passages = int(rng.choice(self.n_passages))
        rows = rows[np.argsort(-data.example_tokens(n_passages)[rows], kind="stable")]
        return rows, rng.integers(1 << 30, size=len(rows)), n_passages

    def _epoch(self, data: TokenizedData, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, 0, epoch))
        shuffled = self.rows[rng.permutation(len(self.rows))][: self.steps_per_epoch * self.batch_questions]
        tokens = data.example_tokens(max(self.n_passages))
        pool = self.batch_questions * BATCHES_PER_POOL
        pools = [shuffled[start : start + pool] for start in range(0, len(shuffled), pool)]
        batches = np.concatenate([part[np.argsort(tokens[part], kind="stable")] for part in pools]).reshape(-1, self.batch_questions)
        return batches[rng.permutation(len(batches))]


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Questions whose padding is gone from the encoder's output.

    Attributes:
        chunks: encoder inputs of passages of like length, int64[passages, length] each, 0 = pad beyond `chunk_lengths`.
        chunk_lengths: int64[passages] of each chunk.
        padded: whether a chunk has padding.
        gather: int64[batch, encoder_sequence_length], the place of each token of a question among the tokens of all chunks.
        mask: int64[batch, encoder_sequence_length], 1 = a token, 0 = behind the question's last.
        passage: int64[batch, encoder_sequence_length], the passage that each token belongs to.
        key_positions: int64[batch, encoder_sequence_length], each token's place in the padded sequence.
        targets: int64[batch, target_length], -100 behind the end token.
        n_passages: the most that a question has.
        tokens: of all passages.
        squares: sum of the squared lengths of the passages.
    """

    chunks: list[Tensor]
    chunk_lengths: list[Tensor]
    padded: list[bool]
    gather: Tensor
    mask: Tensor
    passage: Tensor
    key_positions: Tensor
    targets: Tensor
    n_passages: int
    tokens: int
    squares: int

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device."""
        if device.type == "cpu":
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(one) for one in value]
            return value.pin_memory().to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return PackedBatch(*(moved(getattr(self, field.name)) for field in dataclasses.fields(self)))


def packed(
    questions: Sequence[Sequence[np.ndarray]], targets: Sequence[np.ndarray], config: ReaderConfig, passages_per_chunk: int
) -> PackedBatch:
    """A batch of tokenized questions.

    Args:
        questions: token ids of each question's passages.
        targets: token ids of each question's answer.
        config: of the reader.
        passages_per_chunk: passages at most that the encoder reads together.
    """
    counts = np.array([len(passages) for passages in questions])
    rows = [ids for passages in questions for ids in passages]
    lengths = np.array([len(ids) for ids in rows])
    longest_first = np.argsort(-lengths, kind="stable")
    chunks, starts, start = [], np.zeros(len(rows), np.int64), 0
    for part in _chunks(lengths[longest_first].tolist(), passages_per_chunk):
        members = longest_first[part.start : part.stop]
        width = min(-(-int(lengths[members[0]]) // LENGTH_STEP) * LENGTH_STEP, config.passage_length)
        ids = np.full((len(members), width), config.pad_token_id, np.int64)
        ids[np.arange(width) < lengths[members, None]] = np.concatenate([rows[row] for row in members])
        starts[members] = start + width * np.arange(len(members))
        chunks.append((torch.from_numpy(ids), torch.from_numpy(lengths[members]), bool(lengths[members[-1]] < width)))
        start += ids.size
    question = np.repeat(np.arange(len(questions)), counts)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.bincount(question, lengths, len(questions)).astype(np.int64)
    offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    mask = np.arange(-(-int(sizes.max()) // LENGTH_STEP) * LENGTH_STEP) < sizes[:, None]

    def by_question(values: np.ndarray) -> Tensor:
        filled = np.zeros(mask.shape, np.int64)
        filled[mask] = values
        return torch.from_numpy(filled)

    wanted = np.full((len(targets), max(map(len, targets))), -100, np.int64)
    for line, target in enumerate(targets):
        wanted[line, : len(target)] = target
    return PackedBatch(
        chunks=[ids for ids, _, _ in chunks],
        chunk_lengths=[part for _, part, _ in chunks],
        padded=[has_padding for _, _, has_padding in chunks],
        gather=by_question(np.repeat(starts, lengths) + offsets),
        mask=torch.from_numpy(mask.astype(np.int64)),
        passage=by_question(np.repeat(place, lengths)),
        key_positions=by_question(np.repeat(place * config.passage_length, lengths) + offsets),
        targets=torch.from_numpy(wanted),
        n_passages=int(counts.max()),
        tokens=int(sizes.sum()),
        squares=int((lengths**2).sum()),
    )


def _chunks(lengths: Sequence[int], passages_per_chunk: int) -> Iterator[range]:
    """Ranges over lengths in falling order: like lengths together, but no chunk so small that a launch outweighs its padding."""
    first = 0
    for i in range(1, len(lengths) + 1):
        full = i == len(lengths) or i - first == passages_per_chunk
        shorter = not full and -(-lengths[first] // LENGTH_STEP) > -(-lengths[i] // LENGTH_STEP) and i - first >= passages_per_chunk // 4
        if full or shorter:
            yield range(first, i)
            first = i
