"""FidoRunnable: a reader as a Runnable of LangChain (pip install langchain-core).

chain = {"question": RunnablePassthrough(), "documents": retriever} | FidoRunnable("127.0.0.1:8001", model="fido")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, TypedDict

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig

from ..reader_client import ReaderClient


class FidoInput(TypedDict):
    """A question and the documents to answer it from."""

    question: str
    documents: list[Document]


class FidoRunnable(Runnable[FidoInput, dict[str, Any]]):
    """Answers `{"question", "documents"}`. A document's page_content is the passage, and its metadata "title" the title.

    The output has "answer", "log_prob", "tokens" and "documents": the same ones, the most used first, each with the reader's score in
    metadata["reader_score"]. A stream's first outputs have only "answer", a part each; the last one has the rest, so that their sum is the
    whole output. A stream needs the reader's streaming model on the server.

    Args:
        url: "host:port" of Triton's endpoint.
        model: The reader's name on the server.
        options: ReaderClient's other arguments.
    """

    def __init__(self, url: str = "127.0.0.1:8001", model: str = "fido", **options: Any) -> None:
        self._client = ReaderClient(url, model, **options)

    def invoke(self, input: FidoInput, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """One answer; `kwargs` are max_new_tokens, min_new_tokens and timeout_s.

        Raises:
            ReaderError: If the request is refused, or the server failed.
        """

        def ask(asked: FidoInput) -> dict[str, Any]:
            answer = self._client.answer(asked["question"], _passages(asked), **kwargs)
            return {"answer": answer.text, **_totals(answer, asked)}

        return self._call_with_config(ask, input, config)

    def stream(self, input: FidoInput, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """The answer in parts, then the rest."""

        def ask(inputs: Iterator[FidoInput]) -> Iterator[dict[str, Any]]:
            for asked in inputs:
                with self._client.stream(asked["question"], _passages(asked), **kwargs) as stream:
                    for piece in stream:
                        yield {"answer": piece.text}
                    yield _totals(stream.answer, asked)

        yield from self._transform_stream_with_config(iter([input]), ask, config)

    async def astream(self, input: FidoInput, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        """The answer whole: asynchronous callers that want parts use AsyncReaderClient."""
        yield await self.ainvoke(input, config, **kwargs)


def _passages(asked: FidoInput) -> list[dict[str, str]]:
    return [{"text": document.page_content, "title": str(document.metadata.get("title", ""))} for document in asked["documents"]]


def _totals(answer: Any, asked: FidoInput) -> dict[str, Any]:
    scores = answer.passage_scores or (0.0,) * len(asked["documents"])
    read = [
        document.model_copy(update={"metadata": {**document.metadata, "reader_score": score}})
        for score, document in sorted(zip(scores, asked["documents"]), key=lambda pair: -pair[0])
    ]
    return {"log_prob": answer.log_prob, "tokens": answer.tokens, "documents": read}
