"""One question's way back: who parsed and whether they still want it, the answer as it grows, the responses that are sent.

Imports Triton's Python backend, as do the modules called *_model.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.pipeline.prompt import IncrementalDetokenizer, PromptEncoder, PromptError
from serving.pipeline.request import ReaderRequest, RequestError
from serving.pipeline.scheduler import CancelledError, SchedulerError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CANCELLED = "cancelled by the client"
OUTCOMES = ("answered", "refused", "cancelled", "failed")


class Caller:
    """Who parsed: knows the request's id and time limit, and whether the answer is still wanted."""

    def __init__(self, request: Any, sender: Any):
        self.id = request.request_id()
        self.sender = sender
        self.arrived_s = time.monotonic()
        timeout_s = request.timeout() / 1e6  # 0 = none
        self._timeout_s = timeout_s
        self._reason: str | None = None
        self._asking, self._over = threading.Lock(), False

    def cancel_reason(self) -> str | None:
        """None, or why the answer is no longer wanted."""
        if self._reason is None and self._timeout_s and time.monotonic() > self.arrived_s + self._timeout_s:
            self._reason = f"the request's timeout of {self._timeout_s * 1e3:.0f} ms passed before its answer was whole"
        return self._reason

    def poll_cancelled(self) -> None:
        """Ask Triton whether the request was cancelled. Not for the loop's thread: 20 to 60 us, and then a wait for Python's lock."""
        with self._asking:
            if not self._over and self._reason is None and self.sender.is_cancelled():
                self._reason = CANCELLED

    def close(self) -> None:
        """The final response comes next: a server that is parsed about a request after it (2.51) reads freed memory and dies."""
        with self._asking:
            self._over = True


@dataclasses.dataclass
class Times:
    """When each part of the way was over, in seconds of the monotonic clock; 0 = not reached.

    Tokenized includes the wait for an encoding thread; encoded the call to the encoder model and the packing. Of a question in pieces
    the first are being encoded when the last is tokenized.
    """

    tokenized: float = 0.0
    encoded: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


class ResponseWriter:
    """Collects one answer and sends it. `token` and `attribution` come from the loop's thread, `end` once at last."""

    def __init__(
        self, caller: Caller, parsed: ReaderRequest, prompt: PromptEncoder, outputs: set[str], on_end: Callable[[ResponseWriter], None]
    ):
        self.caller, self.parsed, self.times = caller, parsed, Times()
        self._prompt, self._outputs, self._on_end = prompt, outputs, on_end
        self.tokens: list[int] = []
        self.encoder_tokens = 0
        self.outcome = ""
        self.error = ""
        self._log_probs: list[float] = []
        self._passage_lengths = np.zeros(0, np.int64)
        self._passage_scores = np.zeros(0, np.float32)

    def tokenized(self, passage_lengths: np.ndarray) -> None:
        """The question's prompts have become tokens, int[n_passages] valid ones each."""
        self.times.tokenized = time.monotonic()
        self._passage_lengths = passage_lengths
        self.encoder_tokens = int(passage_lengths.sum())

    def encoded(self) -> None:
        """Its hidden states are there, packed."""
        self.times.encoded = time.monotonic()

    def attribution(self, cross_attention: np.ndarray) -> None:
        """float32[encoder_sequence_length], packed as the passages lie one after the other -> a score for each passage."""
        starts = np.concatenate([[0], np.cumsum(self._passage_lengths)[:-1]])
        self._passage_scores = np.add.reduceat(cross_attention, starts).astype(np.float32)

    def token(self, token: int, log_prob: float, submit: Callable[..., Any]) -> None:
        """Take one more token; `submit` runs a call on the responding thread."""
        if not self.tokens:
            self.times.first_token = time.monotonic()
        self.tokens.append(token)
        self._log_probs.append(log_prob)

    def finish(self, error: Exception | None) -> None:
        """Send what is left to send, and the final flag."""
        self.times.ended = time.monotonic()
        self.outcome = _outcome(error)
        self.caller.close()
        try:
            if error is None:
                self._send(self._totals(), FINAL)
            else:
                self.error = str(error)
                send_error(self.caller.sender, error)
        except Exception as failure:  # nobody is there to be told; the place must be given back all the same
            self.outcome, self.error = "failed", f"the response could not be sent: {failure}"
        finally:
            self._on_end(self)

    def _totals(self) -> dict[str, np.ndarray]:
        return {
            "answer": _text(self._last_text()),
            "log_prob": np.array([sum(self._log_probs)], np.float32),
            "tokens": np.array([len(self.tokens)], np.int32),
            "passage_scores": self._passage_scores,
            "token_log_probs": np.array(self._log_probs, np.float32),
        }

    def log_line(self, model: str, *, with_text: bool) -> str:
        """One line of JSON about this request; no text of it unless parsed for."""

        def ms(start: float, end: float) -> float | None:
            return round((end - start) * 1e3, 2) if start and end else None

        arrived, times = self.caller.arrived_s, self.times
        fields: dict[str, Any] = {
            "model": model,
            "request": self.caller.id,
            "outcome": self.outcome,
            "passages": len(self.parsed.passages),
            "encoder_tokens": self.encoder_tokens,
            "tokens": len(self.tokens),
            "tokenized_ms": ms(arrived, times.tokenized),
            "encoded_ms": ms(arrived, times.encoded),
            "first_token_ms": ms(arrived, times.first_token),
            "total_ms": ms(arrived, times.ended),
        }
        if self.error:
            fields["error"] = self.error
        if with_text:
            fields |= {"question": self.parsed.question, "answer": self._prompt.text(self.tokens)}
        return json.dumps(fields, ensure_ascii=False)

    def _last_text(self) -> str:
        raise NotImplementedError

    def _send(self, outputs: dict[str, np.ndarray], flags: int) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._outputs]
        self.caller.sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


class UnaryWriter(ResponseWriter):
    """One response with the whole answer."""

    def _last_text(self) -> str:
        return self._prompt.text(self.tokens)


class StreamWriter(ResponseWriter):
    """A response for every piece of text, then one with what was kept back and the totals."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._pieces = IncrementalDetokenizer(self._prompt)

    def token(self, token: int, log_prob: float, submit: Callable[..., Any]) -> None:
        """Take one more token and send the text it completes."""
        super().token(token, log_prob, submit)
        submit(self._send_piece, token)

    def _send_piece(self, token: int) -> None:
        if piece := self._pieces.add(token):
            self._send({"answer": _text(piece)}, 0)

    def _last_text(self) -> str:
        return self._pieces.rest()


def _text(text: str) -> np.ndarray:
    return np.array([text.encode("utf-8")], np.object_)


def _outcome(error: Exception | None) -> str:
    if error is None:
        return "answered"
    if isinstance(error, (RequestError, PromptError)):
        return "refused"
    return "cancelled" if isinstance(error, CancelledError) else "failed"


def send_error(sender: Any, error: Exception) -> None:
    """Answer with an error, under the status that tells a client what to do: mend the request, try later, or neither."""
    codes = pb_utils.TritonError
    code = codes.INTERNAL
    if isinstance(error, (RequestError, PromptError)):
        code = codes.INVALID_ARG
    elif isinstance(error, CancelledError) and str(error) == CANCELLED:
        code = codes.CANCELLED
    elif isinstance(error, SchedulerError):
        code = codes.UNAVAILABLE
    sender.send(pb_utils.InferenceResponse(error=codes(str(error), code)), flags=FINAL)
