"""The preloaded C sources, compiled here and loaded into programs that do what Triton's threads do, and Triton's faults behind them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from export.repository import repository_from_engines
from fido_client.errors import ReaderError
from fido_client.reader_client import ReaderClient
from fido_client.request import ReaderRequest, infer_message_from_tensors, tensors_from_request
from serving.contract.limits import Limits
from serving.launcher.endpoints import free_ports
from serving.launcher.environment import HEAP_TRIM, NO_THREAD_CACHES, STREAM_LOCKS, environment
from serving.launcher.installation import find_installation
from serving.launcher.server import TritonServer, models_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SOURCES = Path(__file__).parents[3] / "serving/launcher/preload"
LIBRARY = "void *TRITONBACKEND_ResponseSend(void *send, unsigned flags, void *error) { ((void (*)(void))send)(); return error; }"
# In each round the handler locks request, then stream; the sender, inside ResponseSend, stream, then request. Both mutexes are new.
PROGRAM = """
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
void *TRITONBACKEND_ResponseSend(void *, unsigned, void *);
static pthread_mutex_t *request, *stream;
static pthread_barrier_t both;
static int inside;
static void enter(void) { if (__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) != 1) { puts("two inside"); exit(2); } }
static void leave(void) { __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST); }
static pthread_mutex_t *new_mutex(void) {
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_t *mutex = malloc(sizeof *mutex);
    pthread_mutex_init(mutex, &kind);
    return mutex;
}
static void send(void) {
    pthread_mutex_lock(stream);
    pthread_barrier_wait(&both);
    pthread_mutex_lock(request);
    enter(); leave();
    pthread_mutex_unlock(request);
    pthread_mutex_unlock(stream);
}
static void *sender(void *unused) { return TRITONBACKEND_ResponseSend((void *)send, 0, NULL); }
int main(void) {
    for (int round = 0; round < 10; ++round) {
        pthread_t thread;
        request = new_mutex(), stream = new_mutex();
        pthread_barrier_init(&both, NULL, 2);
        pthread_mutex_lock(request);
        pthread_mutex_lock(request);
        pthread_create(&thread, NULL, sender, NULL);
        pthread_barrier_wait(&both);
        pthread_mutex_lock(stream);
        enter(); leave();
        pthread_mutex_unlock(stream);
        pthread_mutex_unlock(request);
        pthread_mutex_unlock(request);
        pthread_join(thread, NULL);
        free(request), free(stream);
    }
    printf("done %s", getenv("LD_PRELOAD") ? getenv("LD_PRELOAD") : "none");
}
"""


def compiled(folder: Path, name: str, source: str, *options: str) -> Path:
    (folder / f"{name}.c").write_text(source)
    subprocess.run(["cc", "-O2", "-pthread", "-o", str(folder / name), str(folder / f"{name}.c"), *options], check=True)
    return folder / name


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preload")
    for name in ("heap_trim", "stream_locks"):
        compiled(folder, f"lib{name}.so", (SOURCES / f"{name}.c").read_text(), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    compiled(folder, "libtriton.so", LIBRARY, "-shared", "-fPIC")
    return compiled(folder, "program", PROGRAM, f"-L{folder}", "-ltriton", f"-Wl,-rpath,{folder}")


def printed(program: Path, preload: str, timeout_s: float) -> str:
    env = {**os.environ, "LD_PRELOAD": preload}
    return subprocess.run([str(program)], env=env, capture_output=True, text=True, timeout=timeout_s, check=True).stdout


def test_the_deadlock_is_resolved_and_is_one_without_the_library(program):
    assert printed(program, str(program.parent / "libstream_locks.so"), 30).startswith("done")
    with pytest.raises(subprocess.TimeoutExpired):
        printed(program, "", 2)


@pytest.mark.parametrize("separator", [" ", ":"])
def test_children_load_the_other_libraries_and_not_this_one(program, separator):
    ours, other = (str(program.parent / f"lib{name}.so") for name in ("stream_locks", "heap_trim"))
    assert printed(program, ours, 30) == "done none"
    assert printed(program, separator.join([other, ours]), 30) == f"done {other}"
    assert printed(program, separator.join([ours, other]), 30) == f"done {other}"


def test_no_function_newer_than_glibc_2_30_is_needed(program):
    symbols = subprocess.run(["nm", "-D", str(program.parent / "libstream_locks.so")], capture_output=True, text=True).stdout
    assert "pthread_mutex_timedlock" in symbols and "pthread_mutex_clocklock" not in symbols


# Free heap goes back to the system: glibc alone keeps it below a block that is still in use.

# fills 100 MB of heap with small blocks, frees all but the last, and prints resident memory until it has shrunk
HEAP_PROGRAM = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
blocks = [libc.malloc(1000) for _ in range(100_000)]
for block in blocks:
    ctypes.memset(block, 1, 1000)
for block in blocks[:-1]:
    libc.free(block)
del blocks
deadline = time.monotonic() + 15
while resident() - before > 30e6 and time.monotonic() < deadline:
    time.sleep(0.2)
print(resident() - before)
"""


def grown_bytes(env: dict[str, str]) -> int:
    return int(subprocess.run([sys.executable, "-c", HEAP_PROGRAM], env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not HEAP_TRIM.is_file(), reason="there was no C compiler at `make setup`")
def test_what_is_free_is_given_back() -> None:
    env = environment(find_installation())
    assert str(HEAP_TRIM) in env["LD_PRELOAD"].split()
    assert grown_bytes(env) < 30e6
    assert grown_bytes({**os.environ}) > 60e6


@pytest.mark.server
@pytest.mark.skipif(not HEAP_TRIM.is_file(), reason="there was no C compiler at `make setup`")
def test_tritonserver_alone_goes_without_thread_caches(engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    with TritonServer(models_of(["fido"], stream=False), tmp_path / "repository") as server:
        settings = {
            name: [line for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line.startswith("GLIBC_TUNABLES=")]
            for name, pid in server.model_processes().items()
        }
    assert settings == {"tritonserver": [f"GLIBC_TUNABLES={NO_THREAD_CACHES}"], "fido": [], "fido_encoder": []}


# A cancelled stream must not stop all others. Triton's own test hook holds a stream's lock for a while at every response: without
# serving/launcher/preload/stream_locks.c the first stream that is cancelled then is the last one that is served.

needs_stream_locks = pytest.mark.skipif(not STREAM_LOCKS.is_file(), reason="there was no C compiler at `make setup`")
CANCELLED, TOKENS = 5, 24


@pytest.fixture
def server(engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[TritonServer]:
    monkeypatch.setenv("TRITONSERVER_DELAY_GRPC_RESPONSE", "30")
    monkeypatch.setattr("serving.launcher.environment.STREAM_LOCKS", request.param)
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    with TritonServer(models_of(["fido"], stream=True), tmp_path / "repository", drain_timeout_s=1.0) as server:
        yield server


def cancel_in_mid_answer(server: TritonServer) -> None:
    """Cancel a stream after its first response, while more are on their way. Our client does not cancel, so this is a plain gRPC stub."""
    request = ReaderRequest("w1", ["w2"], max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    message = infer_message_from_tensors("fido_stream", tensors_from_request(request))
    with grpc.insecure_channel(server.grpc_url, [("grpc.enable_http_proxy", 0)]) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message]), timeout=20)
        next(call)
        call.cancel()


@pytest.mark.server
@needs_stream_locks
@pytest.mark.parametrize("server", [STREAM_LOCKS], indirect=True, ids=["with it"])
def test_streams_are_served_after_others_were_cancelled(server: TritonServer) -> None:
    with ReaderClient(server.grpc_url, "fido_stream", timeout_s=20) as client:
        for _ in range(CANCELLED):
            cancel_in_mid_answer(server)
            assert client.stream("w1", ["w2"], max_new_tokens=4, min_new_tokens=4).read_to_end().tokens == 4


@pytest.mark.server
@needs_stream_locks
@pytest.mark.parametrize("server", [Path("/nowhere")], indirect=True, ids=["without it"])
def test_triton_still_needs_it(server: TritonServer) -> None:
    """If this fails, Triton has been mended: stream_locks.c can go."""
    with ReaderClient(server.grpc_url, "fido_stream", timeout_s=3) as client, pytest.raises(ReaderError):
        for _ in range(10 * CANCELLED):  # on busy cores the first few may come at another moment
            cancel_in_mid_answer(server)
            client.stream("w1", ["w2"], max_new_tokens=4, min_new_tokens=4).read_to_end()


# One cancelled stream ends Triton: docs/notes/triton_cancelled_stream.md has the steps and a patch. From 2.57 on, a test hook of Triton's
# own holds its handler back before every event but the cancel, so that it takes no luck. The wheel's Triton is older.

HOOK_SINCE, HOOK_MS, ANSWER = (2, 57), 200, 5
COUNTING_CONFIG = """
name: "counting"
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "index" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""
# a response each millisecond until the count is reached or the client has cancelled
COUNTING_MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for index in range(int(pb_utils.get_input_tensor_by_name(request, "count").as_numpy()[0])):
                if sender.is_cancelled():
                    break
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("index", np.array([index], np.int32))]))
                time.sleep(0.001)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def counting(stub: service_pb2_grpc.GRPCInferenceServiceStub, count: int):
    """The responses of a stream that counts so far."""
    message = service_pb2.ModelInferRequest(model_name="counting", raw_input_contents=[count.to_bytes(4, "little")])
    message.inputs.add(name="count", datatype="INT32", shape=[1])
    return stub.ModelStreamInfer(iter([message]), timeout=30)


@pytest.mark.server
@pytest.mark.parametrize(("variable", "lives"), [("TRITONSERVER", False), ("MENDED_TRITONSERVER", True)])
def test_a_stream_that_is_cancelled_once(variable: str, lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Triton lives without the patch, it has been mended: serving/triton/final_flag.py can go."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no tritonserver " + ("with the patch" if lives else "of 2.57 or later"))
    monkeypatch.setenv("TRITONSERVER", os.environ[variable])
    installation = find_installation()
    if installation.triton is None or installation.triton < HOOK_SINCE:
        pytest.skip(f"{variable}={installation.binary}: wanted 2.57 or later, got {installation.triton}")
    (tmp_path / "counting" / "1").mkdir(parents=True)
    (tmp_path / "counting" / "config.pbtxt").write_text(COUNTING_CONFIG)
    (tmp_path / "counting" / "1" / "model.py").write_text(COUNTING_MODEL)
    (port,) = free_ports(1)
    options = [f"--model-repository={tmp_path}", f"--backend-directory={installation.backends}", "--grpc-address=127.0.0.1"]
    options += [f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"]
    env = {**environment(installation, []), "TRITONSERVER_DELAY_GRPC_PROCESS_ENTRY": str(HOOK_MS)}
    with (
        subprocess.Popen([installation.binary, *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel,
    ):
        try:
            grpc.channel_ready_future(channel).result(timeout=30)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            cancelled = counting(stub, 10_000)
            next(cancelled)
            cancelled.cancel()
            if lives:
                assert len(list(counting(stub, ANSWER))) == ANSWER
                server.terminate()
                assert server.wait(60) == 0, "a request is still in flight: its stream was never released"
            else:
                assert server.wait(30) in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
        finally:
            server.kill()
