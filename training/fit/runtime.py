"""What a training run runs on and says: processes that torchrun started (DDP, FSDP), and a log with losses, tokens/s and MFU.

In: torchrun's environment variables, and what each step did. Out: `Processes`, `Meter`, `Log`. Nothing here knows what is trained.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LOSSES = ("loss", "answers", "logits", "passages")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # bfloat16, dense, by the vendor's data sheets
TIMEOUT = datetime.timedelta(hours=3)  # the first process tokenizes while the others wait


class Processes:
    """This process among those of the run.

    Attributes:
        rank: 0 to world - 1.
        world: number of processes.
        device: of this process.
    """

    def __init__(self, device: str = "auto"):
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._started = "WORLD_SIZE" in os.environ and not dist.is_initialized()
        if self._started:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=TIMEOUT)

    def end(self) -> None:
        """Leave the group."""
        if self._started and dist.is_initialized():
            dist.destroy_process_group()

    def wrapped(self, module: nn.Module, *, shard: bool, bfloat16: bool) -> nn.Module:
        """The module with its gradients averaged over the processes, or with its weights sharded as well."""
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            if not dist.is_initialized():
                raise ValueError("shard: wanted processes that torchrun started, got one that was started alone")
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if bfloat16 else MixedPrecisionPolicy()
            fully_shard(module, mesh=init_device_mesh(self.device.type, (self.world,)), mp_policy=policy)
            return module
        if self.world == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @contextlib.contextmanager
    def gradients_stay_here(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Accumulate without communication, unless this is the last part of a step."""
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if hasattr(module, "set_requires_gradient_sync"):
            cast(Any, module).set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """The whole weights on every process, while they are read outside of the module's own pass."""
        if hasattr(module, "unshard"):
            cast(Any, module).unshard()
        try:
            yield
        finally:
            if hasattr(module, "reshard"):
                cast(Any, module).reshard()

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with sharded weights put together; a call of all processes."""
        return {name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight for name, weight in state.items()}

    def peak_tflops(self, *, bfloat16: bool) -> float | None:
        """Tensor cores' dense rate of this process's device; None if it is not known."""
        if self.device.type != "cuda" or not bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((rate for model, rate in PEAK_TFLOPS.items() if model in name), None)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do."""
        if self.rank and self.world > 1:
            dist.barrier()
        yield
        if not self.rank and self.world > 1:
            dist.barrier()

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def summed(self, values: Tensor) -> Tensor:
        """Over all processes, elementwise."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


class Meter:
    """Losses and speed between two lines of the log; pauses for evaluation do not count."""

    def __init__(self, processes: Processes, peak_tflops: float | None, seconds: float):
        self._processes, self._peak = processes, peak_tflops
        self.seconds = seconds  # of training, over all resumptions
        self._since = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._steps, self._window, self._tokens, self._flops = 0, 0.0, 0, 0.0
        self._losses = torch.zeros(4, device=self._processes.device)

    def add(self, losses: Tensor, tokens: int, flops: float) -> None:
        """Count a step of this process: its share of the losses float[4], passages' tokens, and floating-point operations."""
        self._steps += 1
        self._tokens += tokens
        self._flops += flops
        self._losses += losses

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        if self._processes.device.type == "cuda":
            torch.cuda.synchronize()
        passed = time.perf_counter() - self._since
        self._window += passed
        self.seconds += passed
        yield
        self._since = time.perf_counter()

    def line(self) -> dict[str, Any]:
        """Mean losses, and the speed over all processes, since the last line."""
        with self.paused():
            counts = [value / self._steps for value in self._losses.tolist()] + [float(self._tokens), self._flops]
            *losses, tokens, flops = self._processes.summed(
                torch.tensor(counts, dtype=torch.float64, device=self._processes.device)
            ).tolist()
            line: dict[str, Any] = {name: round(value, 5) for name, value in zip(LOSSES, losses, strict=True)}
            line["tokens_per_s"] = round(tokens / self._window, 1)
            rate = flops / self._window / self._processes.world / 1e12
            line["mfu"] = round(rate / self._peak, 4) if self._peak else None
            line["seconds"] = round(self.seconds, 1)
            self._reset()
        return line


class Log:
    """training_log.jsonl, the terminal and TensorBoard; silent on all processes but the first."""

    def __init__(self, directory: pathlib.Path, *, first: bool, tensorboard: bool):
        self._file, self._first = directory / "training_log.jsonl", first
        self._name = directory.name
        self._board = None
        if first and tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, line: dict[str, Any]) -> None:
        """One line of numbers."""
        if not self._first:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **line}) + "\n")
        self.say(f"step {step} " + " ".join(f"{name}={value}" for name, value in line.items() if value is not None))
        for name, value in line.items():
            if self._board is not None and value is not None:
                self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self._first:
            print(f"{self._name}: {text}", flush=True)

    def size(self) -> int:
        """Bytes written so far."""
        return self._file.stat().st_size if self._file.is_file() else 0

    def cut(self, size: int) -> None:
        """Drop the lines of steps that were lost with the interrupted process."""
        if self._first and self._file.is_file():
            os.truncate(self._file, min(size, self.size()))
