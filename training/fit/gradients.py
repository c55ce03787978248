"""Loss and gradients of a step, launched eagerly or replayed as a CUDA graph.

In: a batch's token ids. Out: the loss, and the gradients in ``parameter.grad``. The caller clips them and steps the optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
