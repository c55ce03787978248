"""The actor of a node or a GPU: it has a reader of its own, takes shards, and writes their results.

The reader is a server that runs already, a server that the actor starts and keeps up, or engines in the actor's process. A question that
fails where others do not is asked again alone, and then set aside. A server that does not come back makes the actor hand its shard back.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.errors import ReaderError, ReaderUnavailable, RequestRefused
from fido_client.reader_client import ReaderClient, ReaderRequest
from fido_client.request import tensors_from_request
from serving.contract.limits import Limits
from serving.launcher.endpoints import free_ports
from serving.launcher.installation import PROJECT
from serving.launcher.processes import GuardedProcess
from serving.pipeline.in_process import InProcessReader
from serving.pipeline.prompt import PromptError
from serving.pipeline.request import RequestError, read_request

from .inputs import Row, Shard, read_rows
from .results import Results, Settings

# Before each try of a question that is asked alone: what ends a server ends it again. A server with a dead model says that it is ready for
# up to 3 s (serving/launcher/supervisor.py), and is then away until it has started.
PAUSES_S = (0.0, 4.0, 8.0)
READY_POLL_S = 0.5
END_S = 10.0  # of a server at the end of its actor
# Few: a server that is gone is noticed within seconds, and what was in flight is then asked one by one.
CLIENT_RETRIES = 3


class ServerGone(RuntimeError):  # noqa: N818
    """The reader does not answer any more, whatever is asked."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where an actor's reader comes from. One of the first three is set.

    Attributes:
        url: a server that runs already, as ReaderClient takes it; the same for every actor, so "127.0.0.1:8001" is the node's own.
        repository: a model repository; every actor starts a server of it.
        engines: folder of engines, which run in the actor's process.
        model: the reader's name.
        concurrency: questions in flight of one actor.
        timeout_s: seconds that one question may take.
        wait_s: how long a server may be away, or take to start, before a shard is handed back.
    """

    url: str | None
    repository: str | None
    engines: str | None
    model: str
    concurrency: int
    timeout_s: float
    wait_s: float


class Reader(Protocol):
    """What answers questions in an actor."""

    def ask(self, requests: Sequence[ReaderRequest]) -> Iterator[Any]:
        """An answer (text, log_prob, tokens) or a ReaderError for each request, in order."""

    def is_ready(self) -> bool:
        """Whether questions can be answered now."""


class _Served:
    """A reader behind a client; with a repository, of a server that is a process of this one's."""

    def __init__(self, source: Source) -> None:
        self._server: GuardedProcess | None = None
        url = source.url or self._serve(source)
        self._concurrency = source.concurrency
        self._client = ReaderClient(url, source.model, source.timeout_s, retries=CLIENT_RETRIES)

    def ask(self, requests: Sequence[ReaderRequest]) -> Iterator[Any]:
        return self._client.answer_many(requests, self._concurrency)

    def is_ready(self) -> bool:
        if self._server is not None and self._server.popen.poll() is not None:
            raise ServerGone(f"the server ended: {self._log.read_text(errors='replace').strip()[-500:]}")
        return self._client.is_ready()

    def _serve(self, source: Source) -> str:
        """Start `python -m serving` on free ports of loopback, which keeps its server up; returns the address.

        It ends with this process, however that ends: Ray kills a process's children with it, and the guard does where Ray could not.
        """
        folder = tempfile.mkdtemp(prefix="fido-offline-")
        self._log = Path(folder) / "serving.log"
        http, grpc, metrics = free_ports(3)
        ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
        served = ["--readers", source.model, f"--repository={source.repository}", f"--log={folder}/tritonserver.log"]
        variables = {**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "serving", *served, *ports]
            self._server = GuardedProcess(command, variables, {}, log.fileno(), (), END_S, scratch=folder)
        return f"127.0.0.1:{grpc}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """An answer from the engines of this process."""

    text: str
    log_prob: float
    tokens: int


class _InProcess:
    """Engines in this process; requests are checked as a server checks them."""

    def __init__(self, source: Source) -> None:
        self._limits = Limits()
        self._reader = InProcessReader(Path(source.engines or ""), self._limits)
        self._threads = concurrent.futures.ThreadPoolExecutor(source.concurrency)

    def ask(self, requests: Sequence[ReaderRequest]) -> Iterator[Any]:
        return self._threads.map(self._one, requests)

    def is_ready(self) -> bool:
        return True

    def _one(self, request: ReaderRequest) -> _Found | ReaderError:
        try:
            checked = read_request(tensors_from_request(request), self._limits)
            found = self._reader.answer(checked.question, checked.passages, checked.titles, checked.max_new_tokens, checked.min_new_tokens)
        except ReaderError as error:
            return error
        except (RequestError, PromptError) as error:
            return RequestRefused(str(error))
        except Exception as error:
            return ReaderError(f"{type(error).__name__}: {error}")
        return _Found(found.text, sum(found.log_probs), len(found.tokens))


class ShardReader:
    """One actor: shards in, a summary of each out. Its reader starts at the first shard, so that a failure is a summary too."""

    def __init__(self, source: Source, settings: Settings, out: str) -> None:
        self._source, self._settings, self._results = source, settings, Results(out)
        self._reader: Reader | None = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Answer one shard and write its results.

        Args:
            item: the fields of a Shard.

        Returns:
            `shard`, `asked`, `set_aside`, `error` (of the first row set aside), `problem` (why the shard is not done, "" if it is),
            `seconds`, `actor`.
        """
        started_s, shard = time.monotonic(), Shard(**item)
        summary = {"shard": shard.name, "asked": 0, "set_aside": 0, "error": "", "problem": "", "seconds": 0.0, "actor": _actor()}
        try:
            if self._reader is None:
                self._reader = _InProcess(self._source) if self._source.engines else _Served(self._source)
                self._wait_until_ready(self._reader)
            kept = self._results.answered_rows(shard)
            have = set(kept["row"].to_pylist())
            rows = [row for row in read_rows(shard, self._settings.max_passages) if row.row not in have]
            if len(rows) + len(have) != shard.rows:
                raise ServerGone(f"{shard.file}: wanted {shard.rows} rows from row {shard.row} on, got {len(rows) + len(have)}")
            answers, faults = self.answered(self._reader, rows)
            self._results.write(shard, answers, kept, faults)
        except Exception as error:
            return {**summary, "problem": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - started_s}
        first = faults[0][1] if faults else ""
        return {**summary, "asked": len(rows), "set_aside": len(faults), "error": first, "seconds": time.monotonic() - started_s}

    def answered(self, reader: Reader, rows: Sequence[Row]) -> tuple[list[tuple[Row, Any]], list[tuple[Row, str]]]:
        """The rows with their answers, and those that cannot be answered with their errors.

        Raises:
            ServerGone: If the server does not come back.
        """
        answers: list[tuple[Row, Any]] = []
        faults = [(row, row.error) for row in rows if row.error]
        failed, alone = self._together(reader, [row for row in rows if not row.error], answers, faults)
        if failed:  # a dead model fails all that it is asked until the server is started again
            time.sleep(PAUSES_S[1])
            failed, more = self._together(reader, failed, answers, faults)
            alone += more
        for row in (*alone, *failed):
            for pause_s in PAUSES_S:
                time.sleep(pause_s)
                self._wait_until_ready(reader)
                (reply,) = reader.ask([self._request(row)])
                if not isinstance(reply, ReaderError) or isinstance(reply, RequestRefused):
                    break
            if isinstance(reply, ReaderError):
                faults.append((row, str(reply)))
            else:
                answers.append((row, reply))
        return answers, faults

    def _together(
        self, reader: Reader, todo: list[Row], answers: list[tuple[Row, Any]], faults: list[tuple[Row, str]]
    ) -> tuple[list[Row], list[Row]]:
        """Ask many; returns the rows that failed, and those in flight when the server went away: one of them may have ended it."""
        failed, alone = [], []
        while todo:
            self._wait_until_ready(reader)
            replies, at = reader.ask([self._request(row) for row in todo]), 0
            for row, reply in zip(todo, replies, strict=True):
                if isinstance(reply, ReaderUnavailable):
                    alone += todo[at : at + self._source.concurrency]
                    at += self._source.concurrency
                    break
                at += 1
                if isinstance(reply, RequestRefused):
                    faults.append((row, str(reply)))
                elif isinstance(reply, ReaderError):
                    failed.append(row)
                else:
                    answers.append((row, reply))
            getattr(replies, "close", lambda: None)()  # cancels what is in flight
            todo = todo[at:]
        return failed, alone

    def _request(self, row: Row) -> ReaderRequest:
        assert row.example is not None
        passages = [context.as_passage() for context in row.example.contexts]
        return ReaderRequest(row.example.question, passages, max_new_tokens=self._settings.max_new_tokens)

    def _wait_until_ready(self, reader: Reader) -> None:
        deadline_s = time.monotonic() + self._source.wait_s
        while not reader.is_ready():
            if time.monotonic() > deadline_s:
                raise ServerGone(f"{self._source.model} at {self._source.url or 'its own server'}: not ready for {self._source.wait_s:g} s")
            time.sleep(READY_POLL_S)


def _actor() -> str:
    return f"{socket.gethostname()}/{threading.get_native_id()}"
