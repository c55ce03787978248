"""`python -m serving`: run Triton on the repository until Ctrl-C. See --help."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from serving.launcher.installation import PROJECT, ServerError
from serving.launcher.server import LOOPBACK, TritonServer, models_of, tls_arguments
from serving.launcher.supervisor import keep_serving


def main() -> int:
    """Parse arguments, serve, stop cleanly; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--readers", nargs="+", default=["fid", "fido"], metavar="READER", help="readers to serve (default: fid fido)")
    parser.add_argument("--stream", action="store_true", help="also load the streaming model of each reader")
    parser.add_argument("--repository", type=Path, default=PROJECT / "model_repository")
    parser.add_argument("--address", default=LOOPBACK, help="address to bind to (default: loopback only)")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--tls-certificate", type=Path, help="serve gRPC over TLS with this certificate (PEM); needs --tls-key")
    parser.add_argument("--tls-key", type=Path, help="private key of the certificate (PEM)")
    parser.add_argument("--tls-root", type=Path, help="ask clients for a certificate that this one has signed (PEM)")
    parser.add_argument("--log", type=Path, default=PROJECT / "build" / "tritonserver.log")
    parser.add_argument("extra", nargs="*", help="after --: more arguments for tritonserver")
    arguments = parser.parse_args()
    if (arguments.tls_certificate is None) != (arguments.tls_key is None) or (arguments.tls_root and arguments.tls_key is None):
        parser.error("--tls-certificate and --tls-key go together, and --tls-root goes with both")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def new_server() -> TritonServer:
        return TritonServer(
            models_of(arguments.readers, stream=arguments.stream),
            arguments.repository,
            (arguments.http_port, arguments.grpc_port, arguments.metrics_port),
            arguments.address,
            arguments.log,
            extra=[*tls_arguments(arguments.tls_certificate, arguments.tls_key, arguments.tls_root), *arguments.extra],
        )

    def announce(server: TritonServer) -> None:
        print(f"models    {' '.join(server.models)}")
        print(f"gRPC      {server.grpc_url}")
        print(f"HTTP      {server.http_url}/v2/models/{arguments.readers[0]}/generate")
        print(f"metrics   {server.metrics_url}")
        print(f"log       {server.log}")
        print("ready; Ctrl-C stops", flush=True)

    try:
        keep_serving(new_server, stop, announce)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
