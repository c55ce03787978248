"""`python -m training uptrain`: trains a converted reader on FiD's data files until it answers, on one process or many, resumable.

In: a checkpoint and data files. Out, in `--out`: the reader (best EM on held-out questions, else the last) in the layout that `make export`
reads, training_log.jsonl, state.pt to resume from, TensorBoard's files. `torchrun` starts several processes; a step's questions are dealt
to them, so that losses and weights are the same up to rounding.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import json
import math
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.build import CheckpointOptions
from export.checkpoint.files import Checkpoint, load_checkpoint, load_reader, save_reader
from export.errors import UsageError
from export.manifest_writer import sha256_of_weights, write_atomically
from export.model.reader import Attention, Reader
from fido_client.metrics import exact_match
from training.fit.fid_data import BatchOrder, PackedBatch, PromptTokens, TokenizedData, packed, tokenized
from training.fit.packed import Objective, PackedReader, Pass, forward_flops
from training.fit.runtime import Log, Meter, Processes
from training.fit.uptrain_options import UptrainOptions, learning_rate, require_same_vocabulary, starting_reader

DEV_SHARE, MOST_DEV = 20, 1000
PREPARED = 3  # steps whose batches are packed ahead


class Uptraining:
    """One run: everything that a step, an evaluation and a resumption need."""

    def __init__(self, options: UptrainOptions, checkpoint: Checkpoint, teacher: Checkpoint | None, processes: Processes):
        self.options, self.checkpoint, self.processes = options, checkpoint, processes
        self.device = processes.device
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.deterministic:
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it has no gradient for the bias
        reader = starting_reader(checkpoint.reader, options)
        self.config = reader.config
        how = self._pass(reader)
        self.reader = reader.to(self.device).float().requires_grad_(True)
        self.student = PackedReader(self.reader, how)
        self.objective = Objective(self.student, options.losses)
        self.teacher = None
        if teacher is not None:
            require_same_vocabulary(checkpoint, teacher)
            taught = copy.deepcopy(teacher.reader).to(self.device, torch.bfloat16 if how.bfloat16 else torch.float32)
            self.teacher = PackedReader(taught.requires_grad_(False), how).eval()
        self.trained = processes.wrapped(self.objective, shard=options.shard, bfloat16=how.bfloat16)
        self.optimizer = self._optimizer()
        self.averaged = [weight.detach().clone() for weight in self.reader.parameters()] if options.ema else None
        self.step, self.best, self.since_best, self.seconds = 0, -1.0, 0, 0.0
        self.norm: Tensor | float = 0.0
        self.sources = [_source(checkpoint), None if teacher is None else _source(teacher)]
        self.log = Log(options.out, first=processes.rank == 0, tensorboard=options.tensorboard)
        self.words = PromptTokens(self.config, checkpoint.tokenizer_json)
        self._read_data()

    def _pass(self, reader: Reader) -> Pass:
        options, on_gpu = self.options, self.device.type == "cuda"
        compiles = options.compile if options.compile is not None else on_gpu and reader.config.encoder.d_model >= 512
        if options.attention == "flex" and not (on_gpu and compiles):
            raise UsageError("attention flex: wanted a GPU and --compile; without them it is slower than sdpa, or has no gradient")
        bfloat16 = on_gpu if options.bfloat16 is None else options.bfloat16
        return Pass(bfloat16, options.recompute, compiles, options.attention, options.dropout)

    def _read_data(self) -> None:
        options = self.options
        cache = options.cache or options.out / "tokens"

        def read(file: pathlib.Path) -> TokenizedData:
            return tokenized(
                file,
                self.config,
                self.checkpoint.tokenizer_json,
                n_passages=max(options.n_passages),
                target_length=options.target_length,
                cache=cache,
            )

        files = [file for file in (options.data, options.dev, options.test) if file is not None]
        with self.processes.first_alone():
            found = {file: read(file) for file in files}
        self.data = found[options.data]
        rows = np.arange(len(self.data))
        if options.dev is None:
            held_out = rows[:: max(DEV_SHARE, -(-len(rows) // MOST_DEV))]
            self.dev, self.dev_rows = self.data, held_out
            rows = np.setdiff1d(rows, held_out)
        else:
            self.dev = found[options.dev]
            self.dev_rows = np.arange(len(self.dev))[: options.dev_questions]
        self.test = found[options.test] if options.test else None
        if len(rows) < options.batch_questions:
            raise UsageError(f"{options.data}: wanted at least --batch-questions={options.batch_questions} examples, got {len(rows)}")
        self.order = BatchOrder(rows, options.batch_questions, options.n_passages, options.seed)

    def _optimizer(self) -> torch.optim.Optimizer:
        rates = {id(module.q.weight): self.options.query_rate for module in self.reader.modules() if isinstance(module, Attention)}
        rates |= {id(module.weight): self.options.embedding_rate for module in self.reader.modules() if isinstance(module, nn.Embedding)}
        groups: dict[float, list[nn.Parameter]] = {}
        for weight in self.reader.parameters():
            groups.setdefault(rates.get(id(weight), 1.0), []).append(weight)
        return torch.optim.AdamW(
            [{"params": weights, "factor": factor} for factor, weights in groups.items()],
            lr=self.options.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=self.options.weight_decay,
            fused=self.device.type == "cuda",
        )

    # ---- A step ----

    def _prepared(self, rows: np.ndarray, draws: np.ndarray, n_passages: int) -> tuple[list[PackedBatch], int]:
        """This process's share of a step, in parts, and the target tokens of the whole step."""
        options, processes = self.options, self.processes
        targets = [self.data.target(int(row), int(draw)) for row, draw in zip(rows, draws, strict=True)]
        mine = list(range(processes.rank, len(rows), processes.world))
        parts = []
        for first in range(0, len(mine), options.micro_questions):
            members = mine[first : first + options.micro_questions]
            questions = [self.data.example_prompts(int(rows[i]), n_passages) for i in members]
            parts.append(packed(questions, [targets[i] for i in members], self.config, options.passages_per_chunk))
        return parts, sum(map(len, targets))

    def train_step(self, parts: list[PackedBatch], target_tokens: int) -> Tensor:
        """One update of the weights; returns this process's share of the losses, float[4]: total, answers, logits, passages."""
        options = self.options
        torch.manual_seed((options.seed * 1_000_003 + self.step) * 4096 + self.processes.rank)  # of dropout: nothing to keep in a state
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step) * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.train()
        total = torch.zeros(4, device=self.device)
        for number, part in enumerate(parts):
            moved = part.to(self.device)
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(moved, shares=options.passages_weight > 0)
            with self.processes.gradients_stay_here(self.trained, last=number == len(parts) - 1):
                loss, each = self.trained(moved, taught, target_tokens, options.batch_questions)
                (loss * self.processes.world).backward()  # gradients are averaged over the processes, the losses are shares of one sum
            total += torch.cat([loss.detach()[None], each])
        self.norm = nn.utils.clip_grad_norm_(self.reader.parameters(), options.clip)
        self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            decay = min(options.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, list(self.reader.parameters()), 1.0 - decay)
        return total

    # ---- Evaluation ----

    @contextlib.contextmanager
    def _averages(self) -> Iterator[None]:
        """The average in place of the weights, if one is kept."""
        weights = list(self.reader.parameters()) if self.averaged is not None else []
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, average in zip(weights, self.averaged or [], strict=True):
                weight.copy_(average)
            try:
                yield
            finally:
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)

    def exact_match(self, reader: PackedReader, data: TokenizedData, rows: np.ndarray, *, alone: bool = False) -> float:
        """EM in percent, with the largest number of passages that is trained; over all processes or by this one alone."""
        options = self.options
        reader.eval()
        n_passages = max(options.n_passages)
        rows = rows[np.argsort(-data.example_tokens(n_passages)[rows], kind="stable")]
        mine = rows if alone else rows[self.processes.rank :: self.processes.world]
        right = 0
        for first in range(0, len(mine), options.micro_questions):
            members = [int(row) for row in mine[first : first + options.micro_questions]]
            questions = [data.example_prompts(row, n_passages) for row in members]
            batch = packed(questions, [data.target(row, 0) for row in members], self.config, options.passages_per_chunk)
            for row, tokens in zip(members, reader.answers(batch.to(self.device), options.target_length), strict=True):
                right += exact_match(self.words.text(tokens), data.gold[row])
        return 100.0 * (right if alone else self.processes.sum(right)) / len(rows)

    def evaluate(self) -> None:
        """Log EM on the held-out questions, and save the reader if it is the best so far."""
        started = time.perf_counter()
        with self._averages():
            with self.processes.gathered(self.trained):
                em = self.exact_match(self.student, self.dev, self.dev_rows)
            if em > self.best:
                self.best, self.since_best = em, 0
                self.save_reader()
            else:
                self.since_best += 1
        line: dict[str, Any] = {"dev_em": round(em, 2), "best_dev_em": round(self.best, 2), "questions": len(self.dev_rows)}
        if self.step == 0 and self.teacher is not None:
            line["teacher_dev_em"] = round(self.exact_match(self.teacher, self.dev, self.dev_rows), 2)
        self.log.write(self.step, line | {"evaluation_s": round(time.perf_counter() - started, 1)})

    def save_reader(self) -> None:
        """Write the current weights as a checkpoint, with the notes that end up in the manifest."""
        state = self.processes.whole(self.reader.state_dict())
        if self.processes.rank:
            return
        whole = Reader(self.config)
        whole.load_state_dict(state)
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = pathlib.Path(scratch, "tokenizer.json")
            tokenizer.write_text(self.checkpoint.tokenizer_json, encoding="utf-8")
            dtype = getattr(torch, self.options.save_dtype)
            save_reader(self.options.out, whole, tokenizer, dtype, {"uptrain": self.provenance()})

    def provenance(self) -> dict[str, Any]:
        """What the reader was made of."""
        options = self.options
        return {
            "checkpoint": self.sources[0],
            "teacher": self.sources[1],
            "data": self.data.facts,
            "dev": {**self.dev.facts, "questions": len(self.dev_rows)},
            "command": ["python", "-m", "training", *sys.argv[1:]],
            "options": options.fixed(),
            "step": self.step,
            "dev_em": round(self.best, 2),
            "processes": self.processes.world,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }

    # ---- A run ----

    def _state_file(self) -> pathlib.Path:
        name = f"state-{self.processes.rank}-of-{self.processes.world}.pt" if self.options.shard else "state.pt"
        return self.options.out / name

    def save_state(self) -> None:
        """Write what a resumption needs, atomically."""
        if self.processes.rank and not self.options.shard:
            return
        state = {
            "options": self.options.fixed() | {"data": self.data.facts["sha256"]},
            "step": self.step,
            "best": self.best,
            "since_best": self.since_best,
            "seconds": self.seconds,
            "log_bytes": self.log.size(),
            "reader": self.reader.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self._state_file().with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self._state_file())

    def resume(self) -> None:
        """Go on from the state in `--out`, if there is one.

        Raises:
            UsageError: if that run was another.
        """
        if not self._state_file().is_file():
            return
        state = torch.load(self._state_file(), map_location=self.device, weights_only=True)
        wanted = self.options.fixed() | {"data": self.data.facts["sha256"]}
        there = state["options"]
        other = [f"{name}: {there.get(name)} there, {value} here" for name, value in wanted.items() if there.get(name) != value]
        if other:
            raise UsageError(f"{self.options.out}: holds another run ({'; '.join(other)}); give the same options, or another --out")
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged = [average.to(self.device) for average in state["averaged"]]
        self.step, self.best, self.since_best, self.seconds = state["step"], state["best"], state["since_best"], state["seconds"]
        self.log.cut(state["log_bytes"])
        self.log.say(f"resumed at step {self.step}")

    def flops(self, part: PackedBatch) -> float:
        """Operations of a step on a part of its batch: forward, twice that backward, and the teacher's forward."""
        taught = forward_flops(self.teacher.reader.config, part) if self.teacher is not None else 0.0
        return 3 * forward_flops(self.config, part) + taught

    def _stops(self) -> bool:
        return self.options.patience is not None and self.since_best >= self.options.patience

    def batches(self) -> Iterator[tuple[list[PackedBatch], int]]:
        """The arguments of `train_step` for every step that is left, prepared ahead by other threads."""
        ahead: collections.deque[concurrent.futures.Future[tuple[list[PackedBatch], int]]] = collections.deque()
        planned = self.step
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            while planned < self.options.steps or ahead:
                while len(ahead) < PREPARED and planned < self.options.steps:
                    ahead.append(pool.submit(self._prepared, *self.order.batch(self.data, planned)))
                    planned += 1
                yield ahead.popleft().result()

    def run(self, stop_after: int | None = None) -> None:
        """Train to the last step, or until EM no longer rises.

        Args:
            stop_after: step at which to stop as if interrupted, right after the state was saved.
        """
        options = self.options
        if self.step == 0:
            self.evaluate()
        bfloat16 = self.student.options.bfloat16
        meter = Meter(self.processes, options.peak_tflops or self.processes.peak_tflops(bfloat16=bfloat16), self.seconds)
        if self._stops():
            return
        for parts, target_tokens in self.batches():
            meter.add(self.train_step(parts, target_tokens), sum(part.tokens for part in parts), sum(map(self.flops, parts)))
            last = self.step == options.steps
            if last or self.step % options.log_every == 0:
                line = meter.line()
                self.seconds = meter.seconds
                line |= {"gradient_norm": float(self.norm), "learning_rate": learning_rate(options, self.step - 1)}
                self.log.write(self.step, line)
                if not math.isfinite(line["loss"]):
                    raise UsageError(f"step {self.step}: the loss is {line['loss']}; resume with a lower --learning-rate")
            evaluates = last or self.step % options.evaluate_every == 0
            if evaluates or self.step % options.save_every == 0 or self.step == stop_after:
                with meter.paused():
                    self.seconds = meter.seconds
                    if evaluates:
                        self.evaluate()
                    self.save_state()
            if self.step == stop_after or self._stops():
                return

    def finish(self) -> dict[str, Any]:
        """Answer the test questions by the saved reader; returns what the run gave, which the reader's notes then hold too."""
        if self.processes.rank:
            return {}
        result: dict[str, Any] = {"dev_em": round(self.best, 2)}
        if self.test is not None:
            rows = np.arange(len(self.test))
            saved = PackedReader(load_reader(self.options.out).to(self.device).float(), self.student.options)
            result["test_em"] = round(self.exact_match(saved, self.test, rows, alone=True), 2)
            if self.teacher is not None:
                result["teacher_test_em"] = round(self.exact_match(self.teacher, self.test, rows, alone=True), 2)
            path = self.options.out / "config.json"
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["notes"]["uptrain"] |= {"test": {**self.test.facts, "questions": len(rows)}, **result}
            write_atomically(path, (json.dumps(fields, indent=2) + "\n").encode())
        self.log.write(self.step, result)
        return result


def uptrain(options: UptrainOptions, how: CheckpointOptions | None = None, stop_after: int | None = None) -> dict[str, Any]:
    """One run from start to end, or the rest of the one in `options.out`.

    Args:
        options: of the run.
        how: options of `load_checkpoint` for the checkpoint and its teacher.
        stop_after: as in `Uptraining.run`.

    Returns:
        dev_em and, with test questions, test_em and teacher_test_em; empty on all processes but the first.

    Raises:
        UserError: if a checkpoint, a data file or an option does not fit.
    """
    processes = Processes(options.device)
    try:
        checkpoint = load_checkpoint(options.checkpoint, **(how or {}))
        teacher = None
        if options.losses.distils:
            teacher = load_checkpoint(options.teacher, **(how or {})) if options.teacher else checkpoint
        options.out.mkdir(parents=True, exist_ok=True)
        run = Uptraining(options, checkpoint, teacher, processes)
        run.resume()
        run.run(stop_after)
        return run.finish() if stop_after is None else {}
    finally:
        processes.end()


def _source(checkpoint: Checkpoint) -> dict[str, str]:
    return {"source": pathlib.Path(checkpoint.source).name, "weights_sha256": sha256_of_weights(checkpoint.reader)}
