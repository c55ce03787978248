"""The client's adapters, each in a pipeline of the real framework. Skipped by name where a framework is absent."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from fido_client import ReaderClient, RequestRefused
from tests.examples.test_playground import HINT, QUESTION

pytestmark = pytest.mark.server


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


def nodes_of(search):
    from llama_index.core.schema import NodeWithScore, TextNode

    return [
        NodeWithScore(node=TextNode(text=found["text"], metadata={"title": found["title"]}), score=found["bm25"])
        for found in search(QUESTION, 10)
    ]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_llama_index_query_engine(triton, search, wanted, streams, asynchronous):
    pytest.importorskip("llama_index.core", reason=f"llama-index-core: {HINT}")
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.retrievers import BaseRetriever

    from fido_client.integrations.llama_index import FidoSynthesizer

    nodes = nodes_of(search)

    class Found(BaseRetriever):
        def _retrieve(self, query_bundle):
            assert query_bundle.query_str == QUESTION
            return nodes

    engine = RetrieverQueryEngine(Found(), response_synthesizer=FidoSynthesizer(triton.grpc_url, "fido", streaming=streams))

    async def ask():
        response = await engine.aquery(QUESTION)
        return response, [part async for part in response.response_gen] if streams else [response.response]

    if asynchronous:
        with ThreadPoolExecutor() as pool:  # other tests' Playwright may keep a loop running in this thread
            response, parts = pool.submit(asyncio.run, ask()).result()
    else:
        response = engine.query(QUESTION)
        parts = list(response.response_gen) if streams else [response.response]
    answer, titles = wanted
    assert "".join(parts) == answer.text and len(parts) > (1 if streams else 0)
    assert [source.node.metadata["title"] for source in response.source_nodes] == titles
    assert response.source_nodes[0].node.metadata["reader_score"] == pytest.approx(max(answer.passage_scores), abs=1e-3)
    assert response.metadata["tokens"] == answer.tokens and response.metadata["log_prob"] == pytest.approx(answer.log_prob, abs=1e-3)
    assert response.metadata[response.source_nodes[0].node.node_id]["title"] == titles[0]
    assert "reader_score" not in nodes[0].node.metadata, "the caller's nodes stay as they were"


def test_llama_index_without_nodes_with_more_sources_and_with_texts_alone(triton, search):
    pytest.importorskip("llama_index.core", reason=f"llama-index-core: {HINT}")
    from fido_client.integrations.llama_index import FidoSynthesizer

    synthesizer = FidoSynthesizer(triton.grpc_url, "fido", empty_response="nothing found")
    assert synthesizer.synthesize(QUESTION, []).response == "nothing found"
    nodes = nodes_of(search)
    response = synthesizer.synthesize(QUESTION, nodes[:3], additional_source_nodes=nodes[3:4])
    assert len(response.source_nodes) == 4 and response.source_nodes[3] is nodes[3]
    with ReaderClient(triton.grpc_url, "fido") as client:
        assert synthesizer.get_response(QUESTION, ["name: Canberra"]) == client.answer(QUESTION, ["name: Canberra"]).text
    with pytest.raises(RequestRefused, match="max_new_tokens"):
        synthesizer.synthesize(QUESTION, nodes, max_new_tokens=0)


QUESTIONS = {"q2": QUESTION, "q1": "What is the capital of Iceland?"}


@pytest.fixture(scope="module")
def found_rows(search):
    pandas = pytest.importorskip("pandas", reason=f"python-terrier: {HINT}")
    rows = [
        {"qid": qid, "query": query, "docno": f"{qid}-{rank}", "title": found["title"], "text": found["text"], "score": found["bm25"]}
        for qid, query in QUESTIONS.items()
        for rank, found in enumerate(search(query, 10))
    ]
    return pandas.DataFrame(rows)


def test_pyterrier_pipeline(triton, search, found_rows):
    pyterrier = pytest.importorskip("pyterrier", reason=f"python-terrier: {HINT}")
    from fido_client.integrations.pyterrier import COLUMNS, FidoReader

    retriever = pyterrier.Transformer.from_df(found_rows)
    got = (retriever >> FidoReader(triton.grpc_url, "fido"))(found_rows[["qid", "query"]].drop_duplicates())
    assert tuple(got.columns) == COLUMNS and list(got["qid"]) == list(QUESTIONS), "in the order of the input"
    with ReaderClient(triton.grpc_url, "fido") as client:
        for row, question in zip(got.to_dict("records"), QUESTIONS.values(), strict=True):
            found = search(question, 10)
            answer = client.answer(question, [{"title": each["title"], "text": each["text"]} for each in found])
            assert (row["query"], row["qanswer"], row["tokens"]) == (question, answer.text, answer.tokens)
            order = sorted(zip(answer.passage_scores, found, strict=True), key=lambda pair: -pair[0])
            assert [document["title"] for document in row["documents"]] == [each["title"] for _, each in order]
            assert row["documents"][0]["reader_score"] == pytest.approx(order[0][0], abs=1e-3)
    assert FidoReader(triton.grpc_url, "fido")(found_rows[:0]).empty


def test_pyterrier_reads_the_best_rows_and_says_what_is_wrong(triton, found_rows):
    pytest.importorskip("pyterrier", reason=f"python-terrier: {HINT}")
    from fido_client.integrations.pyterrier import FidoReader

    reader = FidoReader(triton.grpc_url, "fido", num_context=2)
    (documents, _) = reader(found_rows[::-1].sort_values("qid", ascending=False, kind="stable"))["documents"]
    assert {document["docno"] for document in documents} == {"q2-0", "q2-1"}
    with pytest.raises(Exception, match="text"):
        reader(found_rows.drop(columns="text"))
    with pytest.raises(RequestRefused, match="max_new_tokens"):
        FidoReader(triton.grpc_url, "fido", max_new_tokens=0)(found_rows)


def test_pyterrier_rag_reads_the_demo_checkpoint_itself(triton, found_rows):
    readers = pytest.importorskip("pyterrier_rag.readers", reason=f"pyterrier-rag: {HINT}")
    from examples.frameworks import own_fid
    from fido_client.integrations.pyterrier import FidoReader

    theirs = own_fid()
    assert isinstance(theirs, readers.T5FiD)
    served = FidoReader(triton.grpc_url, "fid")(found_rows).set_index("qid")["qanswer"]
    assert dict(theirs(found_rows).set_index("qid")["qanswer"]) == dict(served)
