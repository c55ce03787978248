"""Triton's output -> a log file and a request log, both of bounded size.

In: lines on a pipe that the server writes to. Out: `tritonserver.log`, and `requests.jsonl` with one JSON object per request, which the
models log and Triton puts into a quoted string of its own format. The first faults and the last lines stay in memory for the message of a
failed start. Nothing here can block the server: what cannot be written is dropped, and reading goes on.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import logging
import logging.handlers
import os
import threading
from pathlib import Path
from typing import Any

MAX_FILE_BYTES, OLD_FILES = 16 << 20, 4
MAX_LINE_BYTES = 1 << 20
READ_BYTES = 1 << 16
EXCERPT_LINES, EXCERPT_CHARACTERS = 20, 2000
REQUEST_LOG = "requests.jsonl"
END_TIMEOUT_S = 1.0


class LogExcerpt:
    """The lines of a log that explain a failed start: its first faults, each once, or else its last lines.

    The cause comes first; at its end Triton can repeat one fault for pages.
    """

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}
        self._last: collections.deque[str] = collections.deque(maxlen=EXCERPT_LINES)

    def add(self, line: str) -> None:
        """Take the next line."""
        line = line[:EXCERPT_CHARACTERS]
        self._last.append(line)
        if len(self._faults) < EXCERPT_LINES and (line.startswith("E") or "UNAVAILABLE" in line or "error" in line.lower()):
            self._faults.setdefault(line.partition("] ")[2] or line, line)

    def lines(self) -> list[str]:
        """At most EXCERPT_LINES lines."""
        return list(self._faults.values()) or list(self._last)


def request_fields(line: str) -> dict[str, Any] | None:
    """What a model logged about a request, from a line of Triton's log; None for any other line.

    Triton writes `I1124 13:38:36.1 8619 reader_model.py:126] "MESSAGE"` with MESSAGE escaped as in JSON, or as it is where
    TRITON_SERVER_ESCAPE_LOG_MESSAGES is off.
    """
    message = line.partition("] ")[2]
    if not line.startswith("I") or not message.startswith(('"{', "{")):
        return None
    try:
        fields = json.loads(message)
        fields = json.loads(fields) if isinstance(fields, str) else fields
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and {"model", "request", "outcome"} <= fields.keys() else None


class LogPump:
    """Reads a server's output on a thread until every process that can write it has ended.

    Args:
        log: file for the server's output. Earlier output stays: after a restart the log still says what the last server died of.
        request_log: file for the requests.

    Raises:
        OSError: if a file cannot be opened.

    Attributes:
        write_fd: for the server's standard output and standard error; `close_write_end` closes it here.
    """

    def __init__(self, log: Path, request_log: Path):
        self._log, self._requests = _RotatingLines(log), _RotatingLines(request_log)
        self._excerpt = LogExcerpt()
        read_fd, self.write_fd = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(read_fd,), name="log", daemon=True)
        self._thread.start()

    def close_write_end(self) -> None:
        """Close our copy: the server has its own, or there will be no server."""
        os.close(self.write_fd)

    def excerpt(self) -> str:
        """The lines that explain a failed start, once the server has ended."""
        self.join()
        return "\n".join(self._excerpt.lines())

    def join(self) -> None:
        """Wait a moment for what the server wrote last."""
        self._thread.join(END_TIMEOUT_S)

    def _run(self, read_fd: int) -> None:
        rest = b""
        try:
            while block := os.read(read_fd, READ_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                if len(rest) > MAX_LINE_BYTES:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._take(line)
            if rest:
                self._take(rest)
        finally:
            os.close(read_fd)
            for file in (self._log, self._requests):
                with contextlib.suppress(OSError):
                    file.close()

    def _take(self, content: bytes) -> None:
        try:
            line = content.decode("utf-8", errors="replace")
            if (fields := request_fields(line)) is not None:
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
                self._requests.write(json.dumps({"time": now, **fields}, ensure_ascii=False))
            else:
                self._excerpt.add(line)
                self._log.write(line)
        except Exception:  # the server must never wait for us because of one line
            pass


class _RotatingLines(logging.handlers.RotatingFileHandler):
    """A file of lines: at MAX_FILE_BYTES it is renamed to FILE.1, FILE.1 to FILE.2, and so on; the oldest of OLD_FILES goes."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a lone surrogate, as a client may send one, is written as its JSON escape
        super().__init__(path, maxBytes=MAX_FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors="backslashreplace")

    def write(self, line: str) -> None:
        """Write one line."""
        self.emit(logging.makeLogRecord({"msg": line}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Drop the line: on a full disk the server goes on without a log."""
