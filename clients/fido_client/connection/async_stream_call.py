"""AsyncStreamCall: StreamCall for asyncio. It reads a stream to its end in a task of its own whether or not its consumer stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
from tritonclient.grpc import InferResult
from tritonclient.grpc import aio as triton_aio
from tritonclient.utils import InferenceServerException

from ..request import infer_inputs_from_tensors
from .endpoint import grpc_timeout_s
from .stop import BACKSTOP_S, CLOSE_TIMEOUT_S, STOP_TIMEOUT_S, new_stream_id, stop_id, stop_tensors


class StreamTasks:
    """The tasks of one client's streams. asyncio keeps no reference to a task, so this does."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.calls: set[AsyncStreamCall] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Stop all streams and wait for their end, CLOSE_TIMEOUT_S at most; what is left then is cancelled."""
        for call in list(self.calls):
            call.leave()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)
        for task in list(self._tasks):
            task.cancel()


class AsyncStreamCall:
    """One stream in flight. `leave` it where its responses are no longer wanted."""

    def __init__(
        self, client: triton_aio.InferenceServerClient, tasks: StreamTasks, model: str, inputs: Any, deadline_s: float, start_s: float
    ) -> None:
        self._client, self._tasks, self._model, self._id = client, tasks, model, new_stream_id()
        self._end_s = start_s + deadline_s
        self._arrivals: asyncio.Queue[Any] = asyncio.Queue()
        self._over = self._left = False
        request = {"model_name": model, "inputs": inputs, "request_id": self._id}
        self._responses = client.stream_infer(_only(request), stream_timeout=grpc_timeout_s(deadline_s + BACKSTOP_S))
        tasks.calls.add(self)
        tasks.start(self._read_out()).add_done_callback(lambda task: tasks.calls.discard(self))

    async def next_response(self) -> tuple[InferResult | None, InferenceServerException | None] | None:
        """The next result or error; None at the end of the stream.

        Raises:
            TimeoutError: If the deadline has passed.
            grpc.RpcError: If the stream has failed.
        """
        left_s = self._end_s - time.perf_counter()
        try:
            arrival = await asyncio.wait_for(self._arrivals.get(), None if grpc_timeout_s(left_s) is None else max(left_s, 0.0))
        except asyncio.TimeoutError:  # not yet TimeoutError in Python 3.10
            raise TimeoutError from None
        if isinstance(arrival, grpc.RpcError):
            raise arrival
        return arrival

    def leave(self) -> None:
        """Have the server stop the answer, unless it is complete. Returns at once; calling it twice is harmless."""
        if not self._left and not self._over:
            self._left = True
            self._tasks.start(self._stop())

    async def _read_out(self) -> None:
        try:
            async for result, error in self._responses:
                if error is not None or any(output.name == "log_prob" for output in result.get_response().outputs):
                    self._over = True
                self._arrivals.put_nowait((result, error))
            self._arrivals.put_nowait(None)
        except grpc.RpcError as rpc_error:
            self._arrivals.put_nowait(rpc_error)
        finally:
            self._over = True

    async def _stop(self) -> None:
        request = {"model_name": self._model, "inputs": infer_inputs_from_tensors(stop_tensors()), "request_id": stop_id(self._id)}
        try:
            errors = [error async for _, error in self._client.stream_infer(_only(request), stream_timeout=STOP_TIMEOUT_S)]
        except grpc.RpcError:
            self._responses.cancel()
        else:
            if any(error is not None for error in errors):
                self._responses.cancel()


async def _only(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """One request. Triton ends the stream after its answer, because no other follows."""
    yield request
