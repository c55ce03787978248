"""A CPU reader's graphs in int8: for OpenVINO calibrated by NNCF on the user's questions and passages, for ONNX Runtime without samples.

Comes in: exported fp32 graphs and, for OpenVINO, a file of questions with passages. Goes out: files a quarter as large. For OpenVINO, in
the encoder and cross_kv weights and activations are int8, with ranges measured on the samples. In decoder_step the weights alone are: a
step reads all of them for a few rows, so that their bytes are its time. Layers whose result int8 would change too much stay as they were,
each with its reason. For ONNX Runtime the encoder's products measure the range of their input when they run, and the step's files alone
are int8.
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
from serving.contract.manifest import TOKENIZER_FILE, EngineError, Manifest, require_bf16

SAMPLE_PASSAGES = 64  # that ranges are measured on
PROBED_PASSAGES = 8  # that the error of each layer is measured on
# A layer stays out if int8 changes its output by more than this share, on the samples. Rounding alone explains 0.01.
LARGEST_ERROR = 0.2
INT8_LEVELS = 127
LARGEST_GROWTH = 1.25  # of the error of the hidden states, by bf16 in what is not int8


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


def require_quantizer() -> None:
    """Raise UsageError before anything is exported, if ONNX Runtime's quantizer lacks the package onnx."""
    if importlib.util.find_spec("onnx") is None:
        raise UsageError(
            "precision int8: wanted the package onnx, which the quantizer needs, found none; `make setup FOR=export` installs it"
        )


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
    errors = {}
    for rest in ("f32", *(["bf16"] if has_bf16() else [])):
        encode = core.compile_model(graphs["encoder"], "CPU", {"INFERENCE_PRECISION_HINT": rest})
        each = [relative_error(wanted, encode(inputs)[0]) for wanted, inputs in zip(states, masked, strict=True)]
        errors[rest] = round(float(np.mean(each)), 4)
        del encode
    for name, graph in graphs.items():
        ov.save_model(graph, directory / f"{name}.xml", compress_to_fp16=False)
        for file in directory.glob(f"{name}.onnx*"):
            file.unlink()
    return {
        "samples": samples.name,
        "passages": len(rows),
        "hidden_states_error": errors["f32"],
        "hidden_states_error_in_bf16": errors.get("bf16"),
        "left_out": left_out,
    }


def has_bf16() -> bool:
    """Whether this CPU computes in bf16."""
    try:
        require_bf16("int8")
    except EngineError:
        return False
    return True


def rest_is_bf16(done: dict[str, Any]) -> bool:
    """Whether what is not int8 shall be bf16: where that hardly adds to the error of int8. With AMX it doubles the error and saves nothing.

    Args:
        done: what `to_int8` returned.
    """
    in_bf16 = done["hidden_states_error_in_bf16"]
    return in_bf16 is not None and in_bf16 <= LARGEST_GROWTH * done["hidden_states_error"]


def to_onnxruntime_int8(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Replace the graphs in a directory by their int8 form for ONNX Runtime.

    A product of the encoder or of cross_kv measures the range of its input in every call, which is one question's. A call of decoder_step
    has rows of several questions, and none may depend on the others: there int8 is in the file alone, and weights are fp32 once loaded.

    Args:
        directory: holds fp32 graphs.
        manifest: of these graphs.

    Returns:
        What was done, for the manifest's provenance.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    settings = {"MatMulConstBOnly": True}  # the products within attention stay in fp32
    for name in ("encoder", "cross_kv"):
        path, made = directory / manifest.engine_file(name), directory / f"{name}.int8"
        kinds = ["MatMul", "Gather"]
        quantize_dynamic(path, made, kinds, per_channel=True, weight_type=QuantType.QInt8, extra_options=settings)
        _replace(path, made)
    path, made = directory / manifest.engine_file("decoder_step"), directory / "decoder_step.int8"
    model = onnx.load(path)
    _store_weights_in_int8(model.graph)
    onnx.save(model, made)
    _replace(path, made)
    return {"ranges": "of the inputs of encoder and cross_kv: measured in every call", "decoder_step": "weights alone, fp32 in memory"}


def _replace(path: Path, made: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    made.rename(path)


def _store_weights_in_int8(graph: Any) -> None:
    """Weights and embeddings of an ONNX graph in int8, a scale a column of a weight and a row of an embedding, and what makes them fp32."""
    from onnx import helper, numpy_helper

    weights, nodes, made = {tensor.name: tensor for tensor in graph.initializer}, list(graph.node), []
    for node in nodes:
        place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        tensor = None if place is None else weights.pop(node.input[place], None)
        value = None if tensor is None else numpy_helper.to_array(tensor)
        if tensor is None or value is None or value.ndim != 2 or value.dtype != np.float32:
            continue
        axis = 1 if node.op_type == "MatMul" else 0
        scale = np.maximum(np.abs(value).max(axis=1 - axis, keepdims=True), np.finfo(np.float32).tiny) / INT8_LEVELS
        stored = np.rint(value / scale).astype(np.int8)
        graph.initializer.remove(tensor)
        names = [f"{tensor.name}.int8", f"{tensor.name}.scale"]
        parts = (stored, scale.reshape(-1).astype(np.float32))
        graph.initializer.extend(numpy_helper.from_array(part, name) for part, name in zip(parts, names, strict=True))
        made.append(helper.make_node("DequantizeLinear", names, [tensor.name], axis=axis))
    del graph.node[:]
    graph.node.extend([*made, *nodes])


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
