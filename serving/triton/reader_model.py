"""The Triton model of a reader and its streaming twin: the whole chain behind one request.

question -> prompt and tokens -> BLS call to the encoder model -> scheduler -> answer. A unary model answers later, through a response
sender, from a thread of its own: so requests overlap in a model that Triton calls one batch at a time. The streaming model is the same
class under Triton's decoupled policy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from serving.contract.limits import Limits, LimitsError
from serving.contract.manifest import TOKENIZER_FILE, Manifest, ManifestError
from serving.contract.tensors import READER_TENSORS
from serving.engines.base import Decoder, is_fatal
from serving.engines.load import cross_kv_bytes_per_element, kv_budget, load_decoder, load_packer
from serving.pipeline.answer_cache import AnswerCache, CacheCounts
from serving.pipeline.beam_search import search_of
from serving.pipeline.elimination import Elimination
from serving.pipeline.encoder_cache import EncoderStateCache
from serving.pipeline.prompt import PromptEncoder
from serving.pipeline.request import LIVENESS_ID, REFUSING_FILE_VARIABLE, RequestError, read_request
from serving.pipeline.scheduler import CancelledError, DecodeSequence, QueueFullError, Scheduler, SchedulerCounts, SchedulerStoppedError

from .encoder_call import EncoderCall
from .final_flag import FinalFlags
from .metrics import Metrics
from .response import FINAL, Caller, ResponseWriter, StreamWriter, UnaryWriter, end_stream_with_error, send_error
from .shutdown import DRAIN_TIMEOUT_S, arm_watchdog, end_process, exit_soon
from .stop import MIN_ID_CHARACTERS, EarlyStops, StopRelay, stopped_id

# How often some of the questions in flight are checked for cancellation, and how many: each check costs Triton a message, and every
# thread here a turn of Python's lock.
CANCEL_POLL_S, CANCEL_POLLED = 0.01, 16
# Python's default of 5 ms is ten steps of a small reader on a GPU: the scheduler would wait that long for a thread that tokenizes.
SWITCH_INTERVAL_S = 0.0002
# The client knows an error in a stream, which has no status, by this text (clients/fido_client/errors.py).
SHUTTING_DOWN = "the server is shutting down; ask again"
MAX_WARNINGS = 100  # that are logged once each


class ReaderModel:
    """Triton's interface: initialize once, execute batches of requests, finalize."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer and decoder of the reader that the parameter `reader` names, and start the scheduler."""
        self._name = args["model_name"]
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config = json.loads(args["model_config"])
        if config.get("model_warmup"):
            # Triton warms a model up before it loads the next one, with arrays of zeros or noise, which are no question.
            raise pb_utils.TritonModelException(
                f"{self._name}: model_warmup: wanted none, because a reader calls its encoder model, which may not be loaded yet; "
                f"warm up the encoder instead, in its own config.pbtxt, with zero_data, and ask one question after the start"
            )
        self._streams = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        try:
            repository = Path(args["model_repository"]).resolve().parent
            self._load(config.get("parameters", {}), repository, args["model_version"], int(args["model_instance_device_id"]))
        except (ValueError, RuntimeError, KeyError) as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from error

    def _load(self, parameters: dict[str, Any], repository: Path, version: str, device: int) -> None:
        limits = Limits.from_parameters(parameters)
        reader = parameters["reader"]["string_value"]
        directory = repository / reader / version
        manifest = Manifest.load(directory)
        _require_same_weights(manifest, Manifest.load(repository / f"{reader}_encoder" / version), reader)
        tokenizer = manifest.read(directory, TOKENIZER_FILE).decode("utf-8")
        self._prompt = PromptEncoder(Tokenizer.from_str(tokenizer), manifest)
        self._kv_bytes_per_token = manifest.sizes.cross_kv_bytes_per_token(cross_kv_bytes_per_element(manifest))
        self._on_gpu = manifest.on_gpu
        decoder = load_decoder(directory, manifest, limits, device)
        self._limits = _with_what_it_can(limits, decoder)
        self._eos_token, self._start_token = manifest.eos_token_id, manifest.decoder_start_token_id
        packer = load_packer(directory, manifest, device)
        self._encoder_cache = _encoder_cache(limits, manifest)
        on_device = device if manifest.on_gpu else None
        self._encoder = EncoderCall(f"{reader}_encoder", self._prompt, packer, on_device, self._encoder_cache)
        memory = f", {decoder.memory}" if hasattr(decoder, "memory") else ""
        pb_utils.Logger.log_info(f"{self._name}: {manifest.engine} {manifest.precision}, {kv_budget(manifest, limits)}{memory}")
        self._scheduler = Scheduler(
            decoder,
            start_token=manifest.decoder_start_token_id,
            eos_token=manifest.eos_token_id,
            max_waiting=limits.max_in_flight,
            on_decoder_error=self._end_if_fatal,
            on_failure=lambda error: end_process(f"{self._name}: the scheduler has failed: {error!r}"),
        )
        self._encoding = ThreadPoolExecutor(limits.encode_threads, thread_name_prefix="encode")
        # One thread, so that the parts of a stream leave in order. Not the scheduler's: that one shall step.
        self._responding = ThreadPoolExecutor(1, thread_name_prefix="respond")
        self._final_flags = FinalFlags(lambda error: pb_utils.Logger.log_warn(f"{self._name}: a stream cannot be ended: {error}"))
        self._stopping = threading.Event()
        self._refusing_file = os.environ.get(REFUSING_FILE_VARIABLE)
        self._warned: set[str] = set()
        self._early_stops = EarlyStops()
        self._in_flight: set[ResponseWriter] = set()
        self._answers = AnswerCache(limits.answer_cache_bytes)
        self._stop_relay = StopRelay(self._name, self._stop)
        threading.Thread(target=self._poll_cancellations, name="cancellations", daemon=True).start()
        caches = (self._answers.counts, self._encoder_cache.counts if self._encoder_cache else CacheCounts)
        self._metrics = Metrics(self._name, self._scheduler.counts, lambda: len(self._in_flight), self._kv_bytes, *caches)

    def execute(self, requests: list[Any]) -> None:
        """Accept requests; answers are sent later. A bad request gets its own error and no other is affected."""
        for request in requests:
            try:
                self._accept_or_refuse(request)
            except Exception as error:  # a refusal that cannot be sent, for one: the other requests of the batch go on
                pb_utils.Logger.log_warn(f"{self._name}: a request could be neither accepted nor refused: {error!r}")

    def _accept_or_refuse(self, request: Any) -> None:
        caller = Caller(request, request.get_response_sender())
        if (to_stop := stopped_id(caller.id)) is not None:
            if len(to_stop) >= MIN_ID_CHARACTERS and not self._stop(to_stop):
                self._stop_relay.forward(to_stop)
            self._acknowledge(caller)
            return
        try:
            writer = self._accept(request, caller)
        except Exception as error:
            if caller.id != LIVENESS_ID:
                self._metrics.refused()
            self._refuse(caller, error)
            return
        self._in_flight.add(writer)
        if not self._replay(writer):
            self._encoding.submit(self._encode, writer)

    def _replay(self, writer: ResponseWriter) -> bool:
        """Answer as an identical request was answered, if that answer is kept."""
        try:
            if (kept := self._answers.get(writer.request)) is not None:
                writer.replay(kept)
            return kept is not None
        except Exception as error:
            writer.finish(error)
            return True

    def _stop(self, request_id: str) -> bool:
        """End the request that has this id, now or when it comes; whether it is in flight here."""
        callers = [writer.caller for writer in list(self._in_flight) if writer.caller.id == request_id]
        for caller in callers:
            caller.stop()
        if not callers:
            self._early_stops.add(request_id)
        return bool(callers)

    def _acknowledge(self, caller: Caller) -> None:
        if self._streams:
            caller.sender.send(pb_utils.InferenceResponse([]), flags=0)
            self._final_flags.send_later(caller)
        else:
            caller.sender.send(pb_utils.InferenceResponse([]), flags=FINAL)

    def _refuse(self, caller: Caller, error: Exception) -> None:
        if self._streams:
            end_stream_with_error(caller, error, self._final_flags.send_later)
        else:
            send_error(caller.sender, error, FINAL)

    def _accept(self, request: Any, caller: Caller) -> ResponseWriter:
        if self._early_stops.take(caller.id):
            raise CancelledError("stopped by the client")
        arrays = {}
        for spec in READER_TENSORS.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
            arrays[spec.name] = None if tensor is None else tensor.as_numpy()
        checked = read_request(arrays, self._limits, _parameters_of(request), streams=self._streams)
        if self._refusing_file and os.path.exists(self._refusing_file):
            raise SchedulerStoppedError(SHUTTING_DOWN)
        if len(self._in_flight) >= self._limits.max_in_flight:
            raise QueueFullError(f"{self._limits.max_in_flight} questions are in flight and no more may; try again later")
        outputs = set(request.requested_output_names())
        caller.limit(checked.timeout_us)
        rest = (caller, checked, self._prompt, outputs, self._responding.submit, self._finished)
        return StreamWriter(*rest, end_later=self._final_flags.send_later) if self._streams else UnaryWriter(*rest)

    def _encode(self, writer: ResponseWriter) -> None:
        """Encode one question and pass it to the scheduler. Runs on an encoding thread."""
        writer.started()
        try:
            if self._stopping.is_set():
                raise SchedulerStoppedError(SHUTTING_DOWN)
            if reason := writer.caller.cancel_reason():
                raise reason
            search = search_of(
                writer.request,
                self._prompt.answer_ids,
                most_beams=self._limits.max_num_beams,
                eos_token=self._eos_token,
                start_token=self._start_token,
            )
            hidden, positions = self._encoder.encode(
                writer.request, writer.tokenized, writer.caller.cancel_reason, in_chunks=len(self._in_flight) == 1
            )
            writer.encoded()
            options = writer.request.elimination
            self._scheduler.submit(
                DecodeSequence(
                    hidden,
                    positions,
                    writer.request.max_new_tokens,
                    writer.request.min_new_tokens,
                    on_token=writer.on_token,
                    on_end=writer.finish,
                    on_attribution=writer.on_attribution,
                    cancel_reason=writer.caller.cancel_reason,
                    on_admitted=writer.on_admitted,
                    search=search,
                    on_hypotheses=writer.on_hypotheses,
                    elimination=None if options is None else Elimination(options, writer.passage_lengths),
                )
            )
        except Exception as error:
            writer.finish(error)
            self._end_if_fatal(error)

    def _finished(self, writer: ResponseWriter) -> None:
        self._in_flight.discard(writer)
        self._metrics.ended(writer)
        if writer.outcome == "answered" and not writer.is_replayed:
            self._answers.put(writer.request, writer.record())
        pb_utils.Logger.log_info(writer.log_line(self._name, with_text=bool(self._limits.log_text)))

    def _end_if_fatal(self, error: Exception) -> None:
        if is_fatal(error):
            end_process(f"{self._name}: {error}")

    def _poll_cancellations(self) -> None:
        """Find out which questions were cancelled, on a thread of its own: a step must not wait for Triton's answers."""
        to_poll: list[ResponseWriter] = []
        while not self._stopping.wait(CANCEL_POLL_S):
            to_poll = to_poll or list(self._in_flight)
            for writer in to_poll[:CANCEL_POLLED]:
                try:
                    writer.caller.poll_cancelled()
                except Exception as error:  # of this question only: the others are still polled
                    self._log_once(f"request {writer.caller.id!r}: its cancellation cannot be polled: {error!r}")
            del to_poll[:CANCEL_POLLED]

    def _log_once(self, warning: str) -> None:
        """Log a warning that may come again every 10 ms. An error of the logger itself must not end the thread that warns."""
        with contextlib.suppress(Exception):
            if warning not in self._warned and len(self._warned) < MAX_WARNINGS:
                self._warned.add(warning)
                pb_utils.Logger.log_warn(f"{self._name}: {warning}")

    def _kv_bytes(self, counts: SchedulerCounts) -> int:
        return counts.encoder_tokens * self._kv_bytes_per_token

    def finalize(self) -> None:
        """Accept no more, answer what waits with an error, and end all threads."""
        arm_watchdog(DRAIN_TIMEOUT_S)
        self._stopping.set()
        self._stop_relay.close()
        self._encoding.shutdown()
        self._encoder.close()
        self._scheduler.stop()
        self._responding.shutdown()
        self._final_flags.close()
        self._metrics.close()
        exit_soon(on_gpu=self._on_gpu)
        # Engines and their memory go now: at the process's end a GPU's library may be gone before what needs it.
        del self._encoder, self._scheduler
        gc.collect()


def _parameters_of(request: Any) -> dict[str, Any]:
    """A request's parameters: over HTTP, the fields of its body that are no inputs.

    Raises:
        RequestError: if one is not UTF-8, which Triton does not look at.
    """
    try:
        return dict(json.loads(request.parameters() or "{}"))
    except ValueError as error:
        raise RequestError(f"parameters: wanted names and values in UTF-8, got {error}") from error


def _with_what_it_can(limits: Limits, decoder: Decoder) -> Limits:
    """The limits of requests: no more beams than slots, and nothing that the engine cannot do."""
    if not decoder.can_drop:
        limits = dataclasses.replace(limits, token_elimination=0)
    if decoder.has_beams:
        return dataclasses.replace(limits, max_num_beams=min(limits.max_num_beams, decoder.slots))
    return dataclasses.replace(limits, max_num_beams=1, max_allowed_answers=0)


def _encoder_cache(limits: Limits, manifest: Manifest) -> EncoderStateCache | None:
    """None where no states are kept.

    Raises:
        LimitsError: if states are to be kept that lie on a GPU, or that depend on the other passages of their call.
    """
    if not limits.encoder_cache_bytes:
        return None
    if manifest.on_gpu:
        raise LimitsError(f"encoder_cache_bytes: wanted 0 on a GPU, in whose memory states stay, got {limits.encoder_cache_bytes}")
    if (manifest.engine, manifest.precision) == ("onnxruntime", "int8"):
        why = "which measures its ranges over all passages of a call"
        raise LimitsError(f"encoder_cache_bytes: wanted 0 with ONNX Runtime's int8, {why}, got {limits.encoder_cache_bytes}")
    return EncoderStateCache(limits.encoder_cache_bytes, manifest.sizes.d_model_encoder)


def _require_same_weights(decoder: Manifest, encoder: Manifest, reader: str) -> None:
    if decoder.weights_sha256 != encoder.weights_sha256:
        raise ManifestError(
            f"{reader} and {reader}_encoder hold engines of different checkpoints (weights {decoder.weights_sha256[:16]}... and "
            f"{encoder.weights_sha256[:16]}...); `make export` makes both of one"
        )
