"""What the commands share: exit codes, errors of the command line, the connection."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from ..data.json_values import DataFileError
from ..reader_client import ReaderClient

EXIT_OK, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 0, 130, 141
EXIT_SOME_FAILED = EXIT_USAGE = EXIT_ALL_FAILED = 1  # as every command of this project; argparse itself ends with 2


class UsageError(Exception):
    """The command line or a file that it names is invalid; no question was sent."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn unreadable files and invalid settings into errors of the command line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    except DataFileError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def client_of(args: argparse.Namespace, model: str) -> ReaderClient:
    """The client that the connection's options describe."""
    return ReaderClient(
        args.url,
        model,
        args.timeout_s,
        retries=args.retries,
        ssl=args.ssl,
        root_certificates=args.root_certificates,
        private_key=args.private_key,
        certificate_chain=args.certificate_chain,
        transport=args.transport,
    )


def milliseconds(seconds: float | None) -> float | None:
    """Milliseconds with one digit after the point; None stays None."""
    return None if seconds is None else round(seconds * 1000, 1)
