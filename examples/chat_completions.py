"""OpenAI's chat completions for readers: /v1/chat/completions and /v1/models, as functions from a request's JSON to a response's.

A reader knows one question and its passages. The question is the user message. The passages are the extra body field `passages`, or else
the messages of the roles tool, system and developer, one passage each, or else are searched for. There is no conversation: a second user
message or one of the assistant is refused rather than silently dropped. So is every option that would change an answer and cannot.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fido_client import ReaderClient, ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused
from fido_client.answer import Answer

CONTEXT_ROLES = ("tool", "system", "developer")
N_PASSAGES = 10
# Options that ask for what a greedy reader does not do, with the values that ask for nothing.
MEANINGLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "stop": ([],),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "audio": (),
    "web_search_options": (),
}
Search = Callable[[str, int], list[dict[str, Any]]]
Clients = Mapping[str, ReaderClient]


class ApiError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.kind = "invalid_request_error" if status < 500 else "server_error"


def model_list(clients: Clients) -> dict[str, Any]:
    """The readers, as /v1/models lists them."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "fido"} for name in clients]}


def completion(body: Mapping[str, Any], clients: Clients, search: Search) -> dict[str, Any]:
    """A whole answer.

    Raises:
        ApiError: If the request is invalid, or the reader failed.
    """
    client, asked, passages = _request(body, clients, search)
    try:
        answer = client.answer(**asked)
    except ReaderError as error:
        raise _api_error(error) from error
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "finish_reason": _finish_reason(answer, asked),
        "logprobs": None,
    }
    return {**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(answer), "reader": _reader(answer, passages)}


def completion_chunks(body: Mapping[str, Any], clients: Clients, search: Search) -> Iterator[str]:
    """A streamed answer: the data of each server-sent event. The chunk that finishes also has the field `reader`.

    Raises:
        ApiError: If the request is invalid or the reader failed, before the first chunk. Later failures are a chunk with an error.
    """
    client, asked, passages = _request(body, clients, search)
    options = body.get("stream_options") or {}
    head = _head(body, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return json.dumps({**head, "choices": [choice], **more}, ensure_ascii=False)

    begun = False
    try:
        with client.stream(**asked) as stream:
            for piece in stream:
                yield chunk({"content": piece.text} if begun else {"role": "assistant", "content": piece.text})
                begun = True
            yield chunk({}, _finish_reason(stream.answer, asked), reader=_reader(stream.answer, passages))
            if options.get("include_usage"):
                yield json.dumps({**head, "choices": [], "usage": _usage(stream.answer)})
    except ReaderError as error:
        if not begun:
            raise _api_error(error) from error
        yield json.dumps({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
    yield "[DONE]"


def _request(body: Mapping[str, Any], clients: Clients, search: Search) -> tuple[ReaderClient, dict[str, Any], list[Any]]:
    """The reader, the arguments of its `answer` or `stream`, and the passages."""
    model = body.get("model")
    if not isinstance(model, str) or model not in clients:
        raise ApiError(404, f"model: wanted {' or '.join(clients)}, got {model!r}")
    for name, nothing in MEANINGLESS.items():
        if body.get(name) is not None and body[name] not in nothing:
            raise ApiError(400, f"{name}: a reader decodes one answer greedily and has no such option; got {body[name]!r}; leave it out")
    question, contexts = _question_and_contexts(body.get("messages"))
    passages = body.get("passages")
    if passages is not None and contexts:
        raise ApiError(400, "passages: given both as a field and as messages; give them in one place")
    if passages is None:
        passages = contexts or search(question, N_PASSAGES)
    if not isinstance(passages, list):
        raise ApiError(400, f"passages: wanted a list, got {type(passages).__name__}")
    given = [{k: p[k] for k in ("title", "text") if k in p} if isinstance(p, dict) else p for p in passages]
    tokens = body.get("max_completion_tokens", body.get("max_tokens"))
    return clients[model], {"question": question, "passages": given, "max_new_tokens": tokens}, passages


def _question_and_contexts(messages: Any) -> tuple[str, list[str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ApiError(400, "messages: wanted a list of objects")
    roles = [message.get("role") for message in messages]
    unknown = [role for role in roles if role not in (*CONTEXT_ROLES, "user")]
    if unknown or roles.count("user") != 1:
        raise ApiError(
            400,
            f"messages: wanted one of role user, the question, and any number of {', '.join(CONTEXT_ROLES)}, a passage each; a reader has "
            f"no conversation; got the roles {roles}",
        )
    texts = [_text(message.get("content")) for message in messages]
    question = next(text for text, role in zip(texts, roles, strict=True) if role == "user")
    return question, [text for text, role in zip(texts, roles, strict=True) if role != "user"]


def _text(content: Any) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"content: wanted text or parts of type text, got {content!r}")
    return content


def _head(body: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": body["model"]}


def _finish_reason(answer: Answer, asked: Mapping[str, Any]) -> str:
    """Say "length" where the caller's own limit was reached; the server's default limit cannot be told from an end."""
    return "length" if answer.tokens == asked["max_new_tokens"] else "stop"


def _usage(answer: Answer) -> dict[str, int]:
    """The reader does not say how many tokens it read, so that count is 0 and the total is that of the answer."""
    return {"prompt_tokens": 0, "completion_tokens": answer.tokens, "total_tokens": answer.tokens}


def _reader(answer: Answer, passages: list[Any]) -> dict[str, Any]:
    """What OpenAI's format has no place for."""
    return {"log_prob": answer.log_prob, "passage_scores": list(answer.passage_scores), "passages": passages}


def _api_error(error: ReaderError) -> ApiError:
    kinds = ((RequestRefused, 400), (ReaderTimeout, 504), (ReaderUnavailable, 503))
    return ApiError(next((status for kind, status in kinds if isinstance(error, kind)), 502), str(error))
