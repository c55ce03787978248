"""One question's way back: whether the client still wants it, the answer as it grows, the responses that are sent."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving.pipeline.beam_search import Hypothesis
from serving.pipeline.prompt import IncrementalDetokenizer, PromptEncoder, PromptError
from serving.pipeline.request import ReaderRequest, RequestError
from serving.pipeline.scheduler import CancelledError, DeadlineExceededError, SchedulerError

from .stop import id_of

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
OUTCOMES = ("answered", "refused", "cancelled", "failed")


class Caller:
    """The client's side of a request: its id, its time limit, and whether it still wants the answer.

    Args:
        request: Triton's.
        sender: of its responses.
    """

    def __init__(self, request: Any, sender: Any):
        self.id = id_of(request)
        self.sender = sender
        self.arrived_s = time.monotonic()
        self._timeout_s = request.timeout() / 1e6  # 0 = none
        self._cancelled = self._stopped = False
        self._polling, self._closed = threading.Lock(), False

    def limit(self, timeout_us: int) -> None:
        """Set the time limit of the request's parameters, where HTTP generate puts it, unless there is one; 0 = none."""
        self._timeout_s = self._timeout_s or timeout_us / 1e6

    def cancel_reason(self) -> SchedulerError | None:
        """None, or why the answer is no longer wanted."""
        if self._cancelled:
            return CancelledError("cancelled by the client")
        if self._stopped:
            return CancelledError("stopped by the client")
        if self._timeout_s and time.monotonic() > self.arrived_s + self._timeout_s:
            return DeadlineExceededError(f"the request's timeout of {self._timeout_s * 1e3:g} ms passed before its answer was complete")
        return None

    def stop(self) -> None:
        """End the answer at the next step, because its client has asked for that (stop.py)."""
        self._stopped = True

    def poll_cancelled(self) -> bool:
        """Ask Triton whether the client has cancelled.

        Takes 20 to 60 us and then a wait for Python's lock, so the scheduler's thread does not call it.
        """
        with self._polling:
            if not self._closed and not self._cancelled:
                self._cancelled = bool(self.sender.is_cancelled())
            return self._cancelled

    def close(self) -> None:
        """Poll no more. Called before the final flag: Triton 2.51 reads freed memory if it is asked after that."""
        with self._polling:
            self._closed = True

    def send_final_flag(self) -> None:
        """End a stream whose last response was sent without the flag."""
        self.close()
        self.sender.send(flags=FINAL)


@dataclasses.dataclass
class Times:
    """When each part of the way was over, in seconds of the monotonic clock; 0 = not reached.

    `started` is when an encoding thread took the question up, `encoded` includes the call to the encoder model and the packing. Where a
    question is encoded in chunks, its first chunks are encoded before its last one is tokenized.
    """

    started: float = 0.0
    tokenized: float = 0.0
    encoded: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that an answer was sent from, for whoever asks the same again."""

    tokens: list[int]
    log_probs: list[float]
    hypotheses: list[Hypothesis]
    passage_scores: np.ndarray
    encoder_tokens: int


class ResponseWriter:
    """Collects one answer and sends it.

    `on_token` and `on_attribution` are the sequence's callbacks and run on the scheduler's thread. Whatever sends something runs through
    `submit`, on the responding thread, in order.

    Args:
        caller: the client's side.
        request: the checked request.
        prompt: of this reader.
        outputs: names of the outputs that the client asked for.
        submit: runs a call on the responding thread.
        on_finished: called once, after the last response. A stream's final flag comes later.
    """

    def __init__(
        self,
        caller: Caller,
        request: ReaderRequest,
        prompt: PromptEncoder,
        outputs: set[str],
        submit: Callable[..., Any],
        on_finished: Callable[[ResponseWriter], None],
    ):
        self.caller, self.request, self.times = caller, request, Times()
        self._prompt, self._outputs, self._submit, self._on_finished = prompt, outputs, submit, on_finished
        self.tokens: list[int] = []
        self.encoder_tokens = 0
        self.outcome = ""
        self.error = ""
        self.is_replayed = False
        self._log_probs: list[float] = []
        self._hypotheses: list[Hypothesis] = []
        self._passage_lengths = np.zeros(0, np.int64)
        self._passage_scores = np.zeros(0, np.float32)

    @property
    def queue_s(self) -> float:
        """Seconds spent waiting: for an encoding thread, then for a slot."""
        times = self.times
        return (times.started - self.caller.arrived_s) + max(times.admitted - times.encoded, 0.0)

    def started(self) -> None:
        """Note that an encoding thread has taken the question up."""
        self.times.started = time.monotonic()

    def tokenized(self, passage_lengths: np.ndarray) -> None:
        """Note that the passages are tokenized; int[n_passages], valid tokens of each."""
        self.times.tokenized = time.monotonic()
        self._passage_lengths = passage_lengths
        self.encoder_tokens = int(passage_lengths.sum())

    def encoded(self) -> None:
        """Note that the hidden states are there, packed."""
        self.times.encoded = time.monotonic()

    def on_admitted(self) -> None:
        """Note that the question has a slot."""
        self.times.admitted = time.monotonic()

    @property
    def passage_lengths(self) -> np.ndarray:
        """int[n_passages], encoder tokens of each passage, once they are known."""
        return self._passage_lengths

    def on_attribution(self, cross_attention: np.ndarray) -> None:
        """Score each passage by its share of the first token's cross-attention; the scores sum to 1.

        Args:
            cross_attention: float32[encoder_sequence_length], packed; the decoder sums it over heads.
        """
        starts = np.concatenate([[0], np.cumsum(self._passage_lengths)[:-1]])
        scores = np.add.reduceat(cross_attention, starts, dtype=np.float64)
        self._passage_scores = (scores / scores.sum()).astype(np.float32)

    def on_hypotheses(self, hypotheses: list[Hypothesis]) -> None:
        """Take the answers of a search, the best first."""
        options = self.request.choices or self.request.beams
        assert options is not None
        self._hypotheses = hypotheses[: options.num_answers]
        for token, log_prob in zip(hypotheses[0].tokens, hypotheses[0].log_probs, strict=True):
            self.on_token(token, log_prob)

    def on_token(self, token: int, log_prob: float) -> None:
        """Add one token to the answer."""
        if not self.tokens:
            self.times.first_token = time.monotonic()
        self.tokens.append(token)
        self._log_probs.append(log_prob)

    def record(self) -> Record:
        """What an answered question was answered from."""
        return Record(self.tokens, self._log_probs, self._hypotheses, self._passage_scores, self.encoder_tokens)

    def replay(self, record: Record) -> None:
        """Answer as an identical request was answered. Returns at once."""
        self.is_replayed = True
        self.encoder_tokens, self._passage_scores, self._hypotheses = record.encoder_tokens, record.passage_scores, record.hypotheses
        self.times.started = self.times.encoded = self.times.admitted = time.monotonic()
        for token, log_prob in zip(record.tokens, record.log_probs, strict=True):
            self.on_token(token, log_prob)
        self.finish(None)

    def finish(self, error: Exception | None) -> None:
        """Send the last response: the answer's totals, or the error. Returns at once."""
        self._submit(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        self.times.ended = time.monotonic()
        totals: dict[str, np.ndarray] = {}
        if error is None:
            try:
                totals = self._totals()
            except Exception as failure:  # a detokenizer's, for one: the client must have an end
                error = failure
        self.outcome = _outcome(error)
        try:
            if error is None:
                self._send_totals(totals)
            else:
                self.error = str(error)
                self._send_error(error)
        except Exception as failure:  # the client cannot be informed; its place must be free all the same
            self.outcome, self.error = "failed", f"the response could not be sent: {failure}"
        finally:
            self._on_finished(self)

    def _totals(self) -> dict[str, np.ndarray]:
        return {
            "answer": _text(self._last_text()),
            "log_prob": np.array([sum(self._log_probs)], np.float32),
            "tokens": np.array([len(self.tokens)], np.int32),
            "passage_scores": self._passage_scores,
            "token_log_probs": np.array(self._log_probs, np.float32),
            **self._answers(),
        }

    def _answers(self) -> dict[str, np.ndarray]:
        """All answers of a search; nothing for a greedy one. Where all choices are scored, their probabilities sum to 1."""
        if not self._hypotheses:
            return {}
        texts = [self._text_of(hypothesis).encode("utf-8") for hypothesis in self._hypotheses]
        log_probs = [sum(h.log_probs) if self.request.beams else h.score for h in self._hypotheses]
        return {"answers": np.array(texts, np.object_), "answer_log_probs": np.array(log_probs, np.float32)}

    def _text_of(self, hypothesis: Hypothesis) -> str:
        """A choice as the request spells it: its tokens may stand for other spaces or characters."""
        if self.request.choices is None or hypothesis.choice is None:
            return self._prompt.text(hypothesis.tokens)
        return self.request.choices.answers[hypothesis.choice]

    def _text(self) -> str:
        """The whole answer, or what there is of it."""
        return self._text_of(self._hypotheses[0]) if self._hypotheses else self._prompt.text(self.tokens)

    def log_line(self, model: str, *, with_text: bool) -> str:
        """One line of JSON about this request; `with_text` adds question and answer."""

        def ms(start: float, end: float) -> float | None:
            return round((end - start) * 1e3, 2) if start and end else None

        arrived, times = self.caller.arrived_s, self.times
        fields: dict[str, Any] = {
            "model": model,
            "request": self.caller.id,
            "outcome": self.outcome,
            "passages": len(self.request.passages),
            "encoder_tokens": self.encoder_tokens,
            "tokens": len(self.tokens),
            "queue_ms": round(self.queue_s * 1e3, 2) if times.admitted else None,
            "tokenized_ms": ms(arrived, times.tokenized),
            "encoded_ms": ms(arrived, times.encoded),
            "first_token_ms": ms(arrived, times.first_token),
            "total_ms": ms(arrived, times.ended),
        }
        if self.is_replayed:
            fields["kept_answer"] = True
        if self.error:
            fields["error"] = self.error
        if with_text:
            fields |= {"question": self.request.question, "answer": self._text()}
        return json.dumps(fields, ensure_ascii=False)

    def _last_text(self) -> str:
        raise NotImplementedError

    def _send_totals(self, totals: dict[str, np.ndarray]) -> None:
        raise NotImplementedError

    def _send_error(self, error: Exception) -> None:
        raise NotImplementedError

    def _send(self, outputs: dict[str, np.ndarray], flags: int) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._outputs]
        self.caller.sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


class UnaryWriter(ResponseWriter):
    """One response with the whole answer."""

    def _last_text(self) -> str:
        return self._text()

    def _send_totals(self, totals: dict[str, np.ndarray]) -> None:
        self.caller.close()
        self._send(totals, FINAL)

    def _send_error(self, error: Exception) -> None:
        self.caller.close()
        send_error(self.caller.sender, error, FINAL)


class StreamWriter(ResponseWriter):
    """A response for each part of the answer's text, then one with the rest and the totals, and later the final flag alone.

    Args:
        end_later: sends the caller's final flag, later (final_flag.py).
    """

    def __init__(self, *args: Any, end_later: Callable[[Caller], None]):
        super().__init__(*args)
        self._end_later = end_later
        self._detokenizer = IncrementalDetokenizer(self._prompt)
        self._send_failure: Exception | None = None

    def on_token(self, token: int, log_prob: float) -> None:
        """Add one token to the answer and send the text that it completes."""
        super().on_token(token, log_prob)
        self._submit(self._send_text, token)

    def _send_text(self, token: int) -> None:
        if self._send_failure is not None:
            return  # a part is missing already: the stream ends with an error
        try:
            if text := self._detokenizer.add(token):
                self._send({"answer": _text(text)}, 0)
        except Exception as error:
            self._send_failure = error

    def _finish(self, error: Exception | None) -> None:
        super()._finish(error or self._send_failure)

    def _last_text(self) -> str:
        return self._detokenizer.flush()

    def _send_totals(self, totals: dict[str, np.ndarray]) -> None:
        try:
            self._send(totals, 0)
        finally:
            self._end_later(self.caller)

    def _send_error(self, error: Exception) -> None:
        end_stream_with_error(self.caller, error, self._end_later)


def _text(text: str) -> np.ndarray:
    return np.array([text.encode("utf-8")], np.object_)


def _outcome(error: Exception | None) -> str:
    if error is None:
        return "answered"
    if isinstance(error, (RequestError, PromptError)):
        return "refused"
    return "cancelled" if isinstance(error, (CancelledError, DeadlineExceededError)) else "failed"


def send_error(sender: Any, error: Exception, flags: int) -> None:
    """Answer with an error, under the status that says what a client can do: mend the request, try again later, or neither."""
    codes = pb_utils.TritonError
    code = codes.INTERNAL
    if isinstance(error, (RequestError, PromptError)):
        code = codes.INVALID_ARG
    elif isinstance(error, CancelledError):
        code = codes.CANCELLED
    elif isinstance(error, SchedulerError):
        code = codes.UNAVAILABLE
    sender.send(pb_utils.InferenceResponse(error=codes(str(error), code)), flags=flags)


def end_stream_with_error(caller: Caller, error: Exception, end_later: Callable[[Caller], None]) -> None:
    """Send a stream's error at once, and its final flag later."""
    try:
        send_error(caller.sender, error, 0)
    finally:
        end_later(caller)
