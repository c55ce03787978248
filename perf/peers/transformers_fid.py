"""`python -m perf.peers.transformers_fid`: Hugging Face transformers' T5 run as a FiD reader, the common way to run one today.

In: a FiD checkpoint and a workload of perf/served/workload.py (for the same seed, the requests that the served models get); or the name of
a published size, with random weights and random token ids. Out: questions per second and latency of `generate`, eager and compiled, one
batch of questions at a time.

Times run from token ids on the host to token ids on the host. They exclude tokenization, the network, and a first pass over all requests,
in which torch.compile compiles. FiDO is not measured: transformers has no such model.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CompileConfig, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from export.checkpoint.config import ConfigError, ReaderConfig, reader_preset
from export.checkpoint.files import Checkpoint, load_checkpoint
from export.checkpoint.hugging_face import t5_faults, t5_from_reader
from export.checkpoint.weights import CheckpointError
from export.graphs.cpu import engine_sizes
from export.manifest_writer import prompt_of
from export.model.reader import Reader
from fido_client.data.examples import ExampleError, read_examples
from fido_client.metrics import percentile
from perf.bounds.machine import describe
from perf.bounds.statistics import publish, spread
from perf.served.workload import (
    REAL,
    WORKLOADS,
    Request,
    RequestMaker,
    WorkloadError,
    WorkloadSpec,
    random_token_ids,
    requests_from,
    uniform,
)
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, ManifestError
from serving.pipeline.prompt import PromptEncoder, PromptError

# transformers' T5 as a FiD reader: our reader -> transformers' model with the same weights -> greedy answers of a batch of questions.
#
# The encoder reads each passage by itself. The hidden states of a question's passages are concatenated, and transformers' `generate`
# decodes from them. FiDO cannot run so: transformers' T5 has neither layer-sparse cross-attention nor multi-query attention.

Passages: TypeAlias = tuple[Tensor, Tensor]  # input_ids and attention_mask (1 = attend), each int64[n_passages, passage_length]


class PeerError(ValueError):
    """A reader or a workload that the peer cannot run."""


def hugging_face_fid(reader: Reader) -> T5ForConditionalGeneration:
    """The same reader as a transformers model, fp32 in eval mode; it shares the reader's memory.

    Raises:
        PeerError: transformers' T5 cannot represent the reader; the message names every reason.
    """
    require_t5(reader.config)
    return t5_from_reader(reader)


def require_t5(config: ReaderConfig) -> None:
    """Raise PeerError unless transformers' T5 can represent the reader and `generate` can run it."""
    faults = t5_faults(config)
    encoder, decoder = config.encoder, config.decoder
    if decoder.num_layers > encoder.num_layers:  # `generate` sizes its cache by the encoder's layers
        faults.append(f"decoder.num_layers: wanted at most the encoder's {encoder.num_layers}, got {decoder.num_layers}")
    if faults:
        which = "FiDO" if config.kind == "fido" else "this FiD reader"
        raise PeerError(f"transformers' T5 cannot run {which}; measure a plain FiD reader instead:\n  " + "\n  ".join(faults))


def cast_as_from_pretrained(model: T5ForConditionalGeneration, dtype: torch.dtype, device: str) -> T5ForConditionalGeneration:
    """Cast the model in place as `from_pretrained(dtype=...)` does: in fp16 transformers keeps T5's `wo` in fp32."""
    fp32_modules = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, weight in model.named_parameters():  # yields a tied weight once, so it stays tied
        weight.data = weight.data.to(device, torch.float32 if fp32_modules & set(name.split(".")) else dtype)
    return model


class FusionPeer:
    """Greedy answers of a batch of questions by transformers' `generate`.

    Args:
        model: from `hugging_face_fid`, on any device, in any precision.
        compiled: compile the encoder, and let `generate` compile the decoder step with its static cache. Every new batch shape compiles
            again.
    """

    def __init__(self, model: T5ForConditionalGeneration, *, compiled: bool = False):
        self._model, self._encoder, self.compiled = model, model.encoder, compiled
        self._options: dict[str, Any] = {}
        if compiled:
            self._encoder = torch.compile(model.encoder)
            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # without it `generate` compiles on accelerators only
            self._options = {"cache_implementation": "static", "compile_config": compile_config}

    @torch.inference_mode()
    def answer(self, questions: Sequence[Passages], max_new_tokens: int, min_new_tokens: int = 0) -> list[list[int]]:
        """Token ids of each question's answer, with the end token; equal limits force that length on every answer.

        A batch runs until its last answer ends. transformers forbids the end token as token number `min_new_tokens`; `Reader.generate`
        allows it there.

        Args:
            questions: on the host; passage counts and lengths may differ.
            max_new_tokens: maximum number of tokens.
            min_new_tokens: minimum number of tokens before the end token.
        """
        hidden, mask = self.encode(questions)
        generated = self._model.generate(
            encoder_outputs=BaseModelOutput(hidden),
            attention_mask=mask,
            num_beams=1,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            **self._options,
        )
        eos = self._model.config.eos_token_id
        rows = generated[:, 1:].tolist()  # without the start token; shorter answers are followed by padding
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    def encode(self, questions: Sequence[Passages]) -> tuple[Tensor, Tensor]:
        """Hidden states float[batch, encoder_sequence_length, d_model] and their mask, padded to the longest question."""
        device = self._model.device
        counts = [len(ids) for ids, _ in questions]
        length = max(ids.shape[1] for ids, _ in questions)
        ids = torch.full((sum(counts), length), self._model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        start = 0
        for question_ids, question_mask in questions:
            n, width = question_ids.shape
            ids[start : start + n, :width], mask[start : start + n, :width] = question_ids, question_mask
            start += n
        ids, mask = ids.to(device), mask.to(device)
        hidden = self._encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        # [passages of all questions, length, ...] -> [batch, max_passages * length, ...]; padding inside a passage stays there, masked
        fused_hidden = [one.flatten(0, 1) for one in hidden.split(counts)]
        fused_mask = [one.flatten() for one in mask.split(counts)]
        pad = nn.utils.rnn.pad_sequence
        return pad(fused_hidden, batch_first=True), pad(fused_mask, batch_first=True)


EXCLUDES = "tokenization, network"
PRECISIONS = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Question:
    """One tokenized question; `new_tokens` forces the answer's length, None leaves it to the reader."""

    passages: Passages
    new_tokens: int | None

    def lengths(self) -> list[int]:
        """Valid tokens of each passage."""
        return [int(length) for length in self.passages[1].sum(1)]


def tokenized(checkpoint: Checkpoint, requests_of: Callable[[Tokenizer, Manifest], Iterable[Request]]) -> list[Question]:
    """The requests, encoded with the reader's prompt and tokenizer."""
    config = checkpoint.reader.config
    prompt = prompt_of(config, checkpoint.tokenizer_json)
    special = (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id)
    manifest = Manifest(config.kind, "onnxruntime", "float32", engine_sizes(config), prompt, *special, {}, "", {})
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    encoder = PromptEncoder(tokenizer, manifest)
    questions = []
    for request in requests_of(tokenizer, manifest):
        encoded = encoder.encode(request.question, request.passages, request.titles)
        # the server pads its rows further for the batcher; the peer does not need that
        longest = int(encoded.attention_mask.sum(1).max())
        ids, mask = (torch.from_numpy(array[:, :longest]).long() for array in (encoded.input_ids, encoded.attention_mask))
        questions.append(Question((ids, mask), request.new_tokens))
    return questions


def random_questions(spec: WorkloadSpec, count: int, seed: int, vocab_size: int) -> list[Question]:
    """Random token ids of the workload's lengths; the same ones for the same seed."""
    drawn = random_token_ids(spec, count, seed, vocab_size)
    return [Question((torch.from_numpy(ids).long(), torch.from_numpy(mask).long()), new_tokens) for ids, mask, new_tokens in drawn]


def batch_seconds(peer: FusionPeer, questions: Sequence[Question], batch: int) -> list[float]:
    """Seconds of each batch, run one after the other. A batch runs as long as its longest answer."""
    seconds = []
    for start in range(0, len(questions), batch):
        group = questions[start : start + batch]
        forced = [question.new_tokens for question in group if question.new_tokens is not None]
        bounds = (max(forced), max(forced)) if forced else (Limits().default_max_new_tokens, 0)
        passages = [question.passages for question in group]
        started = time.perf_counter()
        peer.answer(passages, *bounds)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(
    peers: dict[str, FusionPeer], questions: Sequence[Question], batches: Sequence[int], rounds: int, compiled: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row for each peer and batch size; every round runs all of them in turn, so that drift of the machine hits all alike.

    Args:
        peers: by name.
        questions: divisible by every batch size.
        batches: questions answered together.
        rounds: passes over all questions that count; one more comes first and does not.
        compiled: the batch sizes for which compiled peers are measured; None: all.

    Returns:
        name, batch, questions_per_s and p50_ms (of a batch, for which each of its questions waits). Compiled peers add compile_s: the time
        of the first pass beyond the median of the later ones. A row whose peer failed has `error` instead.
    """
    rows = [(name, batch) for batch in batches for name in peers if compiled is None or batch in compiled or not peers[name].compiled]
    passes: dict[tuple[str, int], list[list[float]]] = {row: [] for row in rows}
    errors: dict[tuple[str, int], str] = {}
    for _ in range(rounds + 1):
        for name, batch in [row for row in passes if row not in errors]:
            try:
                passes[name, batch].append(batch_seconds(peers[name], questions, batch))
            except Exception as error:  # by transformers, a compiler, or for lack of GPU memory: the other rows still count
                errors[name, batch] = one_line(error)
    found: list[dict[str, Any]] = []
    for (name, batch), taken in passes.items():
        numbers: dict[str, Any] = {"name": name, "batch": batch}
        if (name, batch) in errors:
            found.append({**numbers, "error": errors[name, batch]})
            continue
        first, *counted = taken
        walls = [sum(seconds) for seconds in counted]
        numbers["questions_per_s"] = spread([len(questions) / wall for wall in walls])
        numbers["p50_ms"] = spread([percentile(seconds, 50) * 1e3 for seconds in counted])
        if peers[name].compiled:
            numbers["compile_s"] = round(max(0.0, sum(first) - statistics.median(walls)), 1)
        found.append(numbers)
    return found


def one_line(error: Exception) -> str:
    """The error's type and first line; compilers write pages."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:300]


def peers_of(reader: Reader, device: str, *, compiled: bool) -> dict[str, FusionPeer]:
    """Every variant by name; variants of one precision share their weights."""
    peers = {}
    for dtype in PRECISIONS[device]:
        model = cast_as_from_pretrained(hugging_face_fid(reader), dtype, device)
        for way in ("eager", "compiled") if compiled else ("eager",):
            name = f"transformers generate, {way}, {str(dtype).removeprefix('torch.')}"
            peers[name] = FusionPeer(model, compiled=way == "compiled")
    return peers


def extent(values: Iterable[int]) -> int | str:
    """The value if there is only one (40), else the range ("1..40")."""
    found = sorted(values)
    return found[0] if found[0] == found[-1] else f"{found[0]}..{found[-1]}"


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the workload's specification under `spec`."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.peers.transformers_fid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fid", help="checkpoint of a FiD reader, in any layout that the export reads")
    source.add_argument("--preset", help="a published size, such as base, with random weights and random token ids")
    parser.add_argument("--workload", choices=[*WORKLOADS, REAL], default="paper")
    parser.add_argument("--data", type=Path, help="for real: a file in FiD's format")
    for field in dataclasses.fields(WorkloadSpec):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=uniform, metavar="N[..N]", help="replaces the workload's own")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="questions answered together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=list(PRECISIONS), default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also measure torch.compile (default: on cuda only)")
    parser.add_argument("--compiled-batches", type=int, nargs="+", help="batch sizes to compile for; each takes half a minute or more")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.workload == REAL and (arguments.data is None or arguments.fid is None):
        parser.error("real: name the data file with --data, and a reader with --fid")
    if min(arguments.requests, arguments.rounds, *arguments.batches) < 1:
        parser.error("--requests, --rounds and --batches: wanted at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    overrides = {f.name: value for f in dataclasses.fields(WorkloadSpec) if (value := getattr(arguments, f.name))}
    arguments.spec = None if arguments.workload == REAL else dataclasses.replace(WORKLOADS[arguments.workload], **overrides)
    arguments.compile = arguments.device == "cuda" if arguments.compile is None else arguments.compile
    return arguments


def reader_and_questions(arguments: argparse.Namespace) -> tuple[Reader, list[Question]]:
    """The reader and the questions that the command line names, checked before anything runs."""
    count, seed, spec = arguments.requests, arguments.seed, arguments.spec
    if arguments.preset:
        config = reader_preset(arguments.preset, fido=False)
        require_t5(config)
        reader = Reader(config).eval()
        reader.reset_parameters(seed)
        questions = random_questions(spec, count, seed, config.vocab_size)
    else:
        checkpoint = load_checkpoint(arguments.fid)
        reader = checkpoint.reader
        require_t5(reader.config)
        if spec is None:
            questions = tokenized(checkpoint, lambda *_: requests_from(read_examples(arguments.data, limit=count)))
        else:
            questions = tokenized(checkpoint, lambda *reads: RequestMaker(*reads).make(spec, count, seed))
    for batch in arguments.batches:
        if not questions or len(questions) % batch:
            raise PeerError(f"--requests: wanted a multiple of every batch, so that all batches are full, got {len(questions)} and {batch}")
    return reader, questions


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the result; return the exit code."""
    arguments = arguments_of(argv)
    try:
        reader, questions = reader_and_questions(arguments)
    except (CheckpointError, ConfigError, ExampleError, ManifestError, PeerError, PromptError, WorkloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    peers = peers_of(reader, arguments.device, compiled=arguments.compile)
    forced = [question.new_tokens for question in questions if question.new_tokens is not None]
    common = {
        "new_tokens": extent(forced) if forced else f"at most {Limits().default_max_new_tokens}",
        "passages": extent(len(question.lengths()) for question in questions),
        "passage_tokens": extent(length for question in questions for length in question.lengths()),
        "excludes": EXCLUDES,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    measured = measure(peers, questions, arguments.batches, arguments.rounds, arguments.compiled_batches)
    settings = {
        "reader": arguments.fid or f"{arguments.preset}, random weights",
        "workload": arguments.workload,
        "requests": len(questions),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "weights": "as from_pretrained(dtype=...) has them: in float16, transformers keeps the feed-forward's wo in float32",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "not_counted": "model load, and one pass of every variant and batch over all requests",
        "fido": "not measured: transformers has no layer-sparse cross-attention and no multi-query attention for T5",
        "machine": describe(),
    }
    publish(
        {"peers": [{"name": row.pop("name"), "reader": "fid", **row, **common} for row in measured], "settings": settings}, arguments.out
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
