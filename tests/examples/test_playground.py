"""The demo readers behind a real Triton, with BM25 over their corpus, asked by a real browser, the package openai, and RAG frameworks."""

import asyncio
import http.client
import json
import re
import shutil
import threading

import pytest

from examples.demo import READERS, REPOSITORY
from examples.playground import BODY_BYTES, Playground, corpus_search
from fido_client import ReaderClient, RequestRefused
from serving.launcher.server import LOOPBACK, TritonServer, models_of

pytestmark = pytest.mark.server

HINT = "pip install -r requirements-frameworks.txt"
CHROMIUM = shutil.which("chromium")
QUESTION = "What is the capital of Australia?"
PASSAGES = [
    {"title": "Austria: Capital", "text": "name: Vienna; time difference: UTC+1"},
    {"title": "Australia: Capital", "text": "name: Canberra; geographic coordinates: 35 16 S, 149 08 E"},
]


@pytest.fixture(scope="module")
def triton():
    with TritonServer(models_of(READERS, stream=True), REPOSITORY) as server:
        yield server


@pytest.fixture(scope="module")
def search():
    return corpus_search()


@pytest.fixture
def served(search):
    """Starts playgrounds, and stops them."""
    started = []

    def start(http_url, metrics_url="http://127.0.0.1:1/metrics"):
        page = Playground(http_url, metrics_url, search)
        threading.Thread(target=page.serve_forever, daemon=True).start()
        started.append(page)
        return page

    yield start
    for page in started:
        page.shutdown()
        page.server_close()


@pytest.fixture
def page(served, triton):
    return served(f"{LOOPBACK}:{triton.http_port}", triton.metrics_url)


def post(page, path, body, **headers):
    """Status and text of the answer."""
    connection = http.client.HTTPConnection(LOOPBACK, page.server_address[1], timeout=60)
    connection.request("POST", path, body if isinstance(body, (str, bytes)) else json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def events(page, body):
    status, text = post(page, "/ask", body)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("at_once", [False, True])
def test_both_readers_stream_what_the_client_gets(page, triton, at_once):
    got = events(page, {"question": QUESTION, "passages": PASSAGES, "at_once": at_once})
    assert got[0] == {"event": "passages", "passages": PASSAGES}
    for reader in READERS:
        with ReaderClient(triton.grpc_url, reader) as client:
            wanted = client.answer(QUESTION, PASSAGES)
        own = [event for event in got if event.get("reader") == reader]
        assert "".join(event["text"] for event in own if event["event"] == "piece") == wanted.text == own[-1]["text"]
        assert own[-1]["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-3)
        assert own[-1]["passage_scores"] == pytest.approx(wanted.passage_scores, abs=1e-3)
        assert 0 < own[-1]["time_to_first_token_s"] <= own[-1]["latency_s"]


def test_one_after_the_other_the_second_starts_when_the_first_has_ended(page):
    order = [event["reader"] for event in events(page, {"question": QUESTION})[1:]]
    assert order == sorted(order) and set(order) == set(READERS)


def test_the_corpus_answers_a_question_without_passages(page):
    found, *rest = events(page, {"question": QUESTION})
    assert len(found["passages"]) == 10 and found["passages"][0]["title"] == "Australia: Capital"
    assert [event["text"] for event in rest if event["event"] == "answer"] == ["Canberra", "Canberra"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"question": " "}, 400, "question: wanted some text"),
        ("not JSON", 400, "body: wanted a JSON object"),
        ("[]", 400, "got list"),
        (b" " * (BODY_BYTES + 1), 413, f"at most {BODY_BYTES} bytes"),
    ],
)
def test_a_wrong_request_is_refused_and_told_why(page, body, status, said):
    got, text = post(page, "/ask", body)
    assert got == status and said in json.loads(text)["error"]["message"]


def test_what_the_reader_refuses_is_an_error_of_each_reader(page):
    got = events(page, {"question": QUESTION, "passages": [{"title": "no text"}]})
    assert [(event["event"], event["reader"]) for event in got[1:]] == [("error", reader) for reader in READERS]
    assert 'wanted the key "text"' in got[1]["message"]


def test_other_sites_are_refused(page):
    port = page.server_address[1]
    assert post(page, "/ask", {"question": QUESTION}, Host=f"evil.example:{port}")[0] == 403
    assert post(page, "/ask", {"question": QUESTION}, Origin="https://evil.example")[0] == 403
    assert post(page, "/v1/chat/completions", {}, Origin="null")[0] == 403


# ---- The page in headless Chromium ----


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright: {HINT}")
    if CHROMIUM is None:
        pytest.skip("chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


SIZES = {"desktop": {"width": 1100, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(params=SIZES)
def tab(chromium, request):
    """A tab whose script may not fail and which may load nothing from elsewhere."""
    context = chromium.new_context(viewport=SIZES[request.param])
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    faults, hosts = [], set()
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda sent: hosts.add(re.sub(r"^(data|http://127\.0\.0\.1).*", r"\1", sent.url)))
    yield tab
    context.close()
    assert faults == [] and hosts <= {"http://127.0.0.1", "data"}


def wait_for(tab, text):
    tab.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)


def test_a_question_by_keyboard_over_the_corpus(tab, page):
    tab.goto(page.url)
    assert tab.evaluate("document.activeElement.id") == "question"
    tab.keyboard.press("Enter")
    wait_for(tab, "Done.")
    assert tab.locator(".reader .text").all_inner_texts() == ["Canberra", "Canberra"]
    assert tab.locator(".reader dt").all_inner_texts() == ["time to first token", "total", "log-probability", "tokens"] * 2
    assert tab.locator("#list li").count() == 10
    first = tab.locator("#list li").first
    assert "Australia: Capital" in first.inner_text() and re.search(r"FiD \d+ %\s+FiDO \d+ %", first.inner_text())
    assert "gradient" in first.evaluate("item => getComputedStyle(item).backgroundImage")
    assert tab.locator("#metrics").get_attribute("href") == page.metrics_url
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing may hang over the side"
    boxes = [card.bounding_box() for card in tab.locator(".reader").all()]
    is_wide = tab.viewport_size["width"] > 600
    assert (boxes[0]["y"] == boxes[1]["y"]) == is_wide, "side by side on a desktop, one below the other on a phone"


def test_pasted_passages_are_text_and_reached_by_keyboard(tab, page):
    tab.goto(page.url)
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#paste").is_checked()
    tab.keyboard.press("Tab")
    tab.keyboard.insert_text("Australia: Capital | name: Canberra\n<img src=x onerror=alert(1)>")
    tab.keyboard.press("Control+Enter")
    wait_for(tab, "Done.")
    assert tab.locator("#list .title").all_inner_texts() == ["Australia: Capital"]
    assert tab.locator("#list p").all_inner_texts() == ["name: Canberra", "<img src=x onerror=alert(1)>"]
    assert tab.locator("#list img").count() == 0
    assert tab.locator("#reader-fid .text").inner_text() == "Canberra"


def test_what_is_missing_is_said_and_gets_the_focus(tab, page):
    tab.goto(page.url)
    tab.fill("#question", "  ")
    tab.click("#ask")
    wait_for(tab, "Type a question first.")
    assert tab.evaluate("document.activeElement.id") == "question"
    tab.fill("#question", QUESTION)
    tab.check("#paste")
    tab.click("#ask")
    wait_for(tab, "Paste at least one passage")
    assert tab.evaluate("document.activeElement.id") == "passages"


def test_triton_down_is_an_error_of_each_reader_and_asking_again_is_possible(tab, served):
    page = served(f"{LOOPBACK}:1")
    tab.goto(page.url)
    tab.click("#ask")
    wait_for(tab, "Not every reader answered.")
    errors = tab.locator(".reader .error").all_inner_texts()
    assert len(errors) == 2 and all(f"{LOOPBACK}:1" in error for error in errors)
    assert tab.locator("#ask").is_enabled()


def test_playground_down_is_said(tab, search, triton):
    page = Playground(f"{LOOPBACK}:{triton.http_port}", triton.metrics_url, search)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    tab.goto(page.url)
    tab.wait_for_selector("#reader-fido")
    page.shutdown()
    page.server_close()
    tab.click("#ask")
    wait_for(tab, "Is `make play` still running?")
    assert tab.locator("#ask").is_enabled()


# ---- OpenAI's API, by their package ----


@pytest.fixture
def openai(page):
    package = pytest.importorskip("openai", reason=f"openai: {HINT}")
    return package.OpenAI(base_url=f"{page.url}v1", api_key="none", max_retries=0)


USER = {"role": "user", "content": QUESTION}


def test_openai_lists_the_readers(openai):
    assert [model.id for model in openai.models.list()] == list(READERS)


def test_openai_takes_passages_as_a_field_and_as_messages(openai, triton):
    with ReaderClient(triton.grpc_url, "fido") as client:
        with_titles = client.answer(QUESTION, PASSAGES)
        plain = client.answer(QUESTION, [passage["text"] for passage in PASSAGES])
    contexts = [{"role": role, "content": passage["text"]} for role, passage in zip(("system", "developer"), PASSAGES, strict=True)]
    by_field = openai.chat.completions.create(model="fido", messages=[USER], extra_body={"passages": PASSAGES})
    by_message = openai.chat.completions.create(model="fido", messages=[*contexts, USER])
    for got, wanted in ((by_field, with_titles), (by_message, plain)):
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == (wanted.text, "stop")
        assert got.usage.completion_tokens == got.usage.total_tokens == wanted.tokens
        assert got.reader["passage_scores"] == pytest.approx(wanted.passage_scores, abs=1e-3)
    assert by_field.reader["passage_scores"] != pytest.approx(by_message.reader["passage_scores"], abs=1e-6)


def test_openai_streams_with_usage(openai):
    stream = openai.chat.completions.create(model="fid", messages=[USER], stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Canberra"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 1
    assert len(chunks[-2].reader["passages"]) == 10, "found in the corpus"


def test_openai_says_when_the_caller_cut_the_answer(openai):
    got = openai.chat.completions.create(model="fid", messages=[USER], max_completion_tokens=1)
    assert (got.choices[0].finish_reason, got.usage.completion_tokens) == ("length", 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n": 2}, "n: a reader decodes one answer greedily"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: a reader"),
        ({"messages": [USER, {"role": "assistant", "content": "Vienna"}, USER]}, "no conversation"),
        ({"messages": [{"role": "system", "content": "x"}, USER], "extra_body": {"passages": PASSAGES}}, "in one place"),
        ({"extra_body": {"passages": [{"title": "no text"}]}}, 'wanted the key "text"'),
        ({"max_completion_tokens": 0}, "max_new_tokens"),
    ],
)
def test_openai_is_told_what_has_no_meaning(openai, wrong, said, stream):
    import openai as package

    with pytest.raises(package.BadRequestError, match=re.escape(said)):
        openai.chat.completions.create(**{"model": "fido", "messages": [USER], "stream": stream, **wrong})


def test_openai_is_told_that_the_model_or_the_server_is_not_there(openai, served):
    import openai as package

    with pytest.raises(package.NotFoundError, match="fid or fido"):
        openai.chat.completions.create(model="gpt", messages=[USER])
    down = openai.with_options(base_url=f"{served(f'{LOOPBACK}:1').url}v1")
    for stream in (False, True):
        with pytest.raises(package.InternalServerError) as caught:
            down.chat.completions.create(model="fido", messages=[USER], stream=stream)
        assert caught.value.status_code == 503


# ---- The client's adapters, each in a pipeline of the real framework ----


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
        response, parts = asyncio.run(ask())
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
