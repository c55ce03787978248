"""Readers in RAG frameworks: each adapter in a pipeline of the real package, with BM25 over the demo corpus and a real server."""

import pytest

from examples.demo import READERS, REPOSITORY
from examples.playground import corpus_search
from fido_client import ReaderClient, RequestRefused
from serving.launcher.server import TritonServer, models_of

pytestmark = pytest.mark.server
QUESTION = "What is the capital of Australia?"
HINT = "pip install -r requirements-frameworks.txt"


@pytest.fixture(scope="module")
def triton():
    with TritonServer(models_of(READERS, stream=True), REPOSITORY) as server:
        yield server


@pytest.fixture(scope="module")
def search():
    return corpus_search()


@pytest.fixture(scope="module")
def wanted(triton, search):
    """What the client answers, and the titles of its passages, the most used first."""
    passages = [{"title": found["title"], "text": found["text"]} for found in search(QUESTION, 10)]
    with ReaderClient(triton.grpc_url, "fido") as client:
        answer = client.answer(QUESTION, passages)
    order = sorted(zip(answer.passage_scores, passages, strict=True), key=lambda pair: -pair[0])
    return answer, [passage["title"] for _, passage in order]


PARTS: list[str] = []


def keep(chunk):
    PARTS.append(chunk.content)


@pytest.mark.parametrize("streams", [False, True])
def test_haystack_pipeline_stored_and_loaded_again(triton, search, wanted, streams):
    haystack = pytest.importorskip("haystack", reason=f"haystack-ai: {HINT}")
    from fido_client.integrations.haystack import FidoReader

    reader = FidoReader(triton.grpc_url, "fido")
    pipeline = haystack.Pipeline()
    pipeline.add_component("reader", reader)
    pipeline = haystack.Pipeline.loads(pipeline.dumps(), allowed_modules=["fido_client.integrations.haystack"])
    documents = [haystack.Document(content=found["text"], meta={"title": found["title"]}) for found in search(QUESTION, 10)]
    PARTS.clear()
    data = {"query": QUESTION, "documents": documents, **({"streaming_callback": keep} if streams else {})}
    (got,) = pipeline.run({"reader": data})["reader"]["answers"]
    answer, titles = wanted
    assert (got.data, got.query, got.meta["tokens"]) == (answer.text, QUESTION, answer.tokens)
    assert "".join(PARTS) == (answer.text if streams else "")
    assert [document.meta["title"] for document in got.documents] == titles
    assert got.documents[0].meta["reader_score"] == pytest.approx(max(answer.passage_scores), abs=1e-3)
    assert "reader_score" not in documents[0].meta, "the caller's documents stay as they were"


def test_haystack_without_documents_and_with_a_stored_callback():
    pytest.importorskip("haystack", reason=f"haystack-ai: {HINT}")
    from haystack.components.generators.utils import print_streaming_chunk

    from fido_client.integrations.haystack import FidoReader

    assert FidoReader("127.0.0.1:1").run("q", []) == {"answers": []}
    stored = FidoReader("127.0.0.1:1", "fid", 3.0, "http", 5, print_streaming_chunk).to_dict()
    loaded = FidoReader.from_dict(stored)
    assert loaded.streaming_callback is print_streaming_chunk and loaded.to_dict() == stored
    assert (loaded.url, loaded.model, loaded.timeout_s, loaded.transport, loaded.max_new_tokens) == ("127.0.0.1:1", "fid", 3.0, "http", 5)


def test_langchain_chain(triton, search, wanted):
    pytest.importorskip("langchain_core", reason=f"langchain-core: {HINT}")
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough

    from fido_client.integrations.langchain import FidoRunnable

    def retrieve(question):
        return [Document(page_content=found["text"], metadata={"title": found["title"]}) for found in search(question, 10)]

    chain = {"question": RunnablePassthrough(), "documents": RunnableLambda(retrieve)} | FidoRunnable(triton.grpc_url, "fido")
    answer, titles = wanted
    got = chain.invoke(QUESTION)
    assert (got["answer"], got["tokens"]) == (answer.text, answer.tokens)
    assert [document.metadata["title"] for document in got["documents"]] == titles
    assert got["documents"][0].metadata["reader_score"] == pytest.approx(max(answer.passage_scores), abs=1e-3)
    assert [output["answer"] for output in chain.batch([QUESTION, QUESTION])] == [answer.text] * 2
    parts = list(chain.stream(QUESTION))
    assert "".join(part.get("answer", "") for part in parts) == answer.text
    assert [document.metadata["title"] for document in parts[-1]["documents"]] == titles


def test_langchain_errors_are_the_clients(triton):
    pytest.importorskip("langchain_core", reason=f"langchain-core: {HINT}")
    from fido_client.integrations.langchain import FidoRunnable

    with pytest.raises(RequestRefused, match="passages: wanted at least one"):
        FidoRunnable(triton.grpc_url, "fido").invoke({"question": QUESTION, "documents": []})
