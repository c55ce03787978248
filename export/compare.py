"""Compares each stage with the one before it: transformers' from_pretrained -> our module -> graph in torch -> graph in its CPU engine.

Comes in: a checkpoint and the CPU engines exported from it. Goes out: the worst absolute error of every output of every stage. Does not
compare served answers; `make evaluate` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.checkpoint.files import Checkpoint
from export.checkpoint.source_files import one_line
from export.errors import ExportError
from export.graphs.onnx_export import GRAPHS, sample_inputs
from export.graphs.openvino import RUNS, Run
from export.manifest_writer import engine_sizes, sha256_of_weights
from export.model.reader import Reader
from serving.contract.manifest import Manifest, ManifestError
from serving.contract.tensors import GraphTensors

# Precision of the engines -> the largest difference that rounding explains. T5's logits are in the tens.
TOLERANCE = {"float32": 1e-3}
SHAPES = (
    {"passages": 1, "passage_length": 16, "batch": 1, "past_length": 16, "encoder_sequence_length": 64, "questions": 1, "beams": 1},
    {"passages": 5, "passage_length": 33, "batch": 4, "past_length": 17, "encoder_sequence_length": 150, "questions": 2, "beams": 3},
    {"passages": 12, "passage_length": 96, "batch": 3, "past_length": 32, "encoder_sequence_length": 700, "questions": 3, "beams": 1},
)


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Worst error of one output of one stage against the stage before it.

    Attributes:
        worst: largest absolute difference; for tokens, the number that differ.
        allowed: the largest `worst` that passes.
    """

    stage: str
    output: str
    worst: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error passes; NaN does not."""
        return self.worst <= self.allowed


def compare_stages(checkpoint: Checkpoint, engines: Path) -> list[OutputError]:
    """Compare all stages of this checkpoint.

    Raises:
        ManifestError: if the engines are damaged or were exported from other weights.
        ExportError: if the engines are not for the CPU.
    """
    manifest = Manifest.load(engines)
    manifest.verify(engines, tuple(manifest.files))
    if manifest.precision not in TOLERANCE or manifest.engine not in RUNS:
        raise ExportError(f"{engines}: wanted float32 engines for the CPU, got {manifest.precision} for {manifest.engine}")
    weights = sha256_of_weights(checkpoint.reader)
    if manifest.weights_sha256 != weights:
        raise ManifestError(
            f"{engines}: made of weights {manifest.weights_sha256[:16]}, but {checkpoint.source} has {weights[:16]}; export it again"
        )
    allowed = TOLERANCE[manifest.precision]
    found: list[OutputError] = []
    if checkpoint.layout == "hugging-face":
        found += module_against_transformers(checkpoint, allowed)
    found += graphs_against_module(checkpoint.reader, allowed)
    for name, (_, tensors_of) in GRAPHS.items():
        (run,) = RUNS[manifest.engine](engines / manifest.engine_file(name))
        tensors = tensors_of(engine_sizes(checkpoint.reader.config))
        found += engine_against_graph(
            checkpoint.reader, name, tensors, run, "onnx" if manifest.engine == "onnxruntime" else "openvino", allowed
        )
    return found


def random_question(reader: Reader, rng: np.random.Generator, n_passages: int, passage_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[1, n_passages, passage_length] ids and mask with passages of random lengths."""
    ids = torch.from_numpy(rng.integers(2, reader.config.vocab_size, (1, n_passages, passage_length)))
    lengths = rng.integers(1, passage_length + 1, (1, n_passages, 1))
    mask = torch.from_numpy((np.arange(passage_length) < lengths).astype(np.int64))
    return ids * mask, mask


@torch.no_grad()
def module_against_transformers(checkpoint: Checkpoint, allowed: float) -> Iterator[OutputError]:
    """Logits of one passage and a greedy answer against transformers' from_pretrained of the same files.

    Where transformers finds none or not all of the weights, which it would fill with random ones, it gets ours instead; the stage's name
    says so. The relative bias in cross-attention is unknown to it: a reader that applies it is not compared.

    Raises:
        ExportError: if transformers cannot read the checkpoint.
    """
    reader, config = checkpoint.reader, checkpoint.reader.config
    if config.cross_attention_relative_bias:
        return
    model, stage = transformers_model(checkpoint)
    ids, mask = random_question(reader, np.random.default_rng(0), 1, 40)
    targets = torch.randint(2, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids[0], attention_mask=mask[0], decoder_input_ids=targets).logits
    yield OutputError(stage, "logits", _worst(logits.numpy(), reader(ids, mask, targets).numpy()), allowed)
    answer = model.generate(input_ids=ids[0], attention_mask=mask[0], max_new_tokens=8, do_sample=False, num_beams=1, use_cache=False)[
        0
    ].tolist()
    ours = [config.decoder_start_token_id, *reader.generate(ids, mask, 8).tokens[0]]
    differing = sum(a != b for a, b in zip(answer, ours, strict=False)) + abs(len(answer) - len(ours))
    yield OutputError(stage, "greedy answer", differing, 0)


def transformers_model(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The checkpoint's files as transformers reads them, in float32, and the name of the stage."""
    import transformers  # takes seconds to import

    from export.checkpoint.hugging_face import t5_from_reader

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.T5ForConditionalGeneration.from_pretrained(
            checkpoint.directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of transformers, safetensors, the hub's client
        raise ExportError(f"{checkpoint.directory}: transformers {transformers.__version__} cannot read it: {one_line(error)}") from error
    if report["missing_keys"]:
        return t5_from_reader(checkpoint.reader), "module vs our weights"
    return model.eval(), "module vs from_pretrained"


@torch.no_grad()
def graphs_against_module(reader: Reader, allowed: float) -> Iterator[OutputError]:
    """The graphs in torch against the full pass: hidden states, then a greedy answer through cross_kv and decoder_step."""
    encoder, cross_kv, step = (module_of(reader).eval() for module_of, _ in GRAPHS.values())
    stack, steps = reader.config.decoder, 12
    worst_states = worst_log_prob = differing = 0.0
    for seed, (n_passages, passage_length) in enumerate(((1, 20), (3, 33), (8, 64))):
        ids, mask = random_question(reader, np.random.default_rng(seed), n_passages, passage_length)
        states = encoder(ids[0].int(), mask[0].int())
        hidden, _ = reader.encode(ids, mask)
        valid = mask.reshape(-1).bool()
        packed = states.reshape(-1, states.shape[-1])[valid]
        worst_states = max(worst_states, _worst(hidden[0][valid].numpy(), packed.numpy()))
        extra = (torch.nonzero(valid).t().int(),) if reader.config.cross_attention_relative_bias else ()
        cross = [kv[None] for kv in cross_kv(packed)]
        past = [torch.zeros(1, stack.num_kv_heads, steps, stack.d_kv) for _ in range(2 * stack.num_layers)]
        wanted = reader.generate(ids, mask, steps, min_new_tokens=steps)
        token = torch.tensor([reader.config.decoder_start_token_id], dtype=torch.int32)
        for position, (wanted_token, wanted_log_prob) in enumerate(zip(wanted.tokens[0], wanted.log_probs[0], strict=True)):
            penalty = torch.tensor([-1e9 if position < steps - 1 else 0.0])
            lengths = torch.tensor([len(packed)], dtype=torch.int32)
            places = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            positions = torch.tensor([position], dtype=torch.int32)
            token, log_prob, _, *present, _ = step(token, positions, lengths, penalty, *places, *extra, *past, *cross)
            for cache, new in zip(past, present, strict=True):
                cache[:, :, position] = new
            differing += int(token.item() != wanted_token)
            worst_log_prob = max(worst_log_prob, abs(log_prob.item() - wanted_log_prob))
            token = torch.tensor([wanted_token], dtype=torch.int32)
    yield OutputError("graph vs module", "encoder.encoder_hidden_states", worst_states, allowed)
    yield OutputError("graph vs module", "decoder_step.next_token", differing, 0)
    yield OutputError("graph vs module", "decoder_step.log_prob", worst_log_prob, allowed)


@torch.no_grad()
def engine_against_graph(reader: Reader, name: str, tensors: GraphTensors, run: Run, engine: str, allowed: float) -> Iterator[OutputError]:
    """One graph in its engine against the same graph in torch, on random inputs of several shapes."""
    module = GRAPHS[name][0](reader).eval()
    worst = {spec.name: 0.0 for spec in tensors.outputs}
    for seed, lengths in enumerate(SHAPES):
        inputs = _plausible(sample_inputs(tensors, lengths, seed), reader.config.vocab_size, seed)
        found = module(*(torch.from_numpy(array) for array in inputs.values()))
        wanted = [found] if isinstance(found, torch.Tensor) else found
        for spec, reference, candidate in zip(tensors.outputs, wanted, run(inputs), strict=True):
            spec.check(candidate)
            error = float((reference.numpy() != candidate).sum()) if spec.dtype == "int32" else _worst(reference.numpy(), candidate)
            worst[spec.name] = max(worst[spec.name], error)
    for spec in tensors.outputs:
        yield OutputError(f"{engine} vs graph", f"{name}.{spec.name}", worst[spec.name], 0 if spec.dtype == "int32" else allowed)


def _plausible(inputs: dict[str, np.ndarray], vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Replace the ones of `sample_inputs` by random tokens, positions and lengths within their bounds."""
    rng = np.random.default_rng(seed)
    for name, array in inputs.items():
        if name in ("input_ids", "decoder_input_ids"):
            array[...] = rng.integers(0, vocab_size, array.shape)
        elif name == "positions":
            array[...] = rng.integers(0, inputs["past_key_values.0.decoder.key"].shape[2], array.shape)
        elif name == "encoder_lengths":
            longest = next(a.shape[2] for n, a in inputs.items() if n.endswith("encoder.key"))
            array[...] = rng.integers(1, longest + 1, array.shape)
        elif name == "question_rows":
            array[...] = rng.integers(0, len(inputs["decoder_input_ids"]), array.shape)
        elif name == "row_places":
            array[...] = rng.integers(0, inputs["question_rows"].size, array.shape)
        elif name == "encoder_positions":
            array[...] = np.arange(array.shape[1])
        elif name == "eos_penalty":
            array[...] = 0.0
        elif name == "attention_mask":
            array[...] = np.arange(array.shape[1]) < rng.integers(1, array.shape[1] + 1, (len(array), 1))
        elif name == "encoder_hidden_states":
            array *= 0.1  # about the size that the encoder's final norm leaves
    return inputs


def _worst(wanted: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(wanted.astype(np.float64) - got.astype(np.float64)).max())


def table(errors: Iterable[OutputError]) -> str:
    """The errors as text, with the caches of all layers merged into one line."""
    merged: dict[tuple[str, str], OutputError] = {}
    for error in errors:
        name = error.output
        if ".present." in name:
            graph, _, rest = name.partition(".present.")
            name = f"{graph}.present.*.{rest.split('.', 1)[1]}"
        key = (error.stage, name)
        if key not in merged or not error.worst <= merged[key].worst:
            merged[key] = dataclasses.replace(error, output=name)
    lines = [f"{'stage':24} {'output':36} {'worst':>10} {'allowed':>9}"]
    lines += [f"{e.stage:24} {e.output:36} {e.worst:10.2e} {e.allowed:9.0e}{'' if e.ok else '  FAILED'}" for e in merged.values()]
    return "\n".join(lines)
