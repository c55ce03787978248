"""What can be said to `python -m training uptrain`: the options, the learning rate's schedule, the reader that training starts from.

In: the command line. Out: `UptrainOptions`, and a converted and grown `Reader`. Needs no process group and no data.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import types
import typing
from typing import Any

from export.checkpoint.files import Checkpoint
from export.checkpoint.weights import fido_from_fid, with_larger_decoder
from export.errors import UsageError
from export.model.reader import Reader
from training.fit.packed import ATTENTIONS, LossWeights

SCHEDULES = ("cosine", "constant")
DTYPES = ("float32", "float16", "bfloat16")
# Options that a resumed run may change, because no weight depends on them.
FREE = (
    "out",
    "cache",
    "dev",
    "test",
    "dev_questions",
    "evaluate_every",
    "log_every",
    "save_every",
    "patience",
    "tensorboard",
    "peak_tflops",
)


def _option(default: Any, what: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": what, **more})


@dataclasses.dataclass(frozen=True)
class UptrainOptions:
    """Options of a run; the help of each is its description."""

    checkpoint: str
    data: pathlib.Path
    out: pathlib.Path
    # the reader
    period: int | None = _option(None, "cross-attention in every PERIOD-th decoder layer (default: the checkpoint's own)")
    num_kv_heads: int | None = _option(None, "key/value heads of the decoder: 1 is multi-query, a divisor of its heads grouped-query")
    decoder_layers: int | None = _option(None, "a deeper decoder; growth is function-preserving")
    decoder_d_ff: int | None = _option(None, "a decoder with a wider feed-forward layer")
    decoder_d_model: int | None = _option(None, "a wider decoder")
    decoder_heads: int | None = _option(None, "a decoder with more heads")
    # the losses
    teacher: str | None = _option(None, "checkpoint to distil from (default: CHECKPOINT itself, as it was)")
    answers_weight: float = _option(1.0, "weight of the cross-entropy of the answers")
    logits_weight: float = _option(1.0, "weight of the divergence from the teacher's next-token distributions")
    passages_weight: float = _option(0.1, "weight of the divergence from the teacher's cross-attention mass of the passages")
    temperature: float = _option(1.0, "of the next-token distributions that are compared")
    # the data
    n_passages: tuple[int, ...] = _option((40,), "passages of each question; of several numbers one is drawn each step")
    target_length: int = _option(32, "tokens kept of an answer, and generated when evaluating")
    dev: pathlib.Path | None = _option(None, "held-out questions in FiD's format (default: every 20th of DATA, 1,000 at most)")  # noqa: RUF009
    dev_questions: int | None = _option(None, "the first questions of --dev alone")
    test: pathlib.Path | None = _option(None, "held-out questions that are answered once, by the finished reader")  # noqa: RUF009
    cache: pathlib.Path | None = _option(None, "directory of tokenized data (default: OUT/tokens)")  # noqa: RUF009
    # the steps
    steps: int = _option(10_000, "optimizer steps")
    batch_questions: int = _option(64, "questions of a step, over all processes")
    micro_questions: int = _option(4, "questions that one process reads together; the rest of its share is accumulated")
    passages_per_chunk: int = _option(128, "passages that the encoder reads together")
    learning_rate: float = _option(1e-4, "at its peak")
    schedule: str = _option("cosine", "after the warm-up", choices=SCHEDULES)
    warmup_steps: int = _option(200, "of linear warm-up")
    final_rate: float = _option(0.02, "share of the peak that the cosine ends at")
    weight_decay: float = _option(0.01, "AdamW's")
    embedding_rate: float = _option(1.0, "factor of the embeddings' learning rate")
    query_rate: float = _option(1.0, "factor of the query projections' learning rate")
    clip: float = _option(1.0, "largest norm of a step's gradient")
    dropout: float = _option(0.0, "rate on every residual branch")
    ema: float = _option(0.0, "decay of the average of the weights that is evaluated and saved; 0: none")
    seed: int = _option(0, "of the order of the data, new weights and dropout")
    # evaluation and files
    evaluate_every: int = _option(500, "steps between evaluations")
    log_every: int = _option(50, "steps between lines of the log")
    save_every: int = _option(500, "steps between states to resume from")
    patience: int | None = _option(None, "stop after so many evaluations without a better EM")
    save_dtype: str = _option("float32", "of the weights that are saved", choices=DTYPES)
    tensorboard: bool = _option(True, "write TensorBoard's files where it is installed")
    # the machine
    device: str = _option("auto", "cuda, cpu or auto")
    threads: int | None = _option(None, "of a process on a CPU (default: torch's)")
    bfloat16: bool | None = _option(None, "autocast (default: on a GPU)")
    recompute: bool = _option(False, "gradient checkpointing of each chunk of passages")
    compile: bool | None = _option(None, "torch.compile of the layers (default: on a GPU, for readers of 512 features and more)")
    attention: str = _option("sdpa", "of the encoder; flex is compiled and needs a GPU", choices=ATTENTIONS)
    shard: bool = _option(False, "shard weights, gradients and optimizer over the processes (FSDP)")
    deterministic: bool = _option(False, "slower kernels that give the same bits every time on a GPU too")
    peak_tflops: float | None = _option(None, "of the device in the precision used, for MFU (default: known for A100, H100 and H200)")

    def __post_init__(self) -> None:
        faults = []
        for name in ("steps", "batch_questions", "micro_questions", "passages_per_chunk", "evaluate_every", "log_every", "save_every"):
            if getattr(self, name) < 1:
                faults.append(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if not self.n_passages or min(self.n_passages) < 1:
            faults.append(f"n_passages: wanted numbers from 1, got {self.n_passages}")
        if self.target_length < 2:
            faults.append(f"target_length: wanted at least 2, got {self.target_length}")
        losses = (self.answers_weight, self.logits_weight, self.passages_weight)
        if min(losses) < 0 or not any(losses):
            faults.append(f"weights of the losses: wanted one above 0 and none below, got {losses}")
        for name, most in (("dropout", 1.0), ("ema", 1.0)):
            if not 0 <= getattr(self, name) < most:
                faults.append(f"{name}: wanted 0 up to but not including {most}, got {getattr(self, name)}")
        if faults:
            raise UsageError("; ".join(faults))

    @property
    def losses(self) -> LossWeights:
        """The weights of the losses."""
        return LossWeights(self.answers_weight, self.logits_weight, self.passages_weight, self.temperature)

    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must share, as JSON values."""
        return {name: value for name, value in self.as_json().items() if name not in FREE}

    def as_json(self) -> dict[str, Any]:
        """All options as JSON values."""

        def value(found: Any) -> Any:
            return str(found) if isinstance(found, pathlib.Path) else list(found) if isinstance(found, tuple) else found

        return {field.name: value(getattr(self, field.name)) for field in dataclasses.fields(self)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `UptrainOptions`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="T5, FiD or FiDO: a directory of any known layout, or a hub name")
    parser.add_argument("data", metavar="DATA", type=pathlib.Path, help="FiD's data file: JSON or JSON lines")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the reader, its log and its state; a run there is resumed")
    hints = typing.get_type_hints(UptrainOptions)
    for field in dataclasses.fields(UptrainOptions):
        if field.name in ("checkpoint", "data", "out"):
            continue
        given: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        if field.default not in (None, False, True) and "default" not in given["help"]:
            given["help"] += f" (default: {' '.join(map(str, field.default)) if isinstance(field.default, tuple) else field.default})"
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # T | None
            kind = next(one for one in typing.get_args(kind) if one is not type(None))
        if kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            given.update(nargs="+", type=int)
        else:
            given.update(type=kind, **({"choices": field.metadata["choices"]} if "choices" in field.metadata else {}))
        parser.add_argument(f"--{field.name.replace('_', '-')}", **given)


def options_of(arguments: argparse.Namespace) -> UptrainOptions:
    """The options on a parsed command line."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(UptrainOptions)}
    return UptrainOptions(**{**given, "n_passages": tuple(given["n_passages"])})


def learning_rate(options: UptrainOptions, step: int) -> float:
    """The rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_steps))
    if options.schedule == "constant" or step < options.warmup_steps:
        return options.learning_rate * warm
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.learning_rate * (options.final_rate + (1 - options.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def starting_reader(reader: Reader, options: UptrainOptions) -> Reader:
    """The reader that training starts from: the checkpoint's with a larger decoder, sparser cross-attention and fewer key/value heads.

    Raises:
        ConfigError: if the sizes do not fit the checkpoint's.
    """
    old = reader.config.decoder
    period = options.period or reader.config.encoder_decoder_attention_period
    sizes = {
        "num_layers": options.decoder_layers,
        "d_ff": options.decoder_d_ff,
        "d_model": options.decoder_d_model,
        "num_heads": options.decoder_heads,
    }
    grown = {name: size for name, size in sizes.items() if size is not None and size != getattr(old, name)}
    if grown:
        larger = dataclasses.replace(old, **grown)
        if old.num_kv_heads == old.num_heads:
            larger = dataclasses.replace(larger, num_kv_heads=larger.num_heads)
        reader = with_larger_decoder(reader, larger, period, options.seed)
    heads = options.num_kv_heads or reader.config.decoder.num_kv_heads
    return fido_from_fid(reader, period, heads)


def require_same_vocabulary(checkpoint: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose logits mean other tokens, with a UsageError."""
    if checkpoint.tokenizer_json != teacher.tokenizer_json or checkpoint.reader.config.vocab_size != teacher.reader.config.vocab_size:
        raise UsageError(
            f"teacher {teacher.source}: wanted the tokenizer of {checkpoint.source}, got another; its logits mean other tokens"
        )
