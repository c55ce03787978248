"""`python -m perf.peers.library`: the strongest that PyTorch can be at reading as FiD and FiDO read; random weights of a published size.

Two ways: "hand" is what an expert writes in a day (flex_attention, torch.compile), "library" the fused kernels that others keep (QuACK's
GEMMs, cuDNN's attention) in one CUDA graph; both in half precision and in FP8. Behind both the same decoder: static caches, compiled, a
CUDA graph a step. Of several kernels for cross-attention the fastest is taken. Written is JSON: median, least and most of every time, the
relative error of every encoder against fp32, and questions/s from token ids on the host to token ids on the host, a batch at a time. No
server, no tokenization, all passages full. Compiling takes about a minute a row and is not counted.

The library rows need what perf/quack_layers.py names; without it they hold what to install instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoint.config import ReaderConfig, reader_preset
from export.model.reader import Reader
from perf.bounds.machine import describe
from perf.bounds.statistics import publish, spread

from .decoder_step import CROSS_ATTENTION, StaticDecoder
from .encoders import Encoder, EncoderWeights, activation_scales, by_hand, by_hand_fp8, encoder_weights, plain
from .quack_layers import library_encoder, library_fp8_encoder

DECODER_DTYPE = torch.bfloat16
CHECKED = 2  # passages that an encoder's error is measured on
WAYS: dict[str, torch.dtype] = {
    "hand_bf16": torch.bfloat16,
    "hand_fp8": torch.bfloat16,
    "library_bf16": torch.bfloat16,
    "library_fp16": torch.float16,
    "library_fp8": torch.bfloat16,
}


READERS = ("fid", "fido")


def gpu_ms(work: Callable[[], object]) -> float:
    """GPU milliseconds of `work()`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        questions: answered at once.
        new_tokens: of every answer.
        call: passages that the encoder gets at a time; divides all.
        cross: kernels for cross-attention that are tried, of CROSS_ATTENTION.
        autotune: whether the decoder's compiler times its choices.
    """

    questions: int
    passages: int
    passage_length: int
    new_tokens: int
    call: int
    rounds: int
    device: str
    cross: tuple[str, ...] = tuple(CROSS_ATTENTION)
    autotune: bool = True

    @property
    def all_passages(self) -> int:
        """Of all questions."""
        return self.questions * self.passages


def captured(work: Callable[[], None], device: str) -> Callable[[], None]:
    """`work` as one CUDA graph; on a CPU as it is."""
    if device != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def made_encoder(way: str, weights: EncoderWeights, ids: Tensor) -> Encoder:
    """The encoder of a row of WAYS, for calls of as many passages as `ids` has."""
    if way.endswith("fp8"):
        scales = activation_scales(weights, ids[:CHECKED])
        return by_hand_fp8(weights, scales) if way.startswith("hand") else library_fp8_encoder(weights, scales, len(ids))
    return by_hand(weights) if way.startswith("hand") else library_encoder(weights, len(ids))


def relative_error(encoder: Encoder, reference: Tensor, ids: Tensor) -> float:
    """Of the first passages of a call, ||got - wanted|| / ||wanted||."""
    got = encoder(ids)[: len(reference)].to(reference.device, torch.float32)
    return float((got - reference).norm() / reference.norm())


class ReadyEncoder:
    """An encoder that is compiled, and captured where it is of library kernels; calls read `ids` and write `hidden`."""

    def __init__(self, way: str, weights: EncoderWeights, ids: Tensor, device: str):
        self.ids = ids.clone()
        self._encoder = made_encoder(way, weights, self.ids)
        self.hidden = self._encoder(self.ids)
        self.run: Callable[[], None] = self._run
        if way.startswith("library"):
            self.run = captured(self._run, device)

    def _run(self) -> None:
        self.hidden = self._encoder(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """See the module peer_encoders."""
        self.ids.copy_(ids)
        self.run()
        return self.hidden


class Decoding:
    """A decoder with its step, compiled and captured."""

    def __init__(self, reader: Reader, setting: Setting, cross: str, *, compiles: bool):
        torch._dynamo.reset()
        self.cross, self._new_tokens = cross, setting.new_tokens
        self.decoder = StaticDecoder(reader, setting.questions, setting.passages * setting.passage_length, setting.new_tokens, cross)
        step = self.decoder.step
        mode = "max-autotune-no-cudagraphs" if setting.autotune else "default"
        self._step = captured(torch.compile(step, mode=mode, dynamic=False) if compiles else step, setting.device)

    def run(self) -> None:
        """All steps."""
        for _ in range(self._new_tokens):
            self._step()


def answer(encoder: Encoder, decoding: Decoding, ids: Tensor, setting: Setting) -> Tensor:
    """Token ids of all passages on the host -> int64[new_tokens, questions] on the host."""
    on_device = ids.to(setting.device, non_blocking=True)
    hidden = torch.cat([encoder(part).clone() for part in on_device.split(setting.call)]) if setting.call < len(ids) else encoder(on_device)
    decoding.decoder.read(hidden.view(setting.questions, -1, hidden.shape[-1]))
    decoding.run()
    return decoding.decoder.answers.cpu()


def questions_per_s(work: Callable[[], object], questions: int, rounds: int) -> dict[str, float]:
    """By the host's clock, one batch after the other."""
    work()
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        rates.append(questions / (time.perf_counter() - started))
    return spread(rates, 1)


def let_go() -> None:
    """What the last row left on the card."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def random_reader(config: ReaderConfig) -> Reader:
    """In fp32, the same every time."""
    reader = Reader(config).eval().requires_grad_(False)
    reader.reset_parameters(0)
    return reader


def timed_encoder(way: str, weights: EncoderWeights, ids: Tensor, setting: Setting) -> tuple[ReadyEncoder, dict[str, Any]]:
    """An encoder for calls of as many passages as `ids` has: seconds until it was ready, and milliseconds for all passages of a call."""
    started = time.perf_counter()
    encoder = ReadyEncoder(way, weights, ids, setting.device)
    encoder.run()
    ready = round(time.perf_counter() - started, 1)
    return encoder, {"ready_s": ready, "ms": spread([gpu_ms(encoder.run) for _ in range(setting.rounds)])}


@torch.no_grad()
def measure_decoder(reader: Reader, setting: Setting) -> tuple[Decoding, dict[str, Any]]:
    """Milliseconds of a step with every kernel for cross-attention; and the decoder with the fastest."""
    reader = reader.to(setting.device, DECODER_DTYPE)
    hidden = torch.randn(setting.questions, setting.passages * setting.passage_length, reader.config.encoder.d_model)
    hidden = hidden.to(setting.device, DECODER_DTYPE)
    found: dict[str, Any] = {}
    fastest: Decoding | None = None
    for cross in setting.cross:
        try:
            decoding = Decoding(reader, setting, cross, compiles=True)
            times = []
            for _ in range(setting.rounds):
                decoding.decoder.read(hidden)
                times.append(gpu_ms(decoding.run) / setting.new_tokens)
            found[cross] = spread(times)
            if fastest is None or found[cross]["median"] < found[fastest.cross]["median"]:
                fastest = decoding
            del decoding
        except Exception as error:  # of a compiler: the other kernels still count
            found[cross] = one_line(error)
        let_go()
    if fastest is None:
        raise RuntimeError(f"no kernel for cross-attention ran: {found}")
    return fastest, {"by_cross_attention": found, "fastest": fastest.cross, "step_ms": found[fastest.cross]}


def one_line(error: Exception) -> dict[str, str]:
    """In place of numbers."""
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def summary_of(result: dict[str, Any]) -> dict[str, float]:
    """The numbers that the report reads: of each kind the best."""
    summary = {}
    for kind in ("hand", "library"):
        for suffix, precisions in (("", ("bf16", "fp16")), ("_fp8", ("fp8",))):
            rows = [result["ways"].get(f"{kind}_{precision}", {}) for precision in precisions]
            for key, name in (("all_ms", "encoder"), ("one_question_ms", "encoder_one_question")):
                if times := [row[key]["median"] for row in rows if key in row]:
                    summary[f"{kind}_pytorch_{name}{suffix}_ms"] = min(times)
            for reader in READERS:
                if rates := [row["questions_per_s"][reader]["median"] for row in rows if reader in row.get("questions_per_s", {})]:
                    summary[f"{kind}_pytorch_{reader}{suffix}_questions_per_s"] = max(rates)
    for reader, steps in result["decoders"].items():
        if "step_ms" in steps:
            summary[f"compiled_pytorch_{reader}_step_ms"] = steps["step_ms"]["median"]
    return summary


@torch.no_grad()
def measure_way(
    way: str, exact: EncoderWeights, ids: Tensor, decodings: dict[str, Decoding], setting: Setting, alone: bool
) -> dict[str, Any]:
    """An encoder with the error and time of all passages, of one question's if `alone`, and questions/s with every decoder behind it."""
    weights = exact.to(setting.device, WAYS[way])
    on_device = ids.to(setting.device)
    checked = on_device[:CHECKED]
    encoder, times = timed_encoder(way, weights, on_device[: setting.call], setting)
    calls = setting.all_passages // setting.call
    found: dict[str, Any] = {"ready_s": times["ready_s"], "all_ms": {key: round(ms * calls, 3) for key, ms in times["ms"].items()}}
    reference = plain(exact.to(setting.device, torch.float32))(checked)
    found["relative_error"] = round(relative_error(encoder, reference, on_device[: setting.call]), 5)
    pinned = ids.pin_memory() if setting.device == "cuda" else ids
    found["questions_per_s"] = {
        name: questions_per_s(functools.partial(answer, encoder, decoding, pinned, setting), setting.questions, setting.rounds)
        for name, decoding in decodings.items()
    }
    del encoder
    let_go()
    if alone:
        _, times = timed_encoder(way, weights, on_device[: setting.passages], setting)
        found["one_question_ms"] = times["ms"]
    return found


def measure(
    config_of: Callable[[str], ReaderConfig],
    ways: list[str],
    names: list[str],
    setting: Setting,
    alone: bool,
    after_row: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Every row; one that fails holds `error` instead of its numbers. `after_row` gets what there is after each."""
    result: dict[str, Any] = {"decoders": {}, "ways": {}}
    decodings: dict[str, Decoding] = {}

    def keep(kind: str, name: str, numbers: dict[str, Any]) -> None:
        result[kind][name] = numbers
        print(name, numbers, file=sys.stderr, flush=True)
        after_row(result)
        let_go()

    for name in names:
        try:
            decodings[name], numbers = measure_decoder(random_reader(config_of(name)), setting)
        except Exception as error:  # of a compiler, of the GPU's memory: the encoders still count
            numbers = one_line(error)
        keep("decoders", name, numbers)
    config = config_of("fid")  # both readers have the same encoder
    exact = encoder_weights(random_reader(config), setting.passage_length)
    ids = torch.randint(2, config.vocab_size, (setting.all_passages, setting.passage_length), generator=torch.Generator().manual_seed(0))
    for way in ways:
        try:
            numbers = measure_way(way, exact, ids, decodings, setting, alone)
        except Exception as error:  # of a compiler, of what is not installed: the other rows still count
            numbers = one_line(error)
        keep("ways", way, numbers)
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure, print JSON, and keep it."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.peers.library", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="base")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--passage-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--call", type=int, help="passages that the encoder gets at a time; default all")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--one-question", action=argparse.BooleanOptionalAction, default=True, help="measure its encoder alone, too")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cross", nargs="+", choices=list(CROSS_ATTENTION), default=list(CROSS_ATTENTION), help="of the decoder")
    parser.add_argument("--autotune", action=argparse.BooleanOptionalAction, default=True, help="of the decoder: minutes a reader")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    questions, passages = arguments.questions, arguments.passages
    call = arguments.call or questions * passages
    if questions * passages % call:
        parser.error(f"--call: wanted a divisor of all {questions * passages} passages, got {call}")
    sizes = (questions, passages, arguments.passage_length, arguments.new_tokens, call, arguments.rounds)
    setting = Setting(*sizes, "cuda", tuple(arguments.cross), arguments.autotune)
    started = time.perf_counter()

    def config_of(name: str) -> ReaderConfig:
        return reader_preset(arguments.preset, fido=name == "fido")

    versions = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "machine": describe()}

    def keep(result: dict[str, Any]) -> None:
        settings = {**dataclasses.asdict(setting), "preset": arguments.preset, "weights": "random"}
        settings["seconds"] = round(time.perf_counter() - started)
        publish({"summary": summary_of(result), **result, "settings": {**settings, **versions}}, arguments.out)

    measure(config_of, arguments.ways, arguments.readers, setting, arguments.one_question, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
