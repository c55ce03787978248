"""What the commands share: exit codes, errors of the command line, the connection, a line that counts up to a total."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

from ..data.json_values import DataFileError
from ..reader_client import ReaderClient

EXIT_OK, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 0, 130, 141
EXIT_SOME_FAILED = EXIT_USAGE = EXIT_ALL_FAILED = 1  # as every command of this project; argparse itself ends with 2
_REDRAW_S = 0.2


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


class Progress:
    """Counts what is done, and what it took so far; silent where standard error is not a terminal, to keep logs readable."""

    def __init__(self, total: int, label: str) -> None:
        self._total = total
        self._label = label
        self._done = 0
        self._start_s = time.monotonic()
        self._drawn_s = 0.0
        self._is_shown = sys.stderr.isatty()

    def update(self) -> None:
        """Count one more."""
        self._done += 1
        now_s = time.monotonic()
        if self._is_shown and (now_s - self._drawn_s >= _REDRAW_S or self._done == self._total):
            self._drawn_s = now_s
            print(f"\r{self._label}: {self._done} of {self._total}, {now_s - self._start_s:.0f} s ", end="", file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print a line above the count."""
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the count from the screen."""
        if self._is_shown and self._drawn_s:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
