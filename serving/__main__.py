"""`python -m serving`: runs Triton on readers of a model repository until Ctrl-C, and restarts what dies. See --help."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from serving.contract.versions import SAFE_FROM, dotted
from serving.launcher.endpoints import LOOPBACK, fetch, tls_arguments
from serving.launcher.fleet import Fleet, Place, places_of
from serving.launcher.installation import PROJECT, ServerError
from serving.launcher.repository import STREAM, chosen_readers, models_of, reader_table, served_reader
from serving.launcher.server import TritonServer
from serving.launcher.supervisor import Draining, keep_serving

READY = "ready; Ctrl-C stops"
STATUS_TIMEOUT_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, serve, stop cleanly; returns the exit code."""
    arguments = parse_arguments(argv)
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    try:
        readers = chosen_readers(arguments.readers, arguments.repository)
        if arguments.status:
            print("\n".join(status_table(readers, arguments.repository, f"http://{arguments.address}:{arguments.http_port}")))
            return 0

        ports = (arguments.http_port, arguments.grpc_port, arguments.metrics_port)
        draining = Draining(arguments.drain_timeout, arguments.drain_delay, hurry)

        def new_server(place: Place | None, ports: tuple[int, int, int], address: str) -> TritonServer:
            log: Path = arguments.log
            return TritonServer(
                models_of(readers, stream=arguments.stream),
                arguments.repository,
                ports,
                address,
                # Request logs have one name a folder.
                log if place is None else log.parent / "".join(place.label) / log.name,
                extra=[*tls_arguments(arguments.tls_certificate, arguments.tls_key, arguments.tls_root), *arguments.extra],
                variables=place.variables if place else None,
                multi_process=arguments.multi_process == "auto",
            )

        if arguments.gpus is None and arguments.replicas == 1:
            keep_serving(lambda: new_server(None, ports, arguments.address), stop, lambda server: announce(server, readers), draining)
        else:
            use_haproxy = {"auto": None if arguments.tls_key is None else False, "haproxy": True, "none": False}[arguments.front]
            fleet = Fleet(places_of(arguments.gpus, arguments.replicas), ports, arguments.address, new_server, use_haproxy)
            fleet.keep_serving(stop, lambda servers: announce(servers[0], readers, fleet), draining)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("stopped", flush=True)
    return 0


def status_table(readers: Sequence[str], repository: Path, http_url: str) -> list[str]:
    """A heading and one line per exported reader, with the models of it that a server at `http_url` serves."""
    lines = reader_table([served_reader(repository, reader) for reader in readers])
    served = [" ".join(model for model in (reader, f"{reader}{STREAM}") if is_ready(http_url, model)) or "not served" for reader in readers]
    width = max(map(len, lines))
    return [f"{line.ljust(width)}  {more}" for line, more in zip(lines, ["served as", *served], strict=True)]


def is_ready(http_url: str, model: str) -> bool:
    """Whether a server answers there and calls the model ready."""
    try:
        fetch(f"{http_url}/v2/models/{model}/ready", STATUS_TIMEOUT_S)
        return True
    except OSError:
        return False


def announce(server: TritonServer, readers: Sequence[str], fleet: Fleet | None = None) -> None:
    """Print what is served and where; the last line is READY. Of a fleet, `server` is the first one."""
    served = [served_reader(server.repository, reader) for reader in readers]
    for line in reader_table(served):
        print(line)
    for reader in served:
        if reader.why:
            print(f"engine     {reader.name}: {reader.why}")
    streams = [model for model in server.models if model.endswith(STREAM)]
    print(f"streaming  {' '.join(streams) or 'off (--stream loads it)'}")
    http_urls = fleet.http_urls if fleet else [server.http_url]
    print(f"gRPC       {','.join(fleet.grpc_urls) if fleet else server.grpc_url}")
    print(f"HTTP       {' '.join(f'{url}/v2/models/{readers[0]}/generate' for url in http_urls)}")
    print(f"metrics    {fleet.metrics_url if fleet else server.metrics_url}")
    if fleet:
        before = "HAProxy in front" if len(http_urls) == 1 else "clients take turns over the addresses"
        print(f"servers    {', '.join(fleet.servers)}; {before}")
    print(f"log        {server.log}")
    print(f"requests   {server.request_log}")
    if server.triton is not None and server.triton < SAFE_FROM and server.address != LOOPBACK:
        print(f"warning    Triton {dotted(server.triton)} on {server.address}: some requests end it (docs/operating.md, Which server)")
    for line in server.missing_guards:
        print(f"warning    {line} (no C compiler at `make setup`?)")
    print(READY, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument(
        "--readers", nargs="*", default=[], metavar="READER", help="readers to serve, by blanks or commas (default: all exported ones)"
    )
    parser.add_argument("--status", action="store_true", help="print what is exported, and what a server on the HTTP port serves of it")
    parser.add_argument("--stream", action="store_true", help="also load the streaming model of each reader")
    parser.add_argument("--repository", type=Path, default=PROJECT / "model_repository", help="the model repository")
    parser.add_argument("--address", default=LOOPBACK, help="address to bind to (default: loopback only)")
    parser.add_argument("--http-port", type=_port, default=8000)
    parser.add_argument("--grpc-port", type=_port, default=8001)
    parser.add_argument("--metrics-port", type=_port, default=8002)
    parser.add_argument("--gpus", metavar="0,1|all", help="a server for each of these GPUs, behind one address (default: one server)")
    parser.add_argument("--replicas", type=_count, default=1, help="on the CPU: so many servers, with the cores divided among them")
    parser.add_argument(
        "--front",
        choices=("auto", "haproxy", "none"),
        default="auto",
        help="before several servers: haproxy, none (clients take turns over their addresses), or auto: haproxy where it is installed",
    )
    parser.add_argument(
        "--multi-process",
        choices=("auto", "off"),
        default="auto",
        help="on a GPU, CUDA's multi-process service: auto starts one for the server where the driver has it (default: %(default)s)",
    )
    parser.add_argument("--tls-certificate", type=Path, help="serve gRPC over TLS with this certificate (PEM); needs --tls-key")
    parser.add_argument("--tls-key", type=Path, help="private key of the certificate (PEM)")
    parser.add_argument("--tls-root", type=Path, help="ask clients for a certificate that this one has signed (PEM)")
    parser.add_argument(
        "--log",
        type=Path,
        default=PROJECT / "build" / "log" / "tritonserver.log",
        help="Triton's output; requests go to requests.jsonl in the same folder (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="how long questions in flight may take once the server is told to end (default: %(default)g); a second signal ends it at once",
    )
    parser.add_argument(
        "--drain-delay",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="how long the server is not ready and takes questions still, so that a balancer can leave it first (default: %(default)g)",
    )
    parser.add_argument("extra", nargs="*", help="after --: more arguments for tritonserver")
    arguments = parser.parse_args(argv)
    if (arguments.tls_certificate is None) != (arguments.tls_key is None) or (arguments.tls_root and arguments.tls_key is None):
        parser.error("--tls-certificate and --tls-key go together, and --tls-root goes with both")
    if arguments.gpus is not None and arguments.replicas != 1:
        parser.error("--gpus and --replicas: wanted one of them; --replicas is for servers on the CPU")
    if arguments.front == "haproxy" and arguments.tls_key is not None:
        parser.error("--front haproxy and --tls-key: wanted one of them; with TLS, clients take turns over the servers' addresses")
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"wanted a number of servers from 1 to 64, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"wanted seconds from 0 to 86400, got {text!r}")
    return seconds


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"wanted a port from 1 to 65535, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
