"""The Triton models `fid`, `fido`, `fid_stream` and `fido_stream`: the whole chain behind one request.

question -> prompt and tokens -> BLS call to the encoder model -> decode loop -> answer. The unary models answer later, through response
senders, from their own threads; that is what lets requests overlap in a model that Triton calls one batch at a time. The streaming
models are the same class under the decoupled policy.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from .decode_loop import DecodeLoop, LoopError, Question, QueueFullError
from .limits import Limits
from .manifest import TOKENIZER_FILE, Manifest, ManifestError
from .onnx_engine import OnnxDecoder
from .prompt import PromptEncoder, PromptError, TextPieces
from .request import ReaderRequest, RequestError, read_request
from .tensors import READER_TENSORS

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class ReaderModel:
    """Triton's contract: initialize once, execute batches of requests, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load tokenizer and decoder engines of the reader that the parameter `reader` names, and start the decode loop."""
        config = json.loads(args["model_config"])
        parameters = config.get("parameters", {})
        self._streams = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        try:
            self._limits = Limits.from_parameters(parameters)
            reader = parameters["reader"]["string_value"]
            repository = Path(args["model_repository"]).resolve().parent
            directory = repository / reader / args["model_version"]
            self._encoder_model = f"{reader}_encoder"
            manifest = Manifest.load(directory)
            _require_same_weights(manifest, Manifest.load(repository / self._encoder_model / args["model_version"]), reader)
            manifest.verify(directory, (TOKENIZER_FILE,))
            self._prompt = PromptEncoder(Tokenizer.from_file(str(directory / TOKENIZER_FILE)), manifest)
            engine = OnnxDecoder(directory, manifest, self._limits.slots, self._limits.intra_op_threads)
        except (ValueError, RuntimeError, KeyError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from error
        self._loop = DecodeLoop(
            engine, start_token=manifest.decoder_start_token_id, eos_token=manifest.eos_token_id, max_waiting=self._limits.max_waiting
        )
        self._encoding = ThreadPoolExecutor(self._limits.encode_threads, thread_name_prefix="encode")
        # one thread, so that the pieces of a stream leave in order; not the loop's own, which should be stepping
        self._responding = ThreadPoolExecutor(1, thread_name_prefix="respond")
        self._in_hand = threading.Semaphore(self._limits.max_waiting)

    def execute(self, requests: list[Any]) -> None:
        """Take requests in hand; answers are sent later. A bad request gets its own error and no other is touched."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                arrays = {}
                for spec in READER_TENSORS.inputs:
                    tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
                    arrays[spec.name] = None if tensor is None else tensor.as_numpy()
                asked = read_request(arrays, self._limits)
                if not self._in_hand.acquire(blocking=False):
                    raise QueueFullError(f"{self._limits.max_waiting} questions are in hand and no more may; try again later")
            except Exception as error:
                _send_error(sender, error)
                continue
            reply = (StreamReply if self._streams else UnaryReply)(
                sender, self._prompt, set(request.requested_output_names()), self._in_hand.release
            )
            self._encoding.submit(self._encode, asked, reply)

    def finalize(self) -> None:
        """Stop taking questions, tell those that wait, and end all threads."""
        self._encoding.shutdown()
        self._loop.stop()
        self._responding.shutdown()

    def _encode(self, asked: ReaderRequest, reply: Reply) -> None:
        """Tokenize and encode one question, and hand it to the decode loop. Runs on an encoding thread."""
        try:
            tokens = self._prompt.encode(asked.question, asked.passages, asked.titles)
            response = pb_utils.InferenceRequest(
                model_name=self._encoder_model,
                requested_output_names=["encoder_hidden_states"],
                inputs=[
                    pb_utils.Tensor("input_ids", tokens.input_ids),
                    pb_utils.Tensor("attention_mask", tokens.attention_mask),
                ],
            ).exec()
            if response.has_error():
                raise RuntimeError(f"{self._encoder_model}: {response.error().message()}")
            states = pb_utils.get_output_tensor_by_name(response, "encoder_hidden_states").as_numpy()
            # pack: the decoder then neither stores nor reads keys of padding. A copy, as the tensor's memory goes with the response.
            hidden = states[tokens.attention_mask.astype(bool)]
            self._loop.submit(
                Question(
                    hidden,
                    tokens.encoder_positions,
                    asked.max_new_tokens,
                    asked.min_new_tokens,
                    on_token=lambda token, log_prob: reply.token(token, log_prob, self._responding.submit),
                    on_end=lambda error: self._end_later(reply, error),
                )
            )
        except Exception as error:
            reply.end(error)

    def _end_later(self, reply: Reply, error: Exception | None) -> None:
        self._responding.submit(reply.end, error)


class Reply:
    """Collects one answer and sends it. `token` is called on the loop's thread, `end` once at last."""

    def __init__(self, sender: Any, prompt: PromptEncoder, outputs: set[str], release: Callable[[], None]):
        self._sender, self._prompt, self._outputs, self._release = sender, prompt, outputs, release
        self._tokens: list[int] = []
        self._log_prob = 0.0

    def token(self, token: int, log_prob: float, submit: Callable[..., Any]) -> None:
        """Take one more token; `submit` runs a call on the responding thread."""
        self._tokens.append(token)
        self._log_prob += log_prob

    def end(self, error: Exception | None) -> None:
        """Send what is left to send, and the final flag."""
        self._release()
        if error is not None:
            _send_error(self._sender, error)
        else:
            totals = {"log_prob": np.array([self._log_prob], np.float32), "tokens": np.array([len(self._tokens)], np.int32)}
            self._send({"answer": _text(self._last_text()), **totals}, FINAL)

    def _last_text(self) -> str:
        raise NotImplementedError

    def _send(self, outputs: dict[str, np.ndarray], flags: int) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in self._outputs]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=flags)


class UnaryReply(Reply):
    """One response with the whole answer."""

    def _last_text(self) -> str:
        return self._prompt.text(self._tokens)


class StreamReply(Reply):
    """A response for every piece of text, then one with what was kept back and the totals."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._pieces = TextPieces(self._prompt)

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


def _send_error(sender: Any, error: Exception) -> None:
    codes = pb_utils.TritonError
    code = codes.INTERNAL
    if isinstance(error, (RequestError, PromptError)):
        code = codes.INVALID_ARG
    elif isinstance(error, LoopError):
        code = codes.UNAVAILABLE
    sender.send(pb_utils.InferenceResponse(error=codes(str(error), code)), flags=FINAL)


def _require_same_weights(decoder: Manifest, encoder: Manifest, reader: str) -> None:
    if decoder.weights_sha256 != encoder.weights_sha256:
        raise ManifestError(
            f"{reader} and {reader}_encoder hold engines of different checkpoints (weights {decoder.weights_sha256[:16]}... and "
            f"{encoder.weights_sha256[:16]}...); `make export` makes both of one"
        )
