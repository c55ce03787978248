"""The ways in which a client leaves. Each attempt says whether its client left before its answer was complete.

A client that had its whole answer by then does not count, nor does one that was turned away. But grpc-last leaves at the answer's last
response, before the stream's end: that moment is what it is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from clients.reader_client import AsyncReaderClient, ReaderClient, ReaderError, ReaderTimeout
from serving.launcher.server import LOOPBACK

from .asking import CHANNEL
from .mutants.http import request
from .questions import Case

TIMEOUT_S = 60.0
REFUSED_PAUSE_S = 0.05  # after an attempt that the server turned away
HANG_UP_AFTER_S = 0.05  # at most, for requests whose response comes in one
SHARED_SHARE = 0.7  # of the plain gRPC streams that share one connection
DEADLINES_S = (0.002, 0.3)
KILLED_AT_ONCE = 16  # streams of one client process that is killed
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as the kernel does for a client that is killed


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the clients connect, and what they ask.

    Attributes:
        grpc_url: host:port of Triton's gRPC endpoint.
        http_port: of Triton's HTTP endpoint.
        cases: questions to ask; their answers are not checked.
    """

    grpc_url: str
    http_port: int
    cases: tuple[Case, ...]


Attempt = Callable[[Target, random.Random], bool]


class _Channels:
    """One gRPC connection for each address that all threads share, and one for each thread."""

    def __init__(self) -> None:
        self._shared: dict[str, Any] = {}
        self._own = threading.local()
        self._lock = threading.Lock()

    def stub(self, url: str, *, shared: bool) -> Any:
        with self._lock:
            stubs = self._shared if shared else vars(self._own)
            if url not in stubs:
                stubs[url] = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(url, CHANNEL))
            return stubs[url]


_channels = _Channels()


def _open_stream(target: Target, rng: random.Random, timeout_s: float = TIMEOUT_S) -> Any:
    case = rng.choice(target.cases)
    message = case.message(f"{case.reader}_stream")
    return _channels.stub(target.grpc_url, shared=rng.random() < SHARED_SHARE).ModelStreamInfer(iter([message]), timeout=timeout_s)


def _has_totals(response: Any) -> bool:
    return any(output.name == "tokens" for output in response.infer_response.outputs)


def _cancel_at(wanted: Callable[[int, bool], bool]) -> Attempt:
    """An attempt that cancels a plain gRPC stream at the first response that is wanted, by its index and whether it has the totals."""

    def attempt(target: Target, rng: random.Random) -> bool:
        call = _open_stream(target, rng)
        try:
            for index, response in enumerate(call):
                if response.error_message:
                    list(call)
                    return False
                totals = _has_totals(response)
                if wanted(index, totals) or totals:
                    call.cancel()
                    return True
        except grpc.RpcError:
            return False
        return False

    return attempt


def _grpc_mid(target: Target, rng: random.Random) -> bool:
    index = rng.randint(1, 12)
    return _cancel_at(lambda i, _: i >= index)(target, rng)


def _grpc_any_moment(target: Target, rng: random.Random) -> bool:
    call = _open_stream(target, rng)
    answered = threading.Event()
    reading = threading.Thread(target=_read_until_answered, args=(call, answered), daemon=True)
    reading.start()
    time.sleep(rng.random() * DEADLINES_S[1])
    left = not answered.is_set() and bool(call.cancel())
    call.cancel()
    reading.join()
    return left


def _read_until_answered(call: Any, answered: threading.Event) -> None:
    """Read a stream to its end; say when its answer is complete, or it is refused."""
    with contextlib.suppress(grpc.RpcError):
        for response in call:
            if response.error_message or _has_totals(response):
                answered.set()


def _grpc_at_the_flag(target: Target, rng: random.Random) -> bool:
    """Read the whole answer and cancel when the server is about to end the stream: the window that remains."""
    call = _open_stream(target, rng)
    try:
        for response in call:
            if response.error_message or _has_totals(response):
                break
        time.sleep(rng.uniform(0.285, 0.315))
        return bool(call.cancel())
    except grpc.RpcError:
        return False


def _grpc_deadline(target: Target, rng: random.Random) -> bool:
    call = _open_stream(target, rng, timeout_s=rng.uniform(*DEADLINES_S))
    try:
        list(call)
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return False


def _client_closes(target: Target, rng: random.Random, *, http: bool = False) -> bool:
    case, pieces = rng.choice(target.cases), rng.randint(0, 12)
    try:
        with _reader_client(target, case, http=http) as stream:
            for _, _piece in zip(range(pieces), stream, strict=False):
                pass
            return not _is_complete(stream)
    except ReaderError:
        return False


def _is_complete(stream: Any) -> bool:
    """Whether a client's stream has its whole answer."""
    try:
        return bool(stream.answer)
    except RuntimeError:
        return False


def _client_deadline(target: Target, rng: random.Random) -> bool:
    case = rng.choice(target.cases)
    try:
        with _reader_client(target, case, rng.uniform(*DEADLINES_S)) as stream:
            stream.read_to_end()
    except ReaderTimeout:
        return True
    except ReaderError:
        return False
    return False


def _client_closes_http(target: Target, rng: random.Random) -> bool:
    return _client_closes(target, rng, http=True)


_clients: dict[tuple[str, str, bool], ReaderClient] = {}
_clients_lock = threading.Lock()


def _reader_client(target: Target, case: Case, timeout_s: float = TIMEOUT_S, *, http: bool = False) -> Any:
    key = (target.grpc_url, case.reader, http)
    with _clients_lock:
        if key not in _clients:
            url = f"{LOOPBACK}:{target.http_port}" if http else target.grpc_url
            _clients[key] = ReaderClient(url, case.reader, transport="http" if http else "grpc")
        client = _clients[key]
    return client.stream(case.question, case.passages, case.titles, timeout_s=timeout_s, **_lengths(case))


def _lengths(case: Case) -> dict[str, int]:
    return {"max_new_tokens": case.max_new_tokens, "min_new_tokens": case.min_new_tokens}


def _http(path: Callable[[str], str], body: Callable[[Case], Any], events: tuple[int, int] | None) -> Attempt:
    """An attempt that hangs up: after a number of events, or without them after a random time."""

    def attempt(target: Target, rng: random.Random) -> bool:
        case = rng.choice(target.cases)
        with socket.create_connection((LOOPBACK, target.http_port), timeout=TIMEOUT_S) as connection:
            connection.sendall(request(path(case.reader), json.dumps(body(case)).encode()))
            if events is None:
                time.sleep(rng.random() * HANG_UP_AFTER_S)
                if select.select([connection], [], [], 0)[0]:
                    return False
            elif not _read_events(connection, rng.randint(*events)):
                return False
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return True

    return attempt


def _read_events(connection: socket.socket, count: int) -> bool:
    """Whether so many events came, or the one with the totals, before the response ended."""
    received = b""
    while received.count(b"data:") < count and b'"tokens"' not in received:
        part = connection.recv(65536)
        if not part or b'"error"' in part:
            return False
        received += part
    return True


def _infer_body(case: Case) -> dict[str, Any]:
    inputs = [
        {"name": name, "datatype": "BYTES" if array.dtype == object else "INT32", "shape": list(array.shape), "data": _values(array)}
        for name, array in case.tensors(case.reader).items()
    ]
    return {"inputs": inputs}


def _values(array: Any) -> list[Any]:
    return [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]


GRPC_FIRST, GRPC_LAST = _cancel_at(lambda i, _: True), _cancel_at(lambda _, totals: totals)
ATTEMPTS: dict[str, Attempt] = {
    "grpc-first": GRPC_FIRST,
    "grpc-mid": _grpc_mid,
    "grpc-last": GRPC_LAST,
    "grpc-any": _grpc_any_moment,
    "grpc-deadline": _grpc_deadline,
    "client-close": _client_closes,
    "client-deadline": _client_deadline,
    "client-http": _client_closes_http,
    "http-stream": _http(lambda reader: f"/v2/models/{reader}_stream/generate_stream", Case.body, (1, 12)),
    "http-generate": _http(lambda reader: f"/v2/models/{reader}/generate", Case.body, None),
    "http-infer": _http(lambda reader: f"/v2/models/{reader}/infer", _infer_body, None),
}
# Looks for the window that the delayed final flag leaves. It may end the server.
PROBES: dict[str, Attempt] = {"grpc-at-flag": _grpc_at_the_flag}


def run_threads(attempt: Attempt, target: Target, seed: str, count: int, at_once: int) -> int:
    """Run `count` attempts, `at_once` at a time; gives how many clients left."""

    def one(index: int) -> bool:
        try:
            left = attempt(target, random.Random(f"{seed} {index}"))
        except OSError:  # no connection: the server is starting again
            left = False
        if not left:
            time.sleep(REFUSED_PAUSE_S)
        return left

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(one, range(count)))


def run_asyncio(target: Target, seed: str, count: int, at_once: int) -> int:
    """The same with the asyncio client, whose streams are closed after a few pieces."""

    async def one(clients: dict[str, AsyncReaderClient], places: asyncio.Semaphore, index: int) -> bool:
        rng = random.Random(f"{seed} {index}")
        case, pieces = rng.choice(target.cases), rng.randint(0, 12)
        async with places:
            try:
                stream = clients[case.reader].stream(case.question, case.passages, case.titles, timeout_s=TIMEOUT_S, **_lengths(case))
                async with stream:
                    async for _ in stream:
                        pieces -= 1
                        if pieces <= 0:
                            break
                    return not _is_complete(stream)
            except ReaderError:
                await asyncio.sleep(REFUSED_PAUSE_S)
                return False

    async def run() -> int:
        clients = {reader: AsyncReaderClient(target.grpc_url, reader) for reader in {case.reader for case in target.cases}}
        places = asyncio.Semaphore(at_once)
        try:
            return sum(await asyncio.gather(*(one(clients, places, index) for index in range(count))))
        finally:
            for client in clients.values():
                await client.aclose()

    return asyncio.run(run())


def run_killed(target: Target, seed: str, count: int, at_once: int) -> int:
    """The same with client processes that are killed while `KILLED_AT_ONCE` streams of each are in flight."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def one(index: int) -> int:
        rng = random.Random(f"{seed} {index}")
        ours, theirs = context.Pipe(duplex=False)
        answered = context.Value("i", 0)
        process = context.Process(target=_open_many, args=(target, f"{seed} {index}", theirs, answered), daemon=True)
        process.start()
        theirs.close()
        try:
            if ours.poll(TIMEOUT_S):
                ours.recv()
                time.sleep(rng.random() * 0.3)
        except EOFError:
            return 0
        finally:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            ours.close()
        return KILLED_AT_ONCE - answered.value

    with ThreadPoolExecutor(max(1, at_once // KILLED_AT_ONCE)) as pool:
        return sum(pool.map(one, range(max(1, count // KILLED_AT_ONCE))))


def _open_many(target: Target, seed: str, pipe: Any, answered: Any) -> None:
    """In the client process: open streams, report the first response of any, count the answers, and read on until killed."""
    rng = random.Random(seed)

    def read(call: Any) -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in call:
                with contextlib.suppress(OSError):
                    pipe.send(None)
                if response.error_message or _has_totals(response):
                    with answered.get_lock():
                        answered.value += 1

    for _ in range(KILLED_AT_ONCE):
        threading.Thread(target=read, args=(_open_stream(target, rng),), daemon=True).start()
    time.sleep(TIMEOUT_S)


def kinds() -> Sequence[str]:
    """The names of all kinds that `run` knows."""
    return [*ATTEMPTS, "async-close", "grpc-killed", *PROBES]


def run(kind: str, target: Target, seed: str, count: int, at_once: int) -> int:
    """Let clients of one kind leave; gives how many did."""
    if kind == "async-close":
        return run_asyncio(target, seed, count, at_once)
    if kind == "grpc-killed":
        return run_killed(target, seed, count, at_once)
    return run_threads((ATTEMPTS | PROBES)[kind], target, seed, count, at_once)
