"""PEM files -> arguments for tritonserver that encrypt gRPC. What is wrong with a file is said here: Triton reports a port in use."""

from __future__ import annotations

import ssl
from pathlib import Path

from .installation import ServerError


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
