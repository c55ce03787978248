"""Whether a running server still replies: a question that each reader model refuses at once, asked again and again.

A model may hang though its process lives, and Triton calls it ready all the same. In 2.51 cancelled gRPC streams can, once in thousands
under load, leave the streaming models without a reply for good (races that later releases mended); only another start helps then.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .request import PULSE_ID

# Even an overloaded server refuses within moments; so long a silence, twice in a row, is not load.
PERIOD_S, PATIENCE_S, MISSES = 10.0, 20.0, 2
EMPTY_TEXT = b"\0\0\0\0"  # one text of no bytes, as Triton writes it


class Pulse:
    """Asks on a thread of its own until it is closed.

    Args:
        url: host:port of gRPC without TLS.
        models: reader models, streaming ones end with "_stream".
    """

    def __init__(self, url: str, models: Sequence[str]):
        self._url, self._missed = url, dict.fromkeys(models, 0)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """None, or which models do not reply any more."""
        silent = sorted(model for model, missed in self._missed.items() if missed >= MISSES)
        return f"{', '.join(silent)}: no reply within {PATIENCE_S:.0f} s, {MISSES} times in a row" if silent else None

    def close(self) -> None:
        """Ask no more; does not wait for a reply."""
        self._closing.set()

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            for model, missed in list(self._missed.items()):
                self._missed[model] = 0 if replies(self._url, model, PATIENCE_S) else missed + 1


def replies(url: str, model: str, patience_s: float) -> bool:
    """Whether a reader model refuses an empty question in time. A server that cannot be reached counts as one that does not reply."""
    request = service_pb2.ModelInferRequest(model_name=model, id=PULSE_ID, raw_input_contents=[EMPTY_TEXT, EMPTY_TEXT])
    for name in ("question", "passages"):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
    with grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            if model.endswith("_stream"):
                next(iter(stub.ModelStreamInfer(iter([request]), timeout=patience_s)), None)
            else:
                stub.ModelInfer(request, timeout=patience_s)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
    return True
