"""The training loop: from random weights or from a converted reader, resumable, within a budget of seconds or steps.

In: ``build/corpus/`` and options. Out, in the output directory:
    state.pt            the state for a resumed run, replaced atomically every ``save_every_s`` seconds
    training_log.jsonl  one line per evaluation: elapsed seconds, step, loss, learning rate, exact match
    config.json, model.safetensors, tokenizer.json: the averaged weights in fp16, in the format of ``export.checkpoint.files``
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pathlib
import platform
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from export.checkpoint.files import save_reader
from export.model.reader import Reader
from training.corpus.examples import ExampleSource, read_jsonl
from training.fit.batches import FROM_SCRATCH, UP_TRAINING, Batch, BatchFactory, BatchPlan, batch_plan, learning_rate, refinement_plan
from training.fit.evaluation import predict, score

# Loss and gradients of a step, launched eagerly or replayed as a CUDA graph.
#
# In: a batch's token ids. Out: the loss, and the gradients in ``parameter.grad``. The caller clips them and steps the optimizer.

Loss = Callable[[Tensor, Tensor], Tensor]

WARMUP_PASSES = 3  # allocates lazy workspaces (cuBLAS) before the capture


def eager_gradients(loss: Loss, parameters: Sequence[nn.Parameter]) -> Loss:
    """(input_ids, targets) -> loss; replaces the gradients."""

    def gradients(input_ids: Tensor, targets: Tensor) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        value = loss(input_ids, targets)
        value.backward()
        return value.detach()

    return gradients


@dataclasses.dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    targets: Tensor
    loss: Tensor


class GraphedGradients:
    """(input_ids, targets) -> loss; replaces the gradients. Captures one CUDA graph for each shape at its first use.

    The graphs share one memory pool: they run one after the other, and only the gradients (allocated outside the pool)
    and the loss (copied) are read after the next replay.
    """

    def __init__(self, loss: Loss, parameters: Sequence[nn.Parameter]):
        self._loss = loss
        self._parameters = parameters
        self._captures: dict[tuple[torch.Size, torch.Size], _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._eager: Loss | None = None

    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Copy the batch into the graph's tensors and replay it."""
        shapes = (input_ids.shape, targets.shape)
        if shapes not in self._captures and self._eager is None:
            try:
                self._captures[shapes] = self._capture(input_ids, targets)
            except RuntimeError as error:
                # Slower with the same result: a run with a time budget must not fail for lack of a graph.
                print(f"CUDA graph: wanted a capture for {shapes}, got {error}; continuing without graphs", flush=True)
                torch.cuda.synchronize()
                self._eager = eager_gradients(self._loss, self._parameters)
        if self._eager is not None:
            return self._eager(input_ids, targets)
        captured = self._captures[shapes]
        captured.input_ids.copy_(input_ids)
        captured.targets.copy_(targets)
        captured.graph.replay()
        return captured.loss.clone()

    def _pass(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        torch._foreach_zero_([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        value = self._loss(input_ids, targets)
        value.backward()
        return value.detach()

    def _capture(self, input_ids: Tensor, targets: Tensor) -> _Capture:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        input_ids, targets = input_ids.clone(), targets.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_PASSES):
                self._pass(input_ids, targets)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._pass(input_ids, targets)
        return _Capture(graph, input_ids, targets, loss)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Training options. Set either ``seconds`` or ``steps``.

    Attributes:
        corpus: Directory from ``python -m training corpus``.
        out: Output directory; a ``state.pt`` there is resumed.
        seconds: Budget in seconds of training with evaluations, over all resumptions.
        steps: Budget in steps, for tests and reproducible runs.
        seed: Of weights, batches and dropout.
        cuda_graphs: Replay forward and backward pass as one CUDA graph for each batch shape. Without it a
            reader this small is bound by kernel launches; torch.compile helps as well but takes over a minute.
        bfloat16: Autocast; the weights stay fp32.
        peak_learning_rate: Of all weights except the embedding.
        embedding_factor: Multiplies it for the embedding, whose entries are near 1 while others are near 0.07.
        up_training: Shorter warm-up, no one-passage stage: the weights come from a trained reader.
        refining: Short prompts, every country renamed in most examples; the weights come from a trained reader.
    """

    corpus: pathlib.Path
    out: pathlib.Path
    seconds: float | None = None
    steps: int | None = None
    seed: int = 0
    device: str = "cuda"
    num_workers: int = 3
    cuda_graphs: bool = True
    bfloat16: bool = True
    peak_learning_rate: float = 2e-3
    embedding_factor: float = 5.0
    weight_decay: float = 0.01
    dropout_rate: float = 0.05
    average_decay: float = 0.999
    warmup_steps: int = 300
    passages_per_batch: int = 640
    up_training: bool = False
    refining: bool = False
    evaluate_every_s: float = 60.0
    evaluation_questions: int = 256
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"budget: wanted either seconds or steps, got seconds={self.seconds} and steps={self.steps}")


class Trainer:
    """One reader being trained."""

    def __init__(self, reader: Reader, options: TrainOptions, history: list[dict[str, Any]] | None = None):
        """Prepare a run, or resume the one in ``options.out``.

        Args:
            reader: With the initial weights.
            options: Of this run.
            history: Notes of the earlier runs that trained ``reader``.
        """
        self.options = options
        self.history = history or []
        self.device = torch.device(options.device)
        self._hold = 0.05 if options.up_training or options.refining else 0.35
        self.stages = UP_TRAINING if options.up_training else FROM_SCRATCH
        self.tokenizer = Tokenizer.from_file(str(options.corpus / "tokenizer.json"))
        self.reader = reader.to(self.device).float().train().requires_grad_(True)
        self.reader.dropout_rate = options.dropout_rate
        self.averaged = copy.deepcopy(self.reader).eval().requires_grad_(False)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.reader.named_parameters():
            groups.setdefault(self._rate_factor(name), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
            lr=options.peak_learning_rate,
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.elapsed_before_s = 0.0
        self._started_s = time.monotonic()
        graphs = options.cuda_graphs and self.device.type == "cuda"
        make_gradients = GraphedGradients if graphs else eager_gradients
        self._gradients = make_gradients(self._loss, list(self.reader.parameters()))
        options.out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _rate_factor(self, name: str) -> float:
        # AdamW's updates have one size for all weights, whatever their magnitude.
        if "embedding" in name:
            return self.options.embedding_factor
        if name.endswith(".q.weight"):
            # T5 folds the 1/sqrt(d_kv) of the scores into q: its weights are smaller by that factor, and so are its updates.
            return self.reader.config.encoder.d_kv**-0.5
        return 1.0

    @property
    def state_file(self) -> pathlib.Path:
        """The file for resumption."""
        return self.options.out / "state.pt"

    def elapsed_s(self) -> float:
        """Seconds of training, with those before a resumption."""
        return self.elapsed_before_s + time.monotonic() - self._started_s

    def progress(self, step: int) -> float:
        """Used share of the budget, 0 to 1: of the steps at ``step``, or of the seconds until now."""
        if self.options.steps is not None:
            return step / self.options.steps
        assert self.options.seconds is not None
        return self.elapsed_s() / self.options.seconds

    def _loss(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The decoder's input is the targets shifted right after the start token, which is the pad token.
        shifted = functional.pad(targets, (1, 0))[:, :-1]
        # No cache of cast weights: a CUDA graph would replay the weights of its capture.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bfloat16, cache_enabled=False):
            logits = self.reader(input_ids, (input_ids != 0).long(), shifted)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=0)

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(ids.astype(np.int32))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True).long()

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One update of the weights and of their average; returns the loss on the device."""
        progress = self.progress(self.step)
        rate = learning_rate(self.options.peak_learning_rate, progress, self.step, self.options.warmup_steps, self._hold)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = self._gradients(self._tensor(batch.input_ids), self._tensor(batch.targets))
        nn.utils.clip_grad_norm_(self.reader.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.reader.parameters()), 1.0 - decay)
        return loss

    def _plan(self, step: int) -> BatchPlan:
        if self.options.refining:
            return refinement_plan(step, self.options.seed)
        return batch_plan(self.stages, self.progress(step), step, self.options.seed, self.options.passages_per_batch)

    def _finished(self) -> bool:
        return self.progress(self.step) >= 1.0

    def run(self, stop_after_steps: int | None = None) -> None:
        """Train until the budget is used, then save the averaged reader.

        Args:
            stop_after_steps: Stop after this many steps with the state but no checkpoint saved. For tests of resumption.
        """
        options = self.options
        source = ExampleSource(options.corpus, self.tokenizer, self.reader.config.passage_length)
        held_out = read_jsonl(options.corpus / "heldout.jsonl")
        held_out = random.Random(0).sample(held_out, min(options.evaluation_questions, len(held_out)))
        losses: list[torch.Tensor] = []
        evaluated_s = saved_s = self.elapsed_s()
        with BatchFactory(source, options.seed, options.num_workers) as factory:
            planned = first = self.step
            while not self._finished():
                while len(factory) < 2 * options.num_workers + 2:
                    factory.plan(self._plan(planned))
                    planned += 1
                losses.append(self.train_step(factory.next()[1]))
                if stop_after_steps is not None and self.step - first >= stop_after_steps:
                    self.save_state()
                    return
                now_s = self.elapsed_s()
                if now_s - evaluated_s >= options.evaluate_every_s:
                    self._log(losses, held_out)
                    losses, evaluated_s = [], now_s
                if now_s - saved_s >= options.save_every_s:
                    self.save_state()
                    self.save_checkpoint()
                    saved_s = self.elapsed_s()
        self._log(losses, held_out)
        self.save_state()
        self.save_checkpoint()

    def _log(self, losses: list[torch.Tensor], held_out: list[dict[str, Any]]) -> None:
        line = {
            "elapsed_s": round(self.elapsed_s(), 1),
            "step": self.step,
            "loss": round(float(torch.stack(losses).mean()), 4) if losses else None,
            "learning_rate": round(self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["factor"], 6),
        }
        for n_passages in (1, 10):
            answered = predict(self.averaged, self.tokenizer, held_out, n_passages)
            line[f"heldout_em_{n_passages}"] = round(score(answered).em, 2)
        line["questions"] = len(held_out)
        with (self.options.out / "training_log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(f"{self.options.out.name}: " + " ".join(f"{key}={value}" for key, value in line.items()), flush=True)

    def save_state(self) -> None:
        """Write ``state.pt`` atomically."""
        state = {
            "step": self.step,
            "elapsed_s": self.elapsed_s(),
            "reader": self.reader.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        partial = self.state_file.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self.state_file)

    def _resume(self) -> None:
        torch.manual_seed(self.options.seed)
        if not self.state_file.is_file():
            return
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.reader.load_state_dict(state["reader"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.step, self.elapsed_before_s = state["step"], state["elapsed_s"]
        self._started_s = time.monotonic()
        print(f"{self.options.out.name}: resumed at step {self.step}, {self.elapsed_before_s:.0f} s", flush=True)

    def save_checkpoint(self) -> None:
        """Write the averaged weights in fp16 with notes of their training."""
        options = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in dataclasses.asdict(self.options).items()}
        run = {
            "options": {key: value for key, value in options.items() if key not in ("corpus", "out")},
            "step": self.step,
            "elapsed_s": round(self.elapsed_s(), 1),
            "parameters": sum(parameter.numel() for parameter in self.reader.parameters()),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }
        save_reader(self.options.out, self.averaged, self.options.corpus / "tokenizer.json", notes={"runs": [*self.history, run]})
