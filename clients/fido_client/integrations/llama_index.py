"""FidoSynthesizer: a reader as a response synthesizer of LlamaIndex (pip install llama-index-core).

engine = RetrieverQueryEngine(retriever, response_synthesizer=FidoSynthesizer("127.0.0.1:8001", model="fido"))
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.indices.prompt_helper import ChatPromptHelper, PromptHelper
from llama_index.core.llms import MockLLM
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType

from ..async_reader_client import AsyncReaderClient
from ..reader_client import ReaderClient


class FidoSynthesizer(BaseSynthesizer):
    """Answers a query from nodes. A node's text is the passage, and its metadata "title" the title; other metadata is not read.

    The response's source_nodes are the same nodes, the most used first, each with the reader's score in metadata["reader_score"], then the
    additional ones; its metadata has log_prob and tokens too. A streamed response has them once it has been read to its end.

    Args:
        url: "host:port" of Triton's gRPC endpoint.
        model: The reader's name on the server.
        streaming: Whether responses stream, which needs the reader's streaming model on the server.
        empty_response: What is answered where there are no nodes.
        callback_manager: LlamaIndex's, for its events.
        options: The other arguments that ReaderClient and AsyncReaderClient both take, such as timeout_s and retries.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "fido",
        *,
        streaming: bool = False,
        empty_response: str | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        # the base class wants a language model and the means to fill its window; a reader has neither
        super().__init__(
            llm=MockLLM(),
            callback_manager=callback_manager,
            prompt_helper=PromptHelper(tokenizer=str.split),
            chat_prompt_helper=ChatPromptHelper(tokenizer=str.split),
            streaming=streaming,
            empty_response=empty_response,
        )
        self._client = ReaderClient(url, model, **options)
        self._async_client = AsyncReaderClient(url, model, **options)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """A reader's prompt is a part of it."""

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """One response; `response_kwargs` are max_new_tokens, min_new_tokens and timeout_s.

        Raises:
            ReaderError: If the request is refused, or the server failed.
        """
        reading = _Reading(nodes)
        return reading.of(super().synthesize(query, nodes, additional_source_nodes, reading=reading, **response_kwargs))

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """As synthesize, for asyncio."""
        reading = _Reading(nodes)
        return reading.of(await super().asynthesize(query, nodes, additional_source_nodes, reading=reading, **response_kwargs))

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], reading: _Reading | None = None, **response_kwargs: Any
    ) -> str | Generator[str, None, None]:
        """The answer to a question from texts, or from the nodes that `synthesize` has: a string, or a generator of its parts."""
        reading = reading or _Reading([])
        passages = reading.passages or list(text_chunks)
        if self._streaming:
            return self._parts(query_str, passages, reading, response_kwargs)
        return reading.end(self._client.answer(query_str, passages, **response_kwargs))

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], reading: _Reading | None = None, **response_kwargs: Any
    ) -> str | AsyncGenerator[str, None]:
        """As get_response, for asyncio."""
        reading = reading or _Reading([])
        passages = reading.passages or list(text_chunks)
        if self._streaming:
            return self._aparts(query_str, passages, reading, response_kwargs)
        return reading.end(await self._async_client.answer(query_str, passages, **response_kwargs))

    def _parts(self, question: str, passages: list[Any], reading: _Reading, asked: dict[str, Any]) -> Generator[str, None, None]:
        with self._client.stream(question, passages, **asked) as stream:
            for piece in stream:
                yield piece.text
            reading.end(stream.answer)

    async def _aparts(self, question: str, passages: list[Any], reading: _Reading, asked: dict[str, Any]) -> AsyncGenerator[str, None]:
        async with self._async_client.stream(question, passages, **asked) as stream:
            async for piece in stream:
                yield piece.text
            reading.end(stream.answer)


class _Reading:
    """The nodes that one question is answered from. Response and answer come in either order: a stream's answer ends after it."""

    def __init__(self, nodes: Sequence[NodeWithScore]) -> None:
        self.nodes = list(nodes)
        self.passages: list[Any] = [
            {"text": each.node.get_content(MetadataMode.NONE), "title": str(each.node.metadata.get("title", ""))} for each in self.nodes
        ]
        self._answer: Any = None
        self._response: Any = None

    def of(self, response: Any) -> Any:
        """Note the response, and return it."""
        self._response = response
        self._complete()
        return response

    def end(self, answer: Any) -> str:
        """Note the answer, and return its text."""
        self._answer = answer
        self._complete()
        return str(answer.text)

    def _complete(self) -> None:
        if self._answer is None or self._response is None:
            return
        scores = self._answer.passage_scores or (0.0,) * len(self.nodes)
        read = [
            each.model_copy(update={"node": each.node.model_copy(update={"metadata": {**each.node.metadata, "reader_score": score}})})
            for score, each in sorted(zip(scores, self.nodes), key=lambda pair: -pair[0])
        ]
        self._response.source_nodes[: len(read)] = read
        metadata = {each.node.node_id: each.node.metadata for each in read}
        self._response.metadata = {**(self._response.metadata or {}), **metadata, **self._totals()}

    def _totals(self) -> dict[str, Any]:
        return {"log_prob": self._answer.log_prob, "tokens": self._answer.tokens}
