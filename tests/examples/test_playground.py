"""The demo readers behind a real Triton, with BM25 over their corpus, asked by a real browser, the package openai, and RAG frameworks."""

import http.client
import json
import re
import shutil
import threading

import pytest

from examples.demo import READERS
from examples.playground import BODY_BYTES, Playground
from fido_client import ReaderClient, RequestRefused
from serving.launcher.server import LOOPBACK

pytestmark = pytest.mark.server

HINT = "make setup FOR=frameworks"
CHROMIUM = shutil.which("chromium")
QUESTION = "What is the capital of Australia?"
PASSAGES = [
    {"title": "Austria: Capital", "text": "name: Vienna; time difference: UTC+1"},
    {"title": "Australia: Capital", "text": "name: Canberra; geographic coordinates: 35 16 S, 149 08 E"},
]


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


def test_the_best_answers_of_a_beam_search_follow_the_streamed_one(page, triton):
    got = events(page, {"question": QUESTION, "passages": PASSAGES, "n_best": 4})
    for reader in READERS:
        with ReaderClient(triton.grpc_url, reader) as client:
            wanted = client.answer(QUESTION, PASSAGES, num_beams=4, num_answers=4)
        *_, answer, best = [event for event in got if event.get("reader") == reader]
        assert (answer["event"], best["event"]) == ("answer", "n_best")
        assert best["answers"] == list(wanted.answers) and len(set(best["answers"])) == 4
        assert best["log_probs"] == pytest.approx(wanted.answer_log_probs, abs=1e-3)


def test_a_reader_without_beams_says_so_beside_its_answer(page, monkeypatch):
    def refuse(*_, **__):
        raise RequestRefused("num_beams: this reader decodes greedily")

    for client in page.clients.values():
        monkeypatch.setattr(client, "answer", refuse)
    got = events(page, {"question": QUESTION, "passages": PASSAGES, "n_best": 4})
    assert [event["message"] for event in got if event["event"] == "n_best"] == ["num_beams: this reader decodes greedily"] * 2
    assert sum(event["event"] == "answer" for event in got) == 2 and not [event for event in got if event["event"] == "error"]


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
        ({"question": "x", "n_best": 0}, 400, "n_best: wanted a number from 1 to 10, got 0"),
        ({"question": "x", "n_best": True}, 400, "n_best: wanted a number from 1 to 10, got True"),
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


def test_the_best_answers_are_a_list_in_each_readers_card(tab, page):
    tab.goto(page.url)
    tab.select_option("#n_best", "4")
    tab.click("#ask")
    wait_for(tab, "Done.")
    best = tab.locator("#reader-fid .best li").all_inner_texts()
    assert len(best) == 4 and re.fullmatch(r"Canberra\s+-\d+\.\d{3}", best[0]) and tab.locator("#reader-fido .best li").count() == 4
    assert "4 answers by beam search" in tab.locator("#reader-fid dl").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing may hang over the side"


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
