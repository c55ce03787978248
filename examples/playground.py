"""`make play`: a page that asks FiD and FiDO side by side, served on loopback beside Triton until Ctrl-C.

Passages are pasted, or found by BM25 in the demo corpus. `POST /ask` streams JSON lines, one event a line: `passages`, then the `piece`s
and one `answer` or `error` of each reader. The same process answers OpenAI's chat completions (chat_completions.py). Readers are asked over
HTTP: a browser that leaves in the middle of an answer, or this process killed, cannot harm the server.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from examples.chat_completions import ApiError, completion, completion_chunks, model_list
from examples.demo import READERS, REPOSITORY
from fido_client import ReaderClient, ReaderError, RequestRefused
from serving.launcher.server import LOOPBACK, TritonServer, models_of

PAGE = Path(__file__).with_suffix(".html")
BODY_BYTES = 1 << 20
N_PASSAGES = 10
MAX_N_BEST = 10
LOCAL_NAMES = ("127.0.0.1", "localhost")
# Nothing from elsewhere can be loaded, and nothing can be sent elsewhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'"

Passage = dict[str, Any]
Search = Callable[[str, int], list[Passage]]
Event = dict[str, Any]


def corpus_search() -> Search:
    """BM25 over the demo corpus: a question and a count -> passages with "title", "text" and "bm25", best first."""
    from training.corpus.relations import load_passages
    from training.corpus.retrieval import PassageIndex

    passages = load_passages()
    index = PassageIndex(passages)

    def search(question: str, n_passages: int) -> list[Passage]:
        return [
            {"title": passages[position].title, "text": passages[position].text, "bm25": round(score, 2)}
            for position, score in index.search(question, n_passages)
        ]

    return search


class Playground(ThreadingHTTPServer):
    """The page's server.

    Args:
        http_url: host:port of Triton's HTTP endpoint.
        metrics_url: URL of Triton's metrics, which the page links to.
        search: finds passages for a question that comes without.
        readers: names of readers that are served with streaming.
        port: to listen on; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, http_url: str, metrics_url: str, search: Search, readers: Sequence[str] = READERS, port: int = 0):
        super().__init__((LOOPBACK, port), Handler)
        self.clients = {name: ReaderClient(http_url, name, transport="http") for name in readers}
        self.search, self.metrics_url = search, metrics_url

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def events(self, asked: dict[str, Any]) -> Iterator[Event]:
        """What `/ask` sends. Closing the iterator leaves the unfinished answers."""
        question, passages = asked.get("question"), asked.get("passages")
        if not isinstance(question, str) or not question.strip():
            raise ApiError(400, f"question: wanted some text, got {question!r}")
        n_best = asked.get("n_best", 1)
        if type(n_best) is not int or not 1 <= n_best <= MAX_N_BEST:
            raise ApiError(400, f"n_best: wanted a number from 1 to {MAX_N_BEST}, got {n_best!r}")
        if passages is None:
            passages = self.search(question, N_PASSAGES)
        yield {"event": "passages", "passages": [p if isinstance(p, dict) else {"text": p} for p in passages]}
        # the readers read title and text; the rest is for the page
        given = [{k: p[k] for k in ("title", "text") if k in p} if isinstance(p, dict) else p for p in passages]
        left = threading.Event()
        at_once = asked.get("at_once") is True
        groups = [list(self.clients)] if at_once else [[name] for name in self.clients]
        try:
            for group in groups:
                arrived: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
                for name in group:
                    threading.Thread(target=self._read, args=(name, question, given, n_best, arrived, left), daemon=True).start()
                running = len(group)
                while running:
                    event = arrived.get()
                    if event is None:
                        running -= 1
                    else:
                        yield event
        finally:
            left.set()

    def _read(
        self, name: str, question: str, passages: list[Any], n_best: int, arrived: queue.SimpleQueue[Event | None], left: threading.Event
    ) -> None:
        try:
            with self.clients[name].stream(question, passages) as stream:
                for piece in stream:
                    if left.is_set():
                        return
                    arrived.put({"event": "piece", "reader": name, "text": piece.text})
                arrived.put({"event": "answer", "reader": name, **dataclasses.asdict(stream.answer)})
            if n_best > 1 and not left.is_set():  # a stream has no beams
                arrived.put({"event": "n_best", "reader": name, **self._n_best(name, question, passages, n_best)})
        except ReaderError as error:
            arrived.put({"event": "error", "reader": name, "message": str(error)})
        except Exception as error:  # whatever it is, the page must not wait for ever
            arrived.put({"event": "error", "reader": name, "message": f"{type(error).__name__}: {error}"})
        finally:
            arrived.put(None)

    def _n_best(self, name: str, question: str, passages: list[Any], n_best: int) -> Event:
        try:
            found = self.clients[name].answer(question, passages, num_beams=n_best, num_answers=n_best)
        except RequestRefused as error:  # an engine without beam search, or a smaller limit
            return {"message": str(error)}
        return {"answers": found.answers, "log_probs": found.answer_log_probs, "latency_s": found.latency_s}


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser or an OpenAI client. A response without length ends with its connection."""

    server: Playground

    def do_GET(self) -> None:
        """The page, what it links to, and the list of models."""
        if not self._is_local():
            return
        if self.path == "/":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/about":
            self._send_json(200, {"readers": list(self.server.clients), "metrics": self.server.metrics_url})
        elif self.path == "/v1/models":
            self._send_json(200, model_list(self.server.clients))
        else:
            self._refuse(ApiError(404, f"{self.path}: no such page; there are /, /about and /v1/models"))

    def do_POST(self) -> None:
        """`/ask` and `/v1/chat/completions`."""
        if not self._is_local():
            return
        try:
            asked = self._body()
            if self.path == "/ask":
                self._stream((json.dumps(event, ensure_ascii=False) + "\n" for event in _opened(self.server.events(asked))), "x-ndjson")
            elif self.path == "/v1/chat/completions":
                if asked.get("stream"):
                    chunks = _opened(completion_chunks(asked, self.server.clients, self.server.search))
                    self._stream((f"data: {chunk}\n\n" for chunk in chunks), "event-stream")
                else:
                    self._send_json(200, completion(asked, self.server.clients, self.server.search))
            else:
                raise ApiError(404, f"{self.path}: no such page; there are /ask and /v1/chat/completions")
        except ApiError as error:
            self._refuse(error)

    def log_message(self, format: str, *arguments: object) -> None:
        """Triton's request log has the questions."""

    def _is_local(self) -> bool:
        """Whether the request names this machine and comes from this page: another site could lead a browser here under its own name."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        origin = self.headers.get("Origin")
        if host in LOCAL_NAMES and origin in (None, f"http://{self.headers.get('Host')}"):
            return True
        self._refuse(ApiError(403, f"wanted {' or '.join(LOCAL_NAMES)} and its own page, got host {host!r}, origin {origin!r}"))
        return False

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BODY_BYTES:
            if length.isdecimal():  # a client that is still sending when the connection closes does not see why
                self.rfile.read(min(int(length), 4 * BODY_BYTES))
            raise ApiError(413, f"Content-Length: wanted at most {BODY_BYTES} bytes, got {length or 'none'}")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise ApiError(400, f"body: wanted a JSON object, got what is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ApiError(400, f"body: wanted a JSON object, got {type(value).__name__}")
        return value

    def _stream(self, lines: Iterator[str], kind: str) -> None:
        self._head(200, f"{'application' if kind == 'x-ndjson' else 'text'}/{kind}; charset=utf-8")
        try:
            for line in lines:
                self.wfile.write(line.encode())
        except ConnectionError:
            pass  # the browser has left
        finally:
            lines.close()  # type: ignore[attr-defined]

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), "application/json")

    def _refuse(self, error: ApiError) -> None:
        self._send_json(error.status, {"error": {"message": str(error), "type": error.kind, "param": None, "code": None}})

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def _opened(events: Iterator[Any]) -> Iterator[Any]:
    """The same events; what is wrong with the request is raised here, before any status line is sent."""
    first = next(events)

    def rest() -> Iterator[Any]:
        try:
            yield first
            yield from events
        finally:
            events.close()  # type: ignore[attr-defined]

    return rest()


def main() -> int:
    """Start Triton on the demo readers and the page beside it, until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m examples.playground", description=main.__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the page, on loopback (default: 8080; 0: a free one)")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    print("starting Triton and the index ...", flush=True)
    with TritonServer(models_of(READERS, stream=True), REPOSITORY) as triton:
        try:
            page = Playground(f"{LOOPBACK}:{triton.http_port}", triton.metrics_url, corpus_search(), port=arguments.port)
        except OSError as error:
            print(f"error: port {arguments.port}: {error.strerror}; choose another: make play PLAY_PORT=8090", file=sys.stderr)
            return 1
        with page:
            threading.Thread(target=page.serve_forever, daemon=True).start()
            print(f"playground    {page.url}   (Ctrl-C stops)\nOpenAI API    {page.url}v1\nmetrics       {triton.metrics_url}", flush=True)
            stop.wait()
            page.shutdown()
    print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
