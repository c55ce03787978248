"""The address of a reader, or several: host and port, model names, time-out and TLS. It opens no connection."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import socket
import ssl as tls
from collections.abc import Sequence
from typing import Any

import grpc

# gRPC's maximum: the server limits the size of a request
_MAX_MESSAGE_BYTES = 2**31 - 1
# gRPC's default grows to two minutes, too long for a caller that waits for a server to start
_MAX_RECONNECT_BACKOFF_MS = 2000
# A server whose machine is gone closes nothing: only a ping without a reply shows it, else each request waits for its time-out. Few pings
# while nothing comes: a gRPC server may end a connection that pings often.
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS, _MAX_SILENT_PINGS = 15_000, 10_000, 2
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One reader on one server.

    Attributes:
        url: "host:port" of Triton's gRPC endpoint, without a scheme. Several servers of one reader: addresses by commas, also behind
            "ipv4:" or "ipv6:". "dns:///host:port": all servers that the name has, asked for again when a connection ends.
        model: The reader's name on the server, such as "fido"; its unary model.
        stream_model: The same reader under the decoupled policy; None: `model` + "_stream".
        timeout_s: Time-out in seconds of a request that sets none; math.inf for no limit.
        ssl: Encrypt the connection. The three PEM files below are read only then.
        root_certificates: Trusted certificates; None: gRPC's default.
        private_key: The client's key, for servers that require a client certificate.
        certificate_chain: The client's certificate, with `private_key`.
    """

    url: str = "127.0.0.1:8001"
    model: str = "fido"
    timeout_s: float = 60.0
    stream_model: str | None = None
    ssl: bool = False
    root_certificates: str | None = None
    private_key: str | None = None
    certificate_chain: str | None = None

    def __post_init__(self) -> None:
        for address in self.addresses or ("",):
            if _host_and_port(address) is None and not address.startswith("unix:"):
                raise ValueError(
                    "url: wanted host:port of Triton's gRPC endpoint, such as 127.0.0.1:8001, dns:///host:port, "
                    f"or several addresses by commas, got {self.url!r}"
                )
        if not self.model:
            raise ValueError("model: wanted the name of a served model, such as fido, got an empty string")
        self.deadline_s(None)  # refuses a bad timeout_s here rather than at the first question
        if not self.ssl and (self.root_certificates or self.private_key or self.certificate_chain):
            raise ValueError("root_certificates, private_key and certificate_chain need ssl=True: only an encrypted connection uses them")
        if bool(self.private_key) != bool(self.certificate_chain):
            raise ValueError("private_key and certificate_chain go together: wanted both or neither, got one of them")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Each server's address, in the order of `url`."""
        listed = self.url
        for scheme in ("ipv4:", "ipv6:"):
            listed = listed.removeprefix(scheme)
        return tuple(address.strip() for address in listed.split(",") if address.strip())

    def each(self) -> tuple[Endpoint, ...]:
        """The same reader at one address each."""
        return tuple(dataclasses.replace(self, url=address) for address in self.addresses)

    def each_resolved(self) -> tuple[Endpoint, ...]:
        """As `each`, with every address that a "dns:" name has right now, for a transport without gRPC's own resolver.

        With TLS a name stays, since the server's certificate holds it. So does a name that is not known.
        """
        found: list[str] = []
        for address in self.addresses:
            host, port = _host_and_port(address) or ("", 0)
            places: list[Any] = []
            if address.startswith("dns:") and not self.ssl:
                with contextlib.suppress(OSError):
                    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found += [f"[{place[4][0]}]:{port}" if ":" in place[4][0] else f"{place[4][0]}:{port}" for place in places] or [address]
        return tuple(dataclasses.replace(self, url=address) for address in found)

    def host_and_port(self) -> tuple[str, int] | None:
        """The first address's parts, an IPv6 host without its brackets; None if it is not host:port."""
        return _host_and_port(self.addresses[0])

    @property
    def streaming_model(self) -> str:
        """The model that `stream` uses."""
        if self.stream_model is not None:
            return self.stream_model
        return self.model if self.model.endswith("_stream") else f"{self.model}_stream"

    def deadline_s(self, timeout_s: float | None) -> float:
        """Time-out of one request in seconds: its own, else the endpoint's.

        Raises:
            ValueError: If it is not a number above 0.
        """
        seconds = self.timeout_s if timeout_s is None else timeout_s
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ValueError(f"timeout_s: wanted seconds above 0 (math.inf for no limit), got {seconds!r}")
        return float(seconds)

    def channel_args(self) -> list[tuple[str, int | str]]:
        """The channel arguments for gRPC, complete."""
        args: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_BACKOFF_MS),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", _MAX_SILENT_PINGS),
        ]
        if self.url.startswith("dns:"):
            args.append(("grpc.lb_policy_name", "round_robin"))  # else all requests go to the first address that the name has
        if self.addresses[0].rsplit(":", 1)[0] in _LOOPBACK_HOSTS:
            # gRPC applies http_proxy to loopback too, which no proxy can reach
            args.append(("grpc.enable_http_proxy", 0))
        return args

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The TLS credentials, or None for a connection that is not encrypted.

        Raises:
            FileNotFoundError: If a PEM file does not exist.
            ValueError: If a file holds no certificate or key that TLS can use.
        """
        if not self.ssl:
            return None
        files = {name: getattr(self, name) for name in ("root_certificates", "private_key", "certificate_chain")}
        contents = {name: pathlib.Path(path).read_bytes() if path else None for name, path in files.items()}
        self._check_pem_files()
        return grpc.ssl_channel_credentials(**contents)

    def channel(self, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        """A channel to the first address; gRPC shares one connection between equal channels of a process."""
        if credentials is None:
            return grpc.insecure_channel(self.addresses[0], self.channel_args())
        return grpc.secure_channel(self.addresses[0], credentials, self.channel_args())

    def _check_pem_files(self) -> None:
        # gRPC reports a bad file as a failed connection
        context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
        if self.root_certificates:
            try:
                context.load_verify_locations(self.root_certificates)
            except tls.SSLError as error:
                raise ValueError(
                    f"root_certificates: wanted a PEM file of certificates, got {self.root_certificates} ({error.reason})"
                ) from error
        if self.private_key and self.certificate_chain:
            try:
                context.load_cert_chain(self.certificate_chain, self.private_key, password="")
            except tls.SSLError as error:
                raise ValueError(
                    "private_key, certificate_chain: wanted PEM files of a key without a password and of its certificate, "
                    f"got {self.private_key} and {self.certificate_chain} ({error.reason})"
                ) from error


def grpc_timeout_s(deadline_s: float) -> float | None:
    """The time-out in gRPC's form: None instead of infinity for no limit."""
    return None if math.isinf(deadline_s) else deadline_s


def url_of(addresses: str | Sequence[str]) -> str:
    """Several addresses as one url; an url stays.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(addresses, str):
        return addresses
    if not addresses or not all(isinstance(address, str) and address.strip() and "," not in address for address in addresses):
        raise ValueError(f"url: wanted host:port or a list of them, got {addresses!r}")
    return ",".join(addresses)


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("dns:///").removeprefix("dns:")
    if not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        return None
    return host.strip("[]"), int(port)
