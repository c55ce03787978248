"""`python -m perf.bounds.ablation`: the FiDO paper's table on this stack: FiD, +LSA, +MQ, and both, each with its bound.

LSA (layer-sparse attention) has cross-attention in every K-th decoder layer only; MQ (multi-query attention) has one key/value head.
Weights are random, of published sizes. The encoder is the same in every row and is measured once. Rows are exported, loaded and stepped
one at a time, because two do not fit into memory together; rows that are not measured still get their bound. On the CPU this command
exports the rows (fp32, ONNX Runtime); on a GPU --prebuilt names directories of built engines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint.config import FIDO_PERIOD, ReaderConfig, reader_preset
from serving.contract.limits import Limits
from serving.contract.manifest import Manifest
from serving.engines.base import Decoder, Packer
from serving.engines.load import bytes_per_element, load_decoder, load_encoder, load_packer

from .cost import HardwareSpec, Workload, cross_kv_bytes, cross_kv_cost, encoder_cost, largest_batch, step_cost, step_weights
from .rates import hardware_spec_of
from .stages import step_times_ms
from .statistics import free_gpu_memory, spread

ENCODER_PASSAGES = 8  # measured on the CPU; the time of a question is proportional, since passages are encoded independently


@dataclasses.dataclass(frozen=True)
class Row:
    """One reader of the table."""

    decoder: str  # "base", or a larger one with the base encoder
    period: int
    num_kv_heads: int

    @property
    def key(self) -> str:
        """The key in --prebuilt: decoder:period:heads."""
        return f"{self.decoder}:{self.period}:{self.num_kv_heads}"

    def config(self, encoder: str) -> ReaderConfig:
        """The row's reader sizes."""
        name = encoder if self.decoder == encoder else f"{encoder}-{self.decoder}"
        return reader_preset(name, fido=False, period=self.period, num_kv_heads=self.num_kv_heads)

    def name(self, encoder: str) -> str:
        """The row's name, as in the paper."""
        all_heads = reader_preset(self.decoder, fido=False).decoder.num_heads
        changes = []
        if self.period > 1:
            changes.append(f"LSA-{self.period}")
        if self.num_kv_heads == 1:
            changes.append("MQ")
        elif self.num_kv_heads < all_heads:
            changes.append(f"{self.num_kv_heads} K/V heads")
        size = "" if self.decoder == encoder else f", {self.decoder.upper()} decoder"
        return "FiD" + "".join(f" +{change}" for change in changes) + size


def rows_of(encoder: str, large: str) -> list[Row]:
    """The paper's four rows, other periods and head counts, and the four rows again with the larger decoder."""
    heads, large_heads = (reader_preset(size, fido=False).decoder.num_heads for size in (encoder, large))
    k = FIDO_PERIOD
    four = [Row(encoder, period, kv) for period, kv in ((1, heads), (k, heads), (1, 1), (k, 1))]
    layers = reader_preset(encoder, fido=False).decoder.num_layers
    between = [Row(encoder, period, 1) for period in (2, 3, 12) if period <= layers] + [Row(encoder, k, 4 if heads % 4 == 0 else 2)]
    return four + between + [Row(large, period, kv) for period, kv in ((1, large_heads), (k, large_heads), (1, 1), (k, 1))]


def exported(config: ReaderConfig, tokenizer: Path, folder: Path) -> Manifest:
    """Export cross_kv and decoder_step of a reader with random weights, without its encoder."""
    from export.checkpoint.files import Checkpoint, read_tokenizer
    from export.graphs.cpu import CrossKVGraph, DecoderStepGraph, engine_sizes
    from export.graphs.onnx_export import OPSET, describe_reader, onnx_from_module
    from export.model.reader import Reader
    from serving.contract.manifest import MANIFEST_FILE
    from serving.contract.tensors import cross_kv_tensors, decoder_step_tensors

    shallow = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, num_layers=1))
    reader = Reader(shallow)
    reader.reset_parameters(0)
    sizes = engine_sizes(config)
    onnx_from_module(CrossKVGraph(reader), cross_kv_tensors(sizes), folder / "cross_kv.onnx")
    onnx_from_module(DecoderStepGraph(reader, beams=True), decoder_step_tensors(sizes, beams=True), folder / "decoder_step.onnx")
    manifest = describe_reader(Checkpoint(reader.eval(), read_tokenizer(tokenizer), "random", "random weights"), folder, OPSET, {})
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def measured_encoder_ms(encoder: str, passages: int, length: int, rounds: int, tokenizer: Path) -> list[float]:
    """Milliseconds for the passages of one question on the CPU, scaled up from ENCODER_PASSAGES."""
    from export.checkpoint.files import Checkpoint, read_tokenizer
    from export.graphs.cpu import EncoderGraph, engine_sizes
    from export.graphs.onnx_export import OPSET, describe_reader, onnx_from_module
    from export.model.reader import Reader
    from serving.contract.tensors import encoder_tensors
    from serving.engines.cpu import OnnxEncoder

    config = reader_preset(encoder, fido=True)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=1), encoder_decoder_attention_period=1)
    reader = Reader(config)
    reader.reset_parameters(0)
    with tempfile.TemporaryDirectory() as scratch:
        onnx_from_module(EncoderGraph(reader), encoder_tensors(engine_sizes(config)), Path(scratch, "encoder.onnx"))
        checkpoint = Checkpoint(reader.eval(), read_tokenizer(tokenizer), "random", "random weights")
        engine = OnnxEncoder(Path(scratch), describe_reader(checkpoint, Path(scratch), OPSET, {}))
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (ENCODER_PASSAGES, length), dtype=np.int32)
    return [ms * passages / ENCODER_PASSAGES for ms in _times_ms(lambda: engine.encode([(ids, np.ones_like(ids))]), rounds)]


def _times_ms(work: Any, rounds: int) -> list[float]:
    work()
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        found.append((time.perf_counter() - started) * 1e3)
    return found


def measure_row(
    decoder: Decoder, packer: Packer, config: ReaderConfig, work: Workload, batches: list[int], steps: int
) -> tuple[dict[str, Any], float]:
    """Milliseconds of a step at each batch, and of one question's cross-attention keys and values."""
    hidden = np.random.default_rng(0).standard_normal((1, work.encoder_tokens, config.encoder.d_model)).astype(np.float32) * 0.1
    if hasattr(decoder, "memory"):
        hidden = hidden.astype(np.float16)
    mask, positions = np.ones((1, work.encoder_tokens), np.int32), np.zeros(work.encoder_tokens, np.int32)
    packed, admitted, found = packer.pack(hidden, mask), 0, {}
    cross_kv_ms = []
    for batch in batches:
        for slot in range(admitted, batch):
            started = time.perf_counter()
            decoder.admit(slot, slot, packed, positions)
            decoder.step(np.full(slot + 1, 5, np.int32), np.zeros(slot + 1, np.int32), np.zeros(slot + 1, np.float32))
            both = (time.perf_counter() - started) * 1e3
            again = step_times_ms(decoder, slot + 1, 1)[0]
            cross_kv_ms.append(max(both - again, 0.0))
        admitted = batch
        found[str(batch)] = spread(step_times_ms(decoder, batch, steps))
    return found, statistics.median(cross_kv_ms)


def entry_of(
    row: Row, encoder: str, spec: HardwareSpec, work: Workload, batches: list[int], width: int, memory_bytes: int
) -> dict[str, Any]:
    """A row's entry before it is measured: sizes and bounds."""
    config = row.config(encoder)
    bounds = {
        str(batch): round(step_cost(config, dataclasses.replace(work, batch=batch), width).bound_s(spec) * 1e3, 4) for batch in batches
    }
    decoder_bound = cross_kv_cost(config, work, width).bound_s(spec) * 1e3 + bounds[str(batches[0])] * work.new_tokens
    return {
        "name": row.name(encoder),
        "key": row.key,
        "period": row.period,
        "num_kv_heads": row.num_kv_heads,
        "decoder": row.decoder,
        "measured": False,
        "step_ms": None,
        "bound_ms": bounds,
        "cross_kv_mb_per_question": round(cross_kv_bytes(config, work, width) / 1e6, 2),
        "largest_batch": largest_batch(config, work, width, memory_bytes, step_weights(config)),
        "decoder_ms_per_question": None,
        "decoder_bound_ms_per_question": round(decoder_bound, 3),
        "encoder_bound_ms_per_question": round(encoder_cost(config, work, width).bound_s(spec) * 1e3, 3),
        "total_ms_per_question": None,
        "note": "",
    }


def main(argv: list[str] | None = None) -> int:
    """Measure the wanted rows and write ablation.json."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.bounds.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="base", help="published size of the encoder and of the smaller decoder")
    parser.add_argument("--large", default="xl", help="of the larger decoder")
    parser.add_argument("--measure", type=int, default=4, help="number of rows, from the first, to export and measure")
    parser.add_argument("--prebuilt", nargs="*", default=[], metavar="DECODER:PERIOD:HEADS=DIR", help="engines of a row, for a GPU")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--passage-length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory-gb", type=float, default=20.0, help="memory for weights, keys and values")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/fid/tokenizer.json"))
    parser.add_argument("--run", type=Path, default=Path("build/perf"))
    arguments = parser.parse_args(argv)
    spec, batches = hardware_spec_of(arguments.run), sorted(arguments.batches)
    work = Workload(1, arguments.passages, arguments.passage_length, arguments.new_tokens)
    prebuilt = dict(text.split("=", 1) for text in arguments.prebuilt)
    width = 2 if prebuilt else 4
    limits = Limits(slots=batches[-1], max_passages=arguments.passages, max_new_tokens=max(512, arguments.new_tokens))
    if prebuilt:
        directory = Path(next(iter(prebuilt.values())))
        encoder_engine = load_encoder(directory, Manifest.load(directory), limits)
        ids = np.random.default_rng(0).integers(2, 1000, (arguments.passages, arguments.passage_length), dtype=np.int32)
        encoder_ms = _times_ms(lambda: encoder_engine.encode([(ids, np.ones_like(ids))]), arguments.rounds)
    else:
        encoder_ms = measured_encoder_ms(
            arguments.encoder, arguments.passages, arguments.passage_length, arguments.rounds, arguments.tokenizer
        )
    entries = []
    for number, row in enumerate(rows_of(arguments.encoder, arguments.large)):
        entry = entry_of(row, arguments.encoder, spec, work, batches, width, int(arguments.memory_gb * 1e9))
        entries.append(entry)
        if row.key in prebuilt or (not prebuilt and number < arguments.measure):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(prebuilt.get(row.key, scratch))
                config = row.config(arguments.encoder)
                manifest = Manifest.load(folder) if row.key in prebuilt else exported(config, arguments.tokenizer, folder)
                assert bytes_per_element(manifest) == width
                decoder = load_decoder(folder, manifest, limits)
                step_ms, cross_kv_ms = measure_row(decoder, load_packer(folder, manifest), config, work, batches, arguments.steps)
                del decoder
                free_gpu_memory()
            per_question = cross_kv_ms + step_ms[str(batches[-1])]["median"] / batches[-1] * work.new_tokens
            entry |= {
                "measured": True,
                "step_ms": step_ms,
                "cross_kv_ms": round(cross_kv_ms, 3),
                "decoder_ms_per_question": round(per_question, 3),
            }
            entry["total_ms_per_question"] = round(per_question + statistics.median(encoder_ms), 3)
            times = ", ".join(f"{spread_['median']:.2f} ms at batch {batch}" for batch, spread_ in step_ms.items())
            print(f"{entry['name']}: step {times}", flush=True)
    result = {
        "preset": arguments.encoder,
        "workload": f"{work.n_passages} passages x {work.passage_length} tokens, answers of {work.new_tokens}",
        "encoder_ms_per_question": spread(encoder_ms),
        "batches": batches,
        "rows": entries,
    }
    (arguments.run / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
