"""Why a server cannot be reached: the true cause of each kind, from real sockets and real TLS, of both clients."""

import asyncio
import contextlib
import http.server
import pathlib
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fido_client import AsyncReaderClient, ReaderClient, ReaderRequest, ReaderUnavailable
from tests.clients.scripted_server import Refusal, ScriptedServer

TESTDATA = pathlib.Path(__file__).parent / "testdata"
KEY, CERTIFICATE = TESTDATA / "tls_key.pem", TESTDATA / "tls_certificate.pem"
TRUSTING = {"ssl": True, "root_certificates": str(CERTIFICATE)}


@contextlib.contextmanager
def _tls_server(*, wants_client_certificate: bool = False) -> Iterator[ScriptedServer]:
    pairs = [(KEY.read_bytes(), CERTIFICATE.read_bytes())]
    scripted = ScriptedServer(grpc.ssl_server_credentials(pairs, CERTIFICATE.read_bytes(), wants_client_certificate))
    try:
        yield scripted
    finally:
        scripted.stop()


@contextlib.contextmanager
def _http_server(*, with_tls: bool) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if with_tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE, KEY)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _cause(reader: Any, url: str, client: dict[str, Any] | None = None) -> str:
    with pytest.raises(ReaderUnavailable) as caught:
        reader.answer(url, "q", ["p"], timeout_s=10, client=client)
    assert "\n" not in str(caught.value)
    assert caught.value.message  # gRPC's own words
    return str(caught.value)


def test_plain_client_on_a_tls_port_is_sent_to_ssl(reader: Any) -> None:
    with _tls_server() as scripted:
        assert f"port {scripted.port} speaks TLS: set ssl=True (--ssl)" in _cause(reader, scripted.url)
    with _tls_server(wants_client_certificate=True) as scripted:
        assert f"port {scripted.port} speaks TLS: set ssl=True (--ssl)" in _cause(reader, scripted.url)


def test_tls_client_on_a_plain_port_is_sent_away_from_ssl(server: ScriptedServer, reader: Any) -> None:
    for settings in (TRUSTING, {"ssl": True}):
        assert f"port {server.port} does not encrypt: leave out ssl=True (--ssl)" in _cause(reader, server.url, settings)


def test_certificate_that_is_not_trusted_is_named_with_the_reason(reader: Any) -> None:
    with _tls_server() as scripted:
        assert "certificate is not trusted (self" in _cause(reader, scripted.url, {"ssl": True})


def test_certificate_of_another_name_is_named(reader: Any) -> None:
    with _tls_server() as scripted:
        # 127.1 is the same address, but the certificate holds 127.0.0.1 and localhost
        text = _cause(reader, f"127.1:{scripted.port}", TRUSTING)
    assert "is not trusted (" in text and "mismatch" in text


def test_missing_client_certificate_is_named(reader: Any) -> None:
    with _tls_server(wants_client_certificate=True) as scripted:
        assert "it may require a client's certificate, private_key and certificate_chain" in _cause(reader, scripted.url, TRUSTING)
        own = {**TRUSTING, "private_key": str(KEY), "certificate_chain": str(CERTIFICATE)}
        assert reader.answer(scripted.url, "q", ["p"], client=own).text == "Paris"


@pytest.mark.parametrize("settings", [{}, TRUSTING], ids=["plain", "tls"])
def test_http_port_is_named(reader: Any, settings: dict[str, Any]) -> None:
    with _http_server(with_tls=False) as url:
        text = _cause(reader, url, settings)
    assert "give Triton's gRPC port, 8001 by default" in text and "gRPC" in text


def test_unknown_host_and_closed_port_are_told_apart(reader: Any) -> None:
    assert "the host name nohost.invalid is not known" in _cause(reader, "nohost.invalid:8001")
    assert "nothing listens on port 9: is the server running there" in _cause(reader, "127.0.0.1:9")


def test_streams_and_many_questions_say_the_cause_too(reader: Any) -> None:
    with _tls_server() as scripted:
        with pytest.raises(ReaderUnavailable, match="speaks TLS"):
            reader.stream(scripted.url, "q", ["p"])
        results = reader.answer_many(scripted.url, [ReaderRequest("q", ["p"])] * 20)
    assert len(results) == 20
    assert all(isinstance(result, ReaderUnavailable) and "speaks TLS" in str(result) for result in results)


def test_a_port_is_probed_once_for_many_failures() -> None:
    connections = 0
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def close_all() -> None:
            nonlocal connections
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()
                    connections += 1

        thread = threading.Thread(target=close_all, daemon=True)
        thread.start()
        with ReaderClient(f"127.0.0.1:{listening.getsockname()[1]}") as client:
            results = list(client.answer_many([ReaderRequest("q", ["p"])] * 200, concurrency=50))
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert len(results) == 200 and all("does not speak gRPC" in str(result) for result in results)
    assert connections < 20


def test_a_full_server_keeps_its_own_words_and_is_not_probed(server: ScriptedServer, reader: Any) -> None:
    def full(received: Any, context: Any) -> Any:
        raise Refusal("fido: 512 questions in flight", grpc.StatusCode.UNAVAILABLE)

    server.on_infer = full
    assert _cause(reader, server.url).endswith("(UNAVAILABLE): fido: 512 questions in flight")


def test_unknown_model_is_answered_with_the_known_readers(server: ScriptedServer, reader: Any) -> None:
    def unknown(received: Any, context: Any) -> Any:
        raise Refusal(f"Request for unknown model: '{received.model}' is not found", grpc.StatusCode.NOT_FOUND)

    server.on_infer, server.models = unknown, {"nq": {}, "trivia": {}}
    text = _cause(reader, server.url, {"model": "nw"})
    assert text.endswith("'nw' is not found; the server has the readers nq, trivia")
    server.models = {}
    assert _cause(reader, server.url, {"model": "nw"}).endswith("the server has no readers")


@pytest.mark.parametrize("kind", [ReaderClient, AsyncReaderClient])
def test_pem_files_that_tls_cannot_use_are_refused_at_the_start(kind: Any, tmp_path: pathlib.Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for settings, message in [
        ({"root_certificates": str(KEY)}, "root_certificates: wanted a PEM file of certificates, got .*tls_key.pem"),
        ({"root_certificates": str(empty)}, "root_certificates: wanted a PEM file of certificates, got .*empty.pem"),
        ({"private_key": str(CERTIFICATE), "certificate_chain": str(KEY)}, "private_key, certificate_chain: wanted PEM files"),
    ]:
        with pytest.raises(ValueError, match=message):
            kind(ssl=True, **settings)
    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        kind(ssl=True, private_key="none.pem", certificate_chain=str(CERTIFICATE))
    with pytest.raises(IsADirectoryError):
        kind(ssl=True, root_certificates=str(tmp_path))


@pytest.mark.parametrize(
    "url", ["localhost", "localhost:", "localhost:grpc", "localhost:0", "localhost:70000", ":8001", "http://localhost:8001"]
)
def test_addresses_that_cannot_be_right_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url: wanted host:port"):
        ReaderClient(url)


# one AsyncReaderClient in several event loops


def test_one_asyncio_client_works_in_one_event_loop_after_another(server: ScriptedServer) -> None:
    client = AsyncReaderClient(server.url)

    async def use() -> tuple[str, str, str]:
        async with client.stream("q", ["p"]) as stream:
            streamed = (await stream.read_to_end()).text
        (many,) = [result async for result in client.answer_many([ReaderRequest("q", ["p"])])]
        assert not isinstance(many, Exception)
        return (await client.answer("q", ["p"])).text, streamed, many.text

    for _ in range(3):
        assert asyncio.run(use()) == ("Paris", "Paris", "Paris")
    asyncio.run(client.aclose())
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(use())


def test_one_asyncio_client_works_in_the_event_loops_of_several_threads_at_once(server: ScriptedServer) -> None:
    together = threading.Barrier(3)
    client = AsyncReaderClient(server.url)
    texts: list[str] = []

    async def use() -> None:
        await client.answer("q", ["p"])
        await asyncio.to_thread(together.wait, 10)  # all three loops run now
        texts.extend([(await client.answer("q", ["p"])).text for _ in range(20)])

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert texts == ["Paris"] * 60
