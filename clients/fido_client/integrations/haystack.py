"""FidoReader: a reader as a component of Haystack 2 (pip install haystack-ai).

pipeline.add_component("reader", FidoReader("127.0.0.1:8001", model="fido"))
pipeline.connect("retriever.documents", "reader.documents")
"""

from __future__ import annotations

from typing import Any, Optional

from haystack import Document, GeneratedAnswer, component, default_from_dict, default_to_dict
from haystack.dataclasses import StreamingChunk
from haystack.dataclasses.streaming_chunk import StreamingCallbackT
from haystack.utils import deserialize_callable, serialize_callable

from ..reader_client import ReaderClient


@component
class FidoReader:
    """Answers a query from documents. A document's content is the passage, and its meta field "title" the title.

    Args:
        url: "host:port" of Triton's gRPC endpoint, or of its HTTP endpoint with transport "http".
        model: The reader's name on the server.
        timeout_s: Time-out of an answer in seconds.
        transport: "grpc" or "http".
        max_new_tokens: Maximum number of answer tokens; None: the server's default.
        streaming_callback: Called with a StreamingChunk for each part of an answer. The server must serve the reader's streaming model.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "fido",
        timeout_s: float = 60.0,
        transport: str = "grpc",
        max_new_tokens: Optional[int] = None,  # noqa: UP045  # Haystack evaluates annotations, in Python 3.9 too
        streaming_callback: Optional[StreamingCallbackT] = None,  # noqa: UP045
    ) -> None:
        self.url, self.model, self.timeout_s, self.transport = url, model, timeout_s, transport
        self.max_new_tokens, self.streaming_callback = max_new_tokens, streaming_callback
        self._client: ReaderClient | None = None

    def warm_up(self) -> None:
        """Make the client, which connects at the first question."""
        if self._client is None:
            self._client = ReaderClient(self.url, self.model, self.timeout_s, transport=self.transport)

    def to_dict(self) -> dict[str, Any]:
        """The component as Haystack stores it."""
        callback = serialize_callable(self.streaming_callback) if self.streaming_callback else None
        return default_to_dict(
            self,
            url=self.url,
            model=self.model,
            timeout_s=self.timeout_s,
            transport=self.transport,
            max_new_tokens=self.max_new_tokens,
            streaming_callback=callback,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FidoReader:
        """The component that `to_dict` described."""
        arguments = data.get("init_parameters", {})
        if arguments.get("streaming_callback"):
            arguments = {**arguments, "streaming_callback": deserialize_callable(arguments["streaming_callback"])}
        return default_from_dict(cls, {**data, "init_parameters": arguments})

    @component.output_types(answers=list[GeneratedAnswer])
    def run(
        self,
        query: str,
        documents: list[Document],
        streaming_callback: Optional[StreamingCallbackT] = None,  # noqa: UP045
    ) -> dict[str, Any]:
        """One answer, or none where there are no documents.

        Its documents are those it was read from, the most used first, with the reader's score in meta["reader_score"]; its meta has
        log_prob, tokens and model.

        Raises:
            ReaderError: If the request is refused, or the server failed.
        """
        if not documents:
            return {"answers": []}
        self.warm_up()
        assert self._client is not None
        passages = [{"text": document.content or "", "title": str(document.meta.get("title", ""))} for document in documents]
        callback = streaming_callback or self.streaming_callback
        if callback is None:
            answer = self._client.answer(query, passages, max_new_tokens=self.max_new_tokens)
        else:
            with self._client.stream(query, passages, max_new_tokens=self.max_new_tokens) as stream:
                for piece in stream:
                    callback(StreamingChunk(content=piece.text, meta={"model": self.model}))
                answer = stream.answer
        scores = answer.passage_scores or (0.0,) * len(documents)
        read = [
            Document.from_dict({**document.to_dict(flatten=False), "meta": {**document.meta, "reader_score": score}})
            for score, document in sorted(zip(scores, documents), key=lambda pair: -pair[0])
        ]
        meta = {"log_prob": answer.log_prob, "tokens": answer.tokens, "model": self.model}
        return {"answers": [GeneratedAnswer(data=answer.text, query=query, documents=read, meta=meta)]}
