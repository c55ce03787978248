"""Whether a running server still replies: a question that each reader model refuses at once, asked again and again.

A model may take no more requests though its process lives, and Triton calls it ready all the same; only another start helps then. Without
stream_locks.c a cancelled gRPC stream can do that to all streaming models, once in some ten thousand under load. What hangs behind the
door, in a decode loop say, is not seen, nor one of several processes of a model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving.pipeline.request import LIVENESS_ID

# Even an overloaded server refuses within moments; so long a silence, twice in a row, is not load.
PERIOD_S, PATIENCE_S, MISSES = 10.0, 20.0, 2
EMPTY_TEXT = b"\0\0\0\0"  # one text of no bytes, as Triton writes it


class LivenessProbe:
    """Asks on a thread of its own until it is closed.

    Args:
        url: host:port of gRPC. Where TLS, another port or a restriction keeps the launcher out, nothing is ever found missing: only a
            model that has replied before can be.
        models: reader models, streaming ones end with "_stream".
    """

    def __init__(self, url: str, models: Sequence[str]):
        self._url, self._missed = url, dict.fromkeys(models, 0)
        self._replied: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """None, or which models do not reply any more."""
        silent = sorted(model for model, missed in self._missed.items() if missed >= MISSES)
        return f"{', '.join(silent)}: no reply within {PATIENCE_S:.0f} s, {MISSES} times in a row" if silent else None

    def close(self) -> None:
        """Ask no more; waits a moment for the reply that is awaited, not for long."""
        self._closing.set()
        self._thread.join(1.0)

    def __enter__(self) -> LivenessProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            for model in list(self._missed):
                if self._closing.is_set():
                    return
                if replies(self._url, model, PATIENCE_S):
                    self._replied.add(model)
                    self._missed[model] = 0
                elif model in self._replied:
                    self._missed[model] += 1


def replies(url: str, model: str, patience_s: float) -> bool:
    """Whether a reader model refuses an empty question in time. A server that cannot be reached counts as one that does not reply."""
    request = service_pb2.ModelInferRequest(model_name=model, id=LIVENESS_ID, raw_input_contents=[EMPTY_TEXT, EMPTY_TEXT])
    for name in ("question", "passages"):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
    # no proxy: the server is on this machine, whatever the environment says of others
    with grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            if model.endswith("_stream"):
                # to its end: a stream that is left before is a cancelled one
                for _ in stub.ModelStreamInfer(iter([request]), timeout=patience_s):
                    pass
            else:
                stub.ModelInfer(request, timeout=patience_s)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        except Exception:  # whatever it is, asking must go on
            return False
    return True
