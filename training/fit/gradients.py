"""Loss and gradients of a step, launched kernel by kernel or replayed as a CUDA graph.

Either way the gradients land in ``parameter.grad``; clipping and the optimizer follow outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

WARMUP_PASSES = 3  # lets lazily made workspaces (cuBLAS) come to be outside the capture


def eager_gradients(loss: Loss, parameters: Sequence[nn.Parameter]) -> Loss:
    """(input_ids, targets) -> loss, gradients set anew."""

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
    """(input_ids, targets) -> loss, gradients set anew; one graph for each shape, captured when it first comes.

    The graphs share one memory pool: they are replayed one after the other, and nothing of one is read after the next
    but the gradients (allocated outside) and the loss (copied out).
    """

    def __init__(self, loss: Loss, parameters: Sequence[nn.Parameter]):
        self._loss = loss
        self._parameters = parameters
        self._captures: dict[tuple[torch.Size, torch.Size], _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._eager: Loss | None = None

    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Copies the batch into the graph's own tensors and replays it."""
        shapes = (input_ids.shape, targets.shape)
        if shapes not in self._captures and self._eager is None:
            try:
                self._captures[shapes] = self._capture(input_ids, targets)
            except RuntimeError as error:
                # Slower, but the same result: a run under a budget must not end for want of a graph.
                print(f"CUDA graph: wanted a capture for {shapes}, got {error}; going on without graphs", flush=True)
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
