"""The Triton models `fid`, `fido`, `fid_stream` and `fido_stream`: the whole chain behind one request.

question -> prompt and tokens -> BLS call to the encoder model -> decode loop -> answer. The unary models answer later, through response
senders, from their own threads; that is what lets requests overlap in a model that Triton calls one batch at a time. The streaming
models are the same class under the decoupled policy.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from serving.contract.limits import Limits
from serving.contract.manifest import TOKENIZER_FILE, Manifest, ManifestError
from serving.contract.tensors import READER_TENSORS
from serving.engines.load import bytes_per_element, kv_budget, load_decoder, load_packer
from serving.pipeline.prompt import PASSAGES_PER_CHUNK, EncoderInput, PromptEncoder
from serving.pipeline.request import LIVENESS_ID, read_request
from serving.pipeline.scheduler import CancelledError, DecodeSequence, QueueFullError, Scheduler, SchedulerCounts, SchedulerStoppedError

from .metrics import Metrics
from .response import Caller, ResponseWriter, StreamWriter, UnaryWriter, send_error
from .shutdown import DRAIN_TIMEOUT_S, arm_watchdog, exit_soon

# How often some questions in hand are parsed whether they were cancelled, and how many: each asking costs Triton a message, and every
# thread here a turn of Python's lock.
CANCEL_POLL_S, CANCEL_ASKED = 0.01, 16
CALLS_AT_ONCE = 4  # pieces of questions in hand at the encoder model
# Python's own 5 ms are ten steps of a small reader on a GPU: so long the loop, back from the engine, would wait for one that tokenizes.
SWITCH_INTERVAL_S = 0.0002


class ReaderModel:
    """Triton's contract: initialize once, execute batches of requests, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load tokenizer and decoder engines of the reader that the parameter `reader` names, and start the decode loop."""
        self._name = args["model_name"]
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config = json.loads(args["model_config"])
        self._streams = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        try:
            repository = Path(args["model_repository"]).resolve().parent
            self._load(config.get("parameters", {}), repository, args["model_version"], int(args["model_instance_device_id"]))
        except (ValueError, RuntimeError, KeyError) as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from error

    def _load(self, parameters: dict[str, Any], repository: Path, version: str, device: int) -> None:
        limits = self._limits = Limits.from_parameters(parameters)
        reader = parameters["reader"]["string_value"]
        directory = repository / reader / version
        self._encoder_model = f"{reader}_encoder"
        manifest = Manifest.load(directory)
        _require_same_weights(manifest, Manifest.load(repository / self._encoder_model / version), reader)
        manifest.verify(directory, (TOKENIZER_FILE,))
        self._prompt = PromptEncoder(Tokenizer.from_file(str(directory / TOKENIZER_FILE)), manifest)
        self._sizes, self._bytes_per_element, self._on_gpu = manifest.sizes, bytes_per_element(manifest), manifest.on_gpu
        engine = load_decoder(directory, manifest, limits, device)
        self._packer = load_packer(directory, manifest, device)
        # hidden states that are made on the GPU and read there stay there
        gpu = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, device) if manifest.on_gpu else None
        self._where_to_put_states = {"preferred_memory": gpu} if gpu else {}
        memory = f", {engine.memory}" if hasattr(engine, "memory") else ""
        pb_utils.Logger.log_info(f"{self._name}: {manifest.engine} {manifest.precision}, {kv_budget(manifest, limits)}{memory}")
        self._loop = Scheduler(
            engine, start_token=manifest.decoder_start_token_id, eos_token=manifest.eos_token_id, max_waiting=limits.max_in_flight
        )
        self._encoding = ThreadPoolExecutor(limits.encode_threads, thread_name_prefix="encode")
        self._calling = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix="call")
        # one thread, so that the pieces of a stream exit_soon in order; not the loop's own, which should be stepping
        self._responding = ThreadPoolExecutor(1, thread_name_prefix="respond")
        self._stopping = threading.Event()
        self._in_flight: set[ResponseWriter] = set()
        threading.Thread(target=self._watch, name="cancellations", daemon=True).start()
        self._metrics = Metrics(self._name, self._loop.counts, lambda: len(self._in_flight), self._kv_bytes)

    def _watch(self) -> None:
        """See which questions were cancelled, beside the loop: a step must not wait for Triton's word on each of them."""
        to_ask: list[ResponseWriter] = []
        while not self._stopping.wait(CANCEL_POLL_S):
            to_ask = to_ask or list(self._in_flight)
            for writer in to_ask[:CANCEL_ASKED]:
                writer.caller.poll_cancelled()
            del to_ask[:CANCEL_ASKED]

    def _kv_bytes(self, counts: SchedulerCounts) -> int:
        return counts.encoder_tokens * self._sizes.cross_kv_bytes_per_token(self._bytes_per_element)

    def execute(self, requests: list[Any]) -> None:
        """Take requests in hand; answers are sent later. A bad request gets its own error and no other is touched."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                writer = self._accept(request, sender)
            except Exception as error:
                if request.request_id() != LIVENESS_ID:
                    self._metrics.refused()
                send_error(sender, error)
                continue
            self._in_flight.add(writer)
            self._encoding.submit(self._encode, writer)

    def _accept(self, request: Any, sender: Any) -> ResponseWriter:
        arrays = {}
        for spec in READER_TENSORS.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
            arrays[spec.name] = None if tensor is None else tensor.as_numpy()
        parsed = read_request(arrays, self._limits)
        if len(self._in_flight) >= self._limits.max_in_flight:
            raise QueueFullError(f"{self._limits.max_in_flight} questions are in hand and no more may; try again later")
        kind = StreamWriter if self._streams else UnaryWriter
        return kind(Caller(request, sender), parsed, self._prompt, set(request.requested_output_names()), self._ended)

    def _ended(self, writer: ResponseWriter) -> None:
        self._in_flight.discard(writer)
        self._metrics.ended(writer)
        pb_utils.Logger.log_info(writer.log_line(self._name, with_text=bool(self._limits.log_text)))

    def finalize(self) -> None:
        """Stop taking questions, tell those that wait, and end all threads."""
        arm_watchdog(DRAIN_TIMEOUT_S)
        self._stopping.set()
        self._encoding.shutdown()
        self._calling.shutdown()
        self._loop.stop()
        self._responding.shutdown()
        self._metrics.close()
        exit_soon(on_gpu=self._on_gpu)
        # engines and their memory go while the process is whole: left to its end, a GPU's library may be gone before what needs it
        del self._packer, self._loop
        gc.collect()

    def _encode(self, writer: ResponseWriter) -> None:
        """Tokenize and encode one question, and hand it to the decode loop. Runs on an encoding thread."""
        try:
            if self._stopping.is_set():
                raise SchedulerStoppedError("the server is shutting down")
            if reason := writer.caller.cancel_reason():
                raise CancelledError(reason)
            parsed = writer.parsed
            size = PASSAGES_PER_CHUNK if len(self._in_flight) == 1 else len(parsed.passages)
            pieces: list[EncoderInput] = []
            calls: list[Future[Any]] = []
            for piece in self._prompt.encode_in_chunks(parsed.question, parsed.passages, parsed.titles, size):
                pieces.append(piece)
                if len(pieces) * size < len(parsed.passages):
                    calls.append(self._calling.submit(self._call_encoder, piece))
            writer.tokenized(np.concatenate([piece.attention_mask.sum(1) for piece in pieces]))
            last = self._call_encoder(pieces[-1])
            hidden = self._packer.concatenate([*(call.result() for call in calls), last])
            writer.encoded()
            self._loop.submit(
                DecodeSequence(
                    hidden,
                    np.concatenate([piece.encoder_positions for piece in pieces]),
                    parsed.max_new_tokens,
                    parsed.min_new_tokens,
                    on_token=lambda token, log_prob: writer.token(token, log_prob, self._responding.submit),
                    on_end=lambda error: self._finish_later(writer, error),
                    on_attribution=writer.attribution,
                    cancel_reason=writer.caller.cancel_reason,
                )
            )
        except Exception as error:
            self._finish_later(writer, error)

    def _call_encoder(self, tokens: EncoderInput) -> Any:
        """The valid hidden states of some passages, packed."""
        response = pb_utils.InferenceRequest(
            model_name=self._encoder_model,
            requested_output_names=["encoder_hidden_states"],
            inputs=[
                pb_utils.Tensor("input_ids", tokens.input_ids),
                pb_utils.Tensor("attention_mask", tokens.attention_mask),
            ],
            **self._where_to_put_states,
        ).exec()
        if response.has_error():
            raise RuntimeError(f"{self._encoder_model}: {response.error().message()}")
        states = _array(pb_utils.get_output_tensor_by_name(response, "encoder_hidden_states"))
        return self._packer.pack(states, tokens.attention_mask)  # a copy: the tensor's memory goes with the response

    def _finish_later(self, writer: ResponseWriter, error: Exception | None) -> None:
        self._responding.submit(writer.finish, error)


def _array(tensor: Any) -> Any:
    """A response's tensor where it lies: NumPy's array of host memory, or CuPy's of the GPU's."""
    if tensor.is_cpu():
        return tensor.as_numpy()
    import cupy

    return cupy.from_dlpack(tensor)


def _require_same_weights(decoder: Manifest, encoder: Manifest, reader: str) -> None:
    if decoder.weights_sha256 != encoder.weights_sha256:
        raise ManifestError(
            f"{reader} and {reader}_encoder hold engines of different checkpoints (weights {decoder.weights_sha256[:16]}... and "
            f"{encoder.weights_sha256[:16]}...); `make export` makes both of one"
        )
