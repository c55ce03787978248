"""Liveness probe: asks each reader model of a running server a question that it refuses at once, again and again.

A model can stop taking requests while its process lives and Triton says that it is ready; only a restart helps. Without stream_locks.c a
cancelled gRPC stream can do that to all streaming models, once in some ten thousand cancelled streams under load.

The probe does not notice a model that takes requests and does not answer them, nor one of several processes of a model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.pipeline.request import LIVENESS_ID

from .repository import STREAM

# Even an overloaded server refuses at once. Two silences of this length in a row are not load.
PERIOD_S, TIMEOUT_S, MAX_MISSES = 10.0, 20.0, 2
EMPTY_TEXT = b"\0\0\0\0"  # one text of no bytes, as Triton encodes it


class LivenessProbe:
    """Probes on a thread of its own until it is closed.

    Args:
        url: host:port of gRPC. A model counts as silent only if it replied before. So where TLS or a firewall keeps the launcher from
            the port, no model ever counts as silent.
        models: reader models; the name of a streaming one ends with "_stream".
    """

    def __init__(self, url: str, models: Sequence[str]):
        self._url, self._misses = url, dict.fromkeys(models, 0)
        self._replied: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """None, or which models no longer reply."""
        silent = sorted(model for model, misses in self._misses.items() if misses >= MAX_MISSES)
        return f"{', '.join(silent)}: no reply within {TIMEOUT_S:.0f} s, {MAX_MISSES} times in a row" if silent else None

    def close(self) -> None:
        """Stop probing. A probe that is under way is not waited for longer than a second."""
        self._closing.set()
        self._thread.join(1.0)

    def __enter__(self) -> LivenessProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            for model in list(self._misses):
                if self._closing.is_set():
                    return
                if replies(self._url, model, TIMEOUT_S):
                    self._replied.add(model)
                    self._misses[model] = 0
                elif model in self._replied:
                    self._misses[model] += 1


def replies(url: str, model: str, timeout_s: float) -> bool:
    """Whether a reader model refuses an empty question in time. A server that cannot be reached does not reply."""
    request = service_pb2.ModelInferRequest(model_name=model, id=LIVENESS_ID, raw_input_contents=[EMPTY_TEXT, EMPTY_TEXT])
    for name in ("question", "passages"):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
    # No proxy: the server is on this machine, whatever the environment says of other hosts.
    with grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            if model.endswith(STREAM):
                # Read to the end: a stream that is left earlier is a cancelled one.
                for _ in stub.ModelStreamInfer(iter([request]), timeout=timeout_s):
                    pass
            else:
                stub.ModelInfer(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        except Exception:  # the next probe must come, whatever happened to this one
            return False
    return True
