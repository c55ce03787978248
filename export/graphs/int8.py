"""A CPU reader's graphs in int8, for OpenVINO: calibrated by NNCF on the user's questions and passages.

Comes in: exported fp32 graphs and a file of questions with passages. Goes out: OpenVINO's own files, a quarter as large. In the encoder and
cross_kv weights and activations are int8, with ranges measured on the samples. In decoder_step the weights alone are: a step reads all of
them for a few rows, so that their bytes are its time. Layers whose result int8 would change too much stay as they were, each with its
reason.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from export.errors import ExportError, UsageError
from serving.contract.manifest import TOKENIZER_FILE, Manifest

SAMPLE_PASSAGES = 64  # that ranges are measured on
PROBED_PASSAGES = 8  # that the error of each layer is measured on
# A layer stays out if int8 changes its output by more than this share, on the samples. Rounding alone explains 0.01.
LARGEST_ERROR = 0.2
INT8_LEVELS = 127


@dataclasses.dataclass(frozen=True)
class LayerError:
    """What int8 would do to one layer with weights.

    Attributes:
        error: relative change of its output.
        outlier: its largest input over the one that 99.9% of them stay below.
    """

    name: str
    error: float
    outlier: float

    def __str__(self) -> str:
        return f"int8 would change its output by {self.error:.0%}: its largest input is {self.outlier:,.0f} times that of 99.9%"


def require_nncf(samples: Path | None) -> None:
    """Raise UsageError before anything is exported: if NNCF is not installed, or there is nothing to calibrate on."""
    if importlib.util.find_spec("nncf") is None:
        raise UsageError("precision int8: wanted the package nncf, which calibrates, found none; `make setup FOR=openvino` installs it")
    if samples is None or not samples.is_file():
        got = "none" if samples is None else str(samples)
        raise UsageError(f"precision int8: wanted questions and passages to calibrate on (JSON lines), got {got}; pass SAMPLES=file")


def to_int8(directory: Path, manifest: Manifest, samples: Path) -> dict[str, Any]:
    """Replace the graphs in a directory by their int8 form.

    Args:
        directory: holds fp32 graphs and their tokenizer.
        manifest: of these graphs.
        samples: a line of JSON each, with "question" and "ctxs", as FiD's data files.

    Returns:
        What was done, for the manifest's provenance: samples, error of the hidden states, layers left out and why.

    Raises:
        ExportError: if there are no samples in the file.
    """
    rows = sample_rows(directory, manifest, samples)
    nncf, ov = _nncf(), _openvino()
    core = ov.Core()
    graphs = {name: core.read_model(directory / manifest.engine_file(name)) for name in ("encoder", "cross_kv", "decoder_step")}
    encode = core.compile_model(graphs["encoder"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    masked = [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows]
    states = [np.array(encode(inputs)[0]) for inputs in masked]
    inputs_of = {"encoder": masked, "cross_kv": [{"encoder_hidden_states": hidden[0]} for hidden in states]}
    left_out: dict[str, str] = {}
    for name, inputs in inputs_of.items():
        bad = [layer for layer in layer_errors(graphs[name], inputs[:PROBED_PASSAGES]) if layer.error > LARGEST_ERROR]
        left_out |= {f"{name}: {layer.name}": str(layer) for layer in bad}
        graphs[name] = nncf.quantize(
            graphs[name],
            nncf.Dataset(inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(names=[layer.name for layer in bad]) if bad else None,
        )
    graphs["decoder_step"] = nncf.compress_weights(graphs["decoder_step"], mode=nncf.CompressWeightsMode.INT8_SYM)
    encode = core.compile_model(graphs["encoder"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    errors = [relative_error(wanted, encode(inputs)[0]) for wanted, inputs in zip(states, masked, strict=True)]
    del encode
    for name, graph in graphs.items():
        ov.save_model(graph, directory / f"{name}.xml", compress_to_fp16=False)
        for file in directory.glob(f"{name}.onnx*"):
            file.unlink()
    return {
        "samples": samples.name,
        "passages": len(rows),
        "hidden_states_error": round(float(np.mean(errors)), 4),
        "left_out": left_out,
    }


def sample_rows(directory: Path, manifest: Manifest, samples: Path) -> list[np.ndarray]:
    """int32[1, tokens] of each passage, tokenized as the reader's prompts.

    Raises:
        ExportError: if the file has no passages, or other fields.
    """
    tokenizer, prompt = Tokenizer.from_file(str(directory / TOKENIZER_FILE)), manifest.prompt
    ends = [manifest.eos_token_id if prompt.end_token_id is None else prompt.end_token_id] if prompt.append_eos else []
    found: list[np.ndarray] = []
    with samples.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            try:
                example = json.loads(line)
                texts = [prompt.text(example["question"], passage.get("title") or "", passage["text"]) for passage in example["ctxs"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ExportError(
                    f"{samples}: wanted a question and ctxs with texts in each line, got {line[:60]!r} ({error!r})"
                ) from error
            for ids in (encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)):
                found.append(np.array([[*ids[: prompt.passage_length - len(ends)], *ends]], np.int32))
            if len(found) >= SAMPLE_PASSAGES:
                break
    if not found:
        raise ExportError(f"{samples}: wanted questions with passages to calibrate on, got none")
    return found[:SAMPLE_PASSAGES]


def layer_errors(model: Any, inputs: Sequence[dict[str, np.ndarray]]) -> list[LayerError]:
    """What int8 does to the output of each matrix multiplication with weights: measured on its own inputs, one layer at a time."""
    ov = _openvino()
    probe = model.clone()
    layers: list[tuple[str, int, np.ndarray]] = []
    places: dict[tuple[str, int], int] = {}  # layers that read the same tensor share an output
    for node, weight in _weighted(probe):
        source = node.input_value(0)
        place = places.setdefault((source.get_node().get_friendly_name(), source.get_index()), len(model.outputs) + len(places))
        if place == len(probe.outputs):
            probe.add_outputs([source])
        layers.append((node.get_friendly_name(), place, weight))
    request = ov.Core().compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    seen: dict[int, list[np.ndarray]] = {place: [] for place in places.values()}
    for each in inputs:
        request.infer(each)
        for place, rows in seen.items():
            read = request.get_output_tensor(place).data
            rows.append(read.reshape(-1, read.shape[-1]).copy())
    found = []
    for name, place, weight in layers:
        x = np.concatenate(seen[place])
        rounded = _rounded(x, np.abs(x).max()) @ _rounded(weight, np.abs(weight).max(axis=0))
        usual = float(np.quantile(np.abs(x), 0.999))
        found.append(LayerError(name, relative_error(x @ weight, rounded), float(np.abs(x).max()) / max(usual, 1e-12)))
    return found


def _weighted(model: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """Each MatMul by a constant, and float32[inputs, outputs] of the constant."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Constant":
            weight = node.input_value(1).get_node().data
            yield node, weight.T if node.get_attributes()["transpose_b"] else weight


def _rounded(array: np.ndarray, largest: Any) -> np.ndarray:
    scale = np.maximum(largest, 1e-12) / INT8_LEVELS
    return (np.round(array / scale) * scale).astype(np.float32)


def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """The norm of the difference over the norm of what was wanted."""
    return float(np.linalg.norm(wanted - got) / max(float(np.linalg.norm(wanted)), 1e-12))


def _openvino() -> Any:
    import openvino

    return openvino


def _nncf() -> Any:
    """NNCF, without the usage statistics that it would send to its makers."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf
