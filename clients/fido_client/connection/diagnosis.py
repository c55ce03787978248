"""Why a reader is not available: a failed request -> a sentence that says the cause and what to do.

A failed connection is explained by one probe of the server's port, an unknown model by the list of those that the server has.

gRPC reports a TLS mismatch, an HTTP port and a missing client certificate as "Socket closed" or as codes of its TLS library. The probe
opens a socket of its own, sends the first bytes of HTTP/2 and reads the first bytes of the reply. It sends no request.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator

import grpc

from .endpoint import Endpoint
from .served_models import reader_names

_KEPT_S = 5.0  # many requests may fail for one cause
_PROBE_TIMEOUT_S = 2.0
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and an empty SETTINGS frame
_SETTINGS_FRAME = 4
# gRPC writes these itself; other messages with the status UNAVAILABLE are the server's own
_CONNECTION_FAILURES = ("failed to connect", "resolving", "resolution", "Socket closed", "handshake", "Connection re", "recvmsg", "GOAWAY")


class Diagnosis:
    """The causes of one client's failures, each looked for at most once in five seconds; safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._found: dict[str, tuple[float, str | None]] = {}

    def hint(self, status: str | None, message: str) -> str | None:
        """Why the reader is not available, and what to do; None if nothing is known beyond the message. Takes a few seconds at most."""
        if status != "NOT_FOUND" and not _is_connection_failure(status, message):
            return None
        with self._lock:
            at_s, hint = self._found.get(status or "", (-_KEPT_S, None))
            if time.monotonic() - at_s >= _KEPT_S:
                hint = known_readers(self._endpoint) if status == "NOT_FOUND" else cause_of_failure(self._endpoint)
                self._found[status or ""] = time.monotonic(), hint
        return hint


def known_readers(endpoint: Endpoint) -> str | None:
    """The readers that the server has, in words; None if it does not say."""
    try:
        names = reader_names(endpoint)
    except grpc.RpcError:
        return None
    return f"the server has the readers {', '.join(names)}" if names else "the server has no readers"


def _is_connection_failure(status: str | None, message: str) -> bool:
    """Whether gRPC failed to connect or lost the connection, as opposed to an error that the server sent."""
    return status == "UNAVAILABLE" and any(words in message for words in _CONNECTION_FAILURES)


def cause_of_failure(endpoint: Endpoint) -> str | None:
    """The cause of a failed connection and what to do; None if the probe connects as gRPC does. Takes a few seconds at most."""
    address = endpoint.host_and_port()
    if address is None:
        return None
    host, port = address
    try:
        with socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S):
            pass
    except socket.gaierror:
        return f"the host name {host} is not known: check the address"
    except ConnectionRefusedError:
        return f"nothing listens on port {port}: is the server running there, and is this its gRPC port?"
    except OSError as error:
        return f"{host} does not respond ({error.strerror or 'timed out'}): check the address and the network"
    return _cause_with_tls(endpoint, host, port) if endpoint.ssl else _cause_without_tls(host, port)


def _cause_without_tls(host: str, port: int) -> str | None:
    reply = _reply(host, port)
    if _is_http2(reply):
        return None
    try:
        with _tls_connection(host, port, _trusting_context()):
            speaks_tls = True
    except ssl.SSLError as error:
        speaks_tls = _is_alert(error)  # a server that requires a client certificate may refuse the greeting, in TLS
    except OSError:
        speaks_tls = False
    if speaks_tls:
        return f"port {port} speaks TLS: set ssl=True (--ssl) and, for a certificate of your own, root_certificates (--root-certificates)"
    return _not_grpc(port, reply)


def _cause_with_tls(endpoint: Endpoint, host: str, port: int) -> str | None:
    plain_reply = _reply(host, port)
    if _is_http2(plain_reply):
        return f"port {port} does not encrypt: leave out ssl=True (--ssl), or give the server a certificate"
    trusting, verifying = _trusting_context(), ssl.create_default_context(cafile=endpoint.root_certificates)
    verifying.set_alpn_protocols(["h2"])
    for context in (trusting, verifying):
        if endpoint.private_key and endpoint.certificate_chain:
            context.load_cert_chain(endpoint.certificate_chain, endpoint.private_key, password="")
    try:
        with _tls_connection(host, port, verifying):
            pass
        reply = _reply(host, port, trusting)  # TLS 1.3 reports a missing client certificate after the handshake
    except ssl.SSLCertVerificationError as error:
        return (
            f"the server's certificate is not trusted ({error.verify_message}): "
            "give the certificate that signed it as root_certificates (--root-certificates), and connect by a name that it holds"
        )
    except ssl.SSLError as error:
        return _refused(endpoint, (error.reason or "").replace("_", " ").lower()) if _is_alert(error) else _not_grpc(port, plain_reply)
    except OSError:
        return _not_grpc(port, plain_reply)
    return None if _is_http2(reply) else _refused(endpoint, "it closed the connection")


def _refused(endpoint: Endpoint, reason: str) -> str:
    if endpoint.private_key is not None:
        return f"the server refused the TLS connection ({reason}): check that it trusts the client's certificate"
    return (
        f"the server refused the TLS connection ({reason}): it may require a client's certificate, "
        "private_key and certificate_chain (--private-key, --certificate-chain)"
    )


def _not_grpc(port: int, reply: bytes) -> str:
    protocol = "speaks HTTP/1, not gRPC" if reply.startswith(b"HTTP/1") else "does not speak gRPC"
    return f"port {port} {protocol}: give Triton's gRPC port, 8001 by default"


def _trusting_context() -> ssl.SSLContext:
    """TLS without verification: the probe sends nothing but the first bytes of HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@contextlib.contextmanager
def _tls_connection(host: str, port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
        yield tls


def _reply(host: str, port: int, context: ssl.SSLContext | None = None) -> bytes:
    """The first bytes of the server's reply to the start of HTTP/2; empty if it sends none or closes the connection.

    Raises:
        ssl.SSLError: If the server refuses the TLS connection.
    """
    try:
        with contextlib.ExitStack() as resources:
            if context is None:
                connection = resources.enter_context(socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S))
            else:
                connection = resources.enter_context(_tls_connection(host, port, context))
            connection.sendall(_HTTP2_PREFACE)
            return connection.recv(64)
    except ssl.SSLError:
        raise
    except OSError:
        return b""


def _is_http2(reply: bytes) -> bool:
    """Whether the reply opens with a SETTINGS frame, as every HTTP/2 server's does."""
    return len(reply) >= 9 and reply[3] == _SETTINGS_FRAME


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the peer sent a TLS alert, which only a TLS server does."""
    return "ALERT" in (error.reason or "").upper()
