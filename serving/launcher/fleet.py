"""Several servers of the same readers on one host, one for each GPU or each group of CPU cores, behind one address.

Each server is a Triton of its own with its own CUDA_VISIBLE_DEVICES and cores, since Triton gives models no affinity to each other. A
thread keeps each one up (supervisor.py). HAProxy, where it is installed, takes questions on one HTTP and one gRPC port; without it clients
take turns over the printed addresses. One port has the metrics of all servers, with a label for the GPU, and their health.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .endpoints import fetch, require_free_ports
from .installation import ServerError
from .processes import GuardedProcess
from .server import TritonServer
from .supervisor import Draining, keep_serving

PORT_STEP = 10  # between the ports of the front and of the first server, and between those of two servers
FETCH_TIMEOUT_S = 5.0
HAPROXY_END_S = 2.0
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (.*)$")
READY_GAUGE = "fido_server_ready"
GPU_FIELD = "{gpu}"
# Checks twice a second. `redispatch` gives a request that found no connection to another server; nothing that a server has read is sent
# twice by HAProxy, except where the server died without a word: a reader is a pure function of the request. A request must fit
# into one buffer for that; each connection has two.
HAPROXY = """\
global
    maxconn 1024
    tune.bufsize 262144
defaults
    mode http
    timeout connect 2s
    timeout client 1h
    timeout server 1h
    timeout check 5s
    balance leastconn
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response
    option httpchk GET /v2/health/ready
    default-server inter 500ms fall 1 rise 1
frontend http
    bind {address}:{http}
    use_backend health if {{ path_beg /v2/health }}
    default_backend servers_http
frontend grpc
    bind {address}:{grpc} proto h2
    default_backend servers_grpc
backend health
    server launcher 127.0.0.1:{metrics}
backend servers_http
{servers_http}
backend servers_grpc
{servers_grpc}
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one server runs.

    Attributes:
        label: of its metrics: ("gpu", "0") or ("replica", "0").
        cores: CPU cores of its processes.
        variables: more environment variables of it.
    """

    label: tuple[str, str]
    cores: tuple[int, ...]
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """In messages."""
        return " ".join(self.label)


def places_of(gpus: str | None, replicas: int) -> list[Place]:
    """A place for each GPU, or for each of `replicas` on the CPU, with an equal share of this process's cores, side by side.

    "{gpu}" in CUDA_MPS_PIPE_DIRECTORY stands for the name of a place's GPU: each then has a multi-process daemon of its own.

    Args:
        gpus: numbers or UUIDs by commas, or "all"; None for servers on the CPU. Numbers count within CUDA_VISIBLE_DEVICES if that is set.
        replicas: on the CPU.

    Raises:
        ServerError: if there is no such GPU, one is named twice, or there are more places than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    labels = [("replica", str(number)) for number in range(replicas)] if gpus is None else [("gpu", gpu) for gpu in _gpu_names(gpus)]
    if len(labels) > len(cores):
        raise ServerError(f"{len(labels)} servers on {len(cores)} CPU cores: wanted a core for each at least")
    share = len(cores) // len(labels)
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    places = []
    for number, (kind, name) in enumerate(labels):
        variables = {}
        if kind == "gpu":
            if visible and name.isdecimal() and int(name) >= len(visible):
                raise ServerError(f"--gpus {name}: CUDA_VISIBLE_DEVICES has {len(visible)}: {','.join(visible)}")
            variables["CUDA_VISIBLE_DEVICES"] = visible[int(name)] if visible and name.isdecimal() else name
            if GPU_FIELD in (pipes := os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")):
                variables["CUDA_MPS_PIPE_DIRECTORY"] = pipes.replace(GPU_FIELD, name)
        places.append(Place((kind, name), tuple(cores[number * share : (number + 1) * share]), variables))
    return places


class Fleet:
    """Servers in several places that are kept up, and what stands before them.

    Args:
        places: of the servers.
        ports: HTTP, gRPC and metrics of the front. Server number i has the same plus PORT_STEP * (i + 1).
        address: that the front binds to; the servers bind to loopback behind HAProxy, else to this address.
        new_server: makes a server that is not yet started, from its place, ports and address.
        use_haproxy: whether questions come through HAProxy; None: where it is installed.
    """

    def __init__(
        self,
        places: Sequence[Place],
        ports: tuple[int, int, int],
        address: str,
        new_server: Callable[[Place, tuple[int, int, int], str], TritonServer],
        use_haproxy: bool | None = None,
    ):
        self._places, self._ports, self._address, self._new_server = tuple(places), ports, address, new_server
        self._haproxy = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin") if use_haproxy is not False else None
        if use_haproxy and self._haproxy is None:
            raise ServerError("--front haproxy: it is not installed (apt-get install haproxy), or not in PATH")
        self._server_ports = [tuple(port + PORT_STEP * (number + 1) for port in ports) for number in range(len(places))]
        self._servers: dict[int, TritonServer] = {}
        self._errors: list[Exception] = []
        self._changed = threading.Condition()
        self._ending = threading.Event()

    @property
    def servers(self) -> list[str]:
        """Each server in words: its place and cores."""
        return [f"{place.name} on {len(place.cores)} cores" for place in self._places]

    @property
    def grpc_urls(self) -> list[str]:
        """What clients connect to: HAProxy, or each server."""
        host = self._address
        return [f"{host}:{self._ports[1]}"] if self._haproxy else [f"{host}:{ports[1]}" for ports in self._server_ports]

    @property
    def http_urls(self) -> list[str]:
        """The same for HTTP."""
        host = self._address
        return [f"http://{host}:{self._ports[0]}"] if self._haproxy else [f"http://{host}:{ports[0]}" for ports in self._server_ports]

    @property
    def metrics_url(self) -> str:
        """The metrics of all."""
        return f"http://{self._address}:{self._ports[2]}/metrics"

    def keep_serving(self, stop: threading.Event, announce: Callable[[list[TritonServer]], None], draining: Draining) -> None:
        """Serve until `stop` is set; then all servers are drained at once, and the front ends last.

        Args:
            stop: ends serving.
            announce: called once, with all servers, when all are ready.
            draining: how the servers end.

        Raises:
            ServerError: if a server's first start fails, a port is taken, or HAProxy does not start.
        """
        require_free_ports(self._address, self._ports)
        threads = [
            threading.Thread(target=self._keep, args=(number, stop, draining), name=place.name) for number, place in enumerate(self._places)
        ]
        front: GuardedProcess | None = None
        metrics = _start_http(self._address, self._ports[2], self)
        announced = False
        try:
            for thread in threads:
                thread.start()
            while not stop.is_set() and not self._errors:
                with self._changed:
                    self._changed.wait(0.25)
                if len(self._servers) == len(self._places) and not announced:
                    front = self._start_front()
                    announce([self._servers[number] for number in range(len(self._places))])
                    announced = True
                if front is not None and front.popen.poll() is not None:
                    print(f"HAProxy has ended with code {front.popen.returncode}; starting it again", file=sys.stderr, flush=True)
                    stop.wait(1.0)
                    front = self._start_front()
        finally:
            stop.set()
            self._ending.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            if front is not None:
                front.end(HAPROXY_END_S)
            metrics.shutdown()
            metrics.server_close()
        if self._errors:
            raise self._errors[0]

    def _keep(self, number: int, stop: threading.Event, draining: Draining) -> None:
        place = self._places[number]
        os.sched_setaffinity(0, place.cores)  # of this thread, and of the processes that it starts
        address = "127.0.0.1" if self._haproxy else self._address

        def started(server: TritonServer) -> None:
            with self._changed:
                self._servers[number] = server
                self._changed.notify()

        def new_server() -> TritonServer:
            http, grpc, metrics = self._server_ports[number]
            return self._new_server(place, (http, grpc, metrics), address)

        try:
            keep_serving(new_server, stop, started, draining, f"{place.name}: ")
        except ServerError as error:
            self._errors.append(type(error)(f"{place.name}: {error}"))
        except Exception as error:  # a thread's own error would be lost
            self._errors.append(error)

    def _start_front(self) -> GuardedProcess | None:
        if self._haproxy is None:
            return None

        def lines(which: int) -> str:
            check = "check" if which == 0 else "proto h2 check check-proto h1 port {http}"
            return "\n".join(
                f"    server s{number} 127.0.0.1:{ports[which]} {check.format(http=ports[0])}"
                for number, ports in enumerate(self._server_ports)
            )

        http, grpc, metrics = self._ports
        config = HAPROXY.format(address=self._address, http=http, grpc=grpc, metrics=metrics, servers_http=lines(0), servers_grpc=lines(1))
        scratch = Path(next(iter(self._servers.values())).log.parent)
        path = scratch / "haproxy.cfg"
        path.write_text(config, encoding="utf-8")
        # -db: in the foreground
        front = GuardedProcess([self._haproxy, "-db", "-f", str(path)], os.environ, {}, sys.stderr.fileno(), (), HAPROXY_END_S)
        deadline_s = time.monotonic() + 10
        while front.popen.poll() is None and time.monotonic() < deadline_s:
            try:
                fetch(f"http://{self._address}:{http}/v2", 1.0)
                return front
            except OSError:
                time.sleep(0.05)
        front.end(HAPROXY_END_S)
        raise ServerError(f"HAProxy did not start: code {front.popen.returncode}; its configuration is {path}")

    def health(self) -> dict[str, bool]:
        """Place -> whether its server takes new questions."""
        if self._ending.is_set():
            return {place.name: False for place in self._places}
        return {place.name: self._is_ready(number) for number, place in enumerate(self._places)}

    def _is_ready(self, number: int) -> bool:
        server = self._servers.get(number)
        try:
            if server is None or server.failure() is not None:  # Triton 2.51 says that it is ready while a model's process is dead
                return False
            fetch(f"{server.http_url}/v2/health/ready", FETCH_TIMEOUT_S)
        except OSError:
            return False
        return True

    def metrics(self) -> str:
        """The metrics of all servers that answer, in Prometheus' text format, and whether each one is ready."""
        texts = []
        for number, place in enumerate(self._places):
            if (server := self._servers.get(number)) is not None:
                with contextlib.suppress(OSError):
                    texts.append((place.label, fetch(server.metrics_url, FETCH_TIMEOUT_S).decode()))
        ready = self.health()
        own = [f"# HELP {READY_GAUGE} Whether the server takes new questions", f"# TYPE {READY_GAUGE} gauge"]
        own += [f'{READY_GAUGE}{{{place.label[0]}="{place.label[1]}"}} {int(ready[place.name])}' for place in self._places]
        return merged_metrics(texts) + "\n".join(own) + "\n"


def merged_metrics(texts: Sequence[tuple[tuple[str, str], str]]) -> str:
    """Metrics of several servers as one text: each family once, each sample with its server's label first.

    Args:
        texts: a label (name, value) and Prometheus' text format, of each server.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
    for (label, value), text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                heads = families.setdefault(family, ([], []))[0]
                if not any(head.split(" ", 3)[:3] == line.split(" ", 3)[:3] for head in heads):
                    heads.append(line)
            elif sample := SAMPLE.match(line):
                name, labels, rest = sample.groups()
                own = f'{label}="{value}"'
                families.setdefault(family or name, ([], []))[1].append(f"{name}{{{own}{',' + labels if labels else ''}}} {rest}")
    return "".join(f"{line}\n" for heads, samples in families.values() for line in (*heads, *samples))


def _gpu_names(gpus: str) -> list[str]:
    names = [name for name in re.split(r"[,\s]+", gpus.strip()) if name]
    if names == ["all"]:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise ServerError(f"--gpus all: nvidia-smi does not say which there are: {error}") from error
        visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        names = [str(number) for number in range(len(visible) or sum(line.startswith("GPU ") for line in listed.splitlines()))]
    if not names or len(set(names)) != len(names) or not all(re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", name) for name in names):
        raise ServerError(f"--gpus {gpus}: wanted numbers or UUIDs of different GPUs by commas, or all")
    return names


def _start_http(address: str, port: int, fleet: Fleet) -> http.server.ThreadingHTTPServer:
    """Answer /metrics, /v2/health/live and /v2/health/ready on a thread."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._reply(200, "text/plain; version=0.0.4", fleet.metrics())
            elif self.path == "/v2/health/live":
                self._reply(200, "application/json", "{}")
            elif self.path == "/v2/health/ready":
                ready = fleet.health()
                self._reply(200 if any(ready.values()) else 503, "application/json", json.dumps(ready))
            else:
                self._reply(404, "text/plain", "wanted /metrics, /v2/health/live or /v2/health/ready\n")

        def _reply(self, status: int, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="fleet-http", daemon=True).start()
    return server
