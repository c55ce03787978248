"""A scripted server for each test, and the two clients behind one face, so that each fact is tested of both."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from fido_client.reader_client import AsyncReaderClient, ReaderClient, StreamedAnswer, StreamPiece
from tests.clients.scripted_server import ScriptedServer


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


class SyncFace:
    """ReaderClient, a new one for each call."""

    def answer(self, url: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        with ReaderClient(url, **(client or {})) as reader:
            return reader.answer(*args, **kwargs)

    def answer_many(self, url: str, requests: Iterable[Any], client: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        with ReaderClient(url, **(client or {})) as reader:
            return list(reader.answer_many(requests, **kwargs))

    def stream(self, url: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> tuple[list[StreamPiece], StreamedAnswer]:
        with ReaderClient(url, **(client or {})) as reader, reader.stream(*args, **kwargs) as stream:
            return list(stream), stream.answer

    def stream_first_piece(self, url: str, *args: Any, leave: bool) -> None:
        """Read one piece; then leave the stream before the client is closed, or not."""
        with ReaderClient(url) as reader:
            stream = reader.stream(*args)
            next(stream)
            if leave:
                stream.close()

    def is_ready(self, url: str, model: str) -> bool:
        with ReaderClient(url, model) as reader:
            return reader.is_ready()


class AsyncFace:
    """AsyncReaderClient, a new one and a new event loop for each call."""

    def answer(self, url: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncReaderClient(url, **(client or {})) as reader:
                return await reader.answer(*args, **kwargs)

        return asyncio.run(run())

    def answer_many(self, url: str, requests: Iterable[Any], client: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        async def run() -> list[Any]:
            async with AsyncReaderClient(url, **(client or {})) as reader:
                return [result async for result in reader.answer_many(requests, **kwargs)]

        return asyncio.run(run())

    def stream(self, url: str, *args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> tuple[list[StreamPiece], StreamedAnswer]:
        async def run() -> tuple[list[StreamPiece], StreamedAnswer]:
            async with AsyncReaderClient(url, **(client or {})) as reader, reader.stream(*args, **kwargs) as stream:
                return [piece async for piece in stream], stream.answer

        return asyncio.run(run())

    def stream_first_piece(self, url: str, *args: Any, leave: bool) -> None:
        async def run() -> None:
            async with AsyncReaderClient(url) as reader:
                stream = reader.stream(*args)
                await anext(stream)
                if leave:
                    await stream.aclose()

        asyncio.run(run())

    def is_ready(self, url: str, model: str) -> bool:
        async def run() -> bool:
            async with AsyncReaderClient(url, model) as reader:
                return await reader.is_ready()

        return asyncio.run(run())


@pytest.fixture(params=[SyncFace, AsyncFace], ids=["sync", "asyncio"])
def reader(request: pytest.FixtureRequest) -> Any:
    return request.param()
