"""The server's ports: which are free, which is taken and by whose option, what a port answers over HTTP, and TLS on one of them.

What is wrong with a PEM file is said here: Triton reports a port in use.
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
import urllib.request
from pathlib import Path

from .installation import ServerError

LOOPBACK = "127.0.0.1"
PORT_OPTIONS = ("--http-port", "--grpc-port", "--metrics-port")
# How long a port may stay taken: children of a server that was just killed hold its ports for a moment.
RELEASE_TIMEOUT_S, RELEASE_POLL_S = 1.0, 0.05
# No proxy: the server is on this machine, whatever the environment says of other hosts.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PortError(ServerError):
    """A port that the server cannot listen on. Another start does not help."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


def require_free_ports(address: str, ports: tuple[int, int, int]) -> None:
    """Refuse ports that the server could not bind.

    Args:
        address: that the server binds to.
        ports: HTTP, gRPC and metrics.

    Raises:
        PortError: naming every such port, its option and the cause.
    """
    faults = []
    for option, port in zip(PORT_OPTIONS, ports, strict=True):
        if same := [other for other, number in zip(PORT_OPTIONS, ports, strict=True) if number == port and other != option]:
            faults.append(f"{option} {port}: also the port of {' and '.join(same)}; choose another")
        elif cause := _bind_fault(address, port):
            faults.append(f"{option} {port}: {cause}")
    if faults:
        raise PortError("; ".join(faults))


def fetch(url: str, timeout_s: float) -> bytes:
    """The body of a successful answer.

    Raises:
        OSError: if nobody answers in time, or not with success.
    """
    with _OPENER.open(url, timeout=timeout_s) as response:
        return bytes(response.read())


def _bind_fault(address: str, port: int) -> str | None:
    """Why nobody can listen on a port; None if one can."""
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while True:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, kind, protocol) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton: a connection that has ended does not count
                s.bind(place)
                s.listen()
            return None
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None)
            if number == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(RELEASE_POLL_S)
                continue
            if number == errno.EADDRINUSE:
                return f"another process listens on {address}:{port}; stop it or choose another port"
            if number == errno.EACCES:
                return f"this user may not listen on {address}:{port}; choose a port above 1023"
            if isinstance(error, socket.gaierror) or number == errno.EADDRNOTAVAIL:
                return f"--address {address}: no address of this machine"
            return f"cannot listen on {address}:{port}: {error}"


def tls_arguments(certificate: Path | None, key: Path | None, root: Path | None) -> list[str]:
    """Arguments for TLS on the gRPC port, none without a certificate. The HTTP port has no TLS of its own: put a proxy before it.

    Args:
        certificate: of the server.
        key: private key of the certificate, without a passphrase.
        root: certificate that must have signed the clients' certificates; None asks clients for none.

    Raises:
        ServerError: naming the option and the file that cannot be used, and why.
    """
    if certificate is None or key is None:
        return []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for option, path in (("--tls-certificate", certificate), ("--tls-key", key), ("--tls-root", root)):
        if path is not None:
            _require_pem(option, path)
    try:
        context.load_cert_chain(certificate, key, password=_refuse_passphrase)
    except (ssl.SSLError, ValueError) as error:
        raise ServerError(
            f"--tls-certificate {certificate} and --tls-key {key}: not a certificate with its private key: {error}"
        ) from error
    arguments = ["--grpc-use-ssl=true", f"--grpc-server-cert={certificate}", f"--grpc-server-key={key}"]
    if root is None:
        return arguments
    try:
        context.load_verify_locations(root)
    except ssl.SSLError as error:
        raise ServerError(f"--tls-root {root}: wanted a certificate: {error}") from error
    return [*arguments, "--grpc-use-ssl-mutual=true", f"--grpc-root-cert={root}"]


def _require_pem(option: str, path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ServerError(f"{option} {path}: cannot be read: {error.strerror}") from error
    if b"-----BEGIN" not in content:
        raise ServerError(f"{option} {path}: wanted a PEM file (-----BEGIN ...), got {len(content)} bytes of something else")


def _refuse_passphrase() -> str:
    raise ValueError("the key has a passphrase, which Triton cannot ask for; remove it (openssl pkey)")
