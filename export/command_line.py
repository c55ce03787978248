"""The command line of `python -m export`: its options, and what they make.

In: arguments. Out: a parser, and the options of each step as the steps take them. It runs no step and imports neither torch nor NumPy.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from export.build import GRAPHS, PRECISION_NAMES, PRECISIONS, TIMING_CACHE, CheckpointOptions
from export.checkpoint.config import FIDO_PERIOD
from export.library.options import ARCHITECTURES, AUTO, CROSS_KV_PRECISIONS, LIBRARY_PRECISIONS, LibraryOptions
from export.library.options import ENGINES as ENGINES_OF_ENCODER
from export.tensorrt.detect import GPU_LIMITS, gpu_limits
from serving.contract.limits import Limits

ENGINES = ("auto", "tensorrt", "onnxruntime-gpu", "openvino", "onnxruntime")
GPU_ENGINES = ("tensorrt", "onnxruntime-gpu")
TRITON_BACKENDS = ("python", "tensorrt")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m export`, with a command a step."""
    parser = argparse.ArgumentParser(prog="python -m export", description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("checkpoint", help="directory (ours, Hugging Face T5, facebookresearch/FiD) or hub name")
    checkpoint = [source, checkpoint_options()]

    readers = commands.add_parser("readers", help="named checkpoints -> engines and model repository, where anything has changed")
    readers.add_argument(
        "readers",
        nargs="*",
        metavar="NAME=CHECKPOINT",
        help="name to serve under, and a checkpoint or hub name (default: the readers that were exported before)",
    )
    readers.add_argument("--default", nargs="+", default=[], metavar="NAME=CHECKPOINT", help="if no reader was named or exported before")
    flags = "options of one reader's checkpoint, as `onnx --help` lists them, in one quoted string"
    readers.add_argument("--flags", action="append", default=[], metavar="NAME=OPTIONS", help=flags)
    readers.add_argument("--engines", type=Path, default=Path("build/engines"), help="default: %(default)s")
    _add_build(readers)
    _add_repository(readers)
    _add_limits(readers)

    onnx = commands.add_parser("onnx", parents=checkpoint, help="checkpoint -> ONNX engines and manifest")
    onnx.add_argument("engines", type=Path, help="directory to write")

    preset = commands.add_parser("preset", help="a reader of published size with random weights, for benchmarks -> ONNX engines")
    preset.add_argument("name", help="base, large, ... or base-xl, large-xxl (encoder-decoder)")
    preset.add_argument("engines", type=Path, help="directory to write")
    preset.add_argument("--fido", action="store_true", help=f"cross-attention every {FIDO_PERIOD} layers, one key/value head")
    preset.add_argument("--period", type=int, help="cross-attention every so many layers")
    preset.add_argument("--num-kv-heads", type=int, help="key/value heads of the decoder")
    preset.add_argument("--passage-length", type=int, default=256, help="tokens kept of each prompt (default: %(default)s)")
    preset.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json or a directory with one")
    preset.add_argument("--seed", type=int, default=0)
    for command in (onnx, preset):
        command.add_argument("--opset", type=int, help="of the graphs (default: 18; with --gpu 17, the newest that TensorRT 8.6 reads)")
        command.add_argument("--gpu", action="store_true", help="graphs for the GPU: half precision, encoder and decoder step as GEMMs")
        command.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of --gpu (default: %(default)s)")
        _add_whole_encoder(command)
        _add_graphs(command)
        _add_library(command, ENGINES_OF_ENCODER)

    build = commands.add_parser("build", parents=checkpoint, help="checkpoint -> engines of one kind, by the steps onnx and engine")
    build.add_argument("engines", type=Path, help="directory to write; graphs for TensorRT are kept next to it, as NAME.graphs")
    build.add_argument("--opset", type=int, help="of the graphs")
    _add_build(build)
    _add_whole_encoder(build)
    _add_limits(build)

    engine = commands.add_parser("engine", help="graphs exported with --gpu -> TensorRT engines for this machine's GPU")
    engine.add_argument("graphs", type=Path)
    engine.add_argument("engines", type=Path, help="directory to write")
    _add_tensorrt(engine)
    _add_limits(engine)

    commands.add_parser("detect", help="print the fastest kind of engine of this machine: tensorrt, onnxruntime-gpu or onnxruntime")

    convert = commands.add_parser("convert", parents=checkpoint, help="FiD -> FiDO, a start for up-training")
    convert.add_argument("output", type=Path, help="directory to write, in our own layout")
    convert.add_argument("--period", type=int, default=FIDO_PERIOD, help="cross-attention every so many layers (default: %(default)s)")
    convert.add_argument("--num-kv-heads", type=int, default=1, help="key/value heads of the decoder (default: %(default)s)")

    repository = commands.add_parser("repository", help="engines -> Triton model repository")
    repository.add_argument("engines", type=Path)
    repository.add_argument("--reader", required=True, metavar="NAME", help="name to serve under")
    _add_repository(repository)
    _add_limits(repository)

    compare = commands.add_parser("compare", parents=checkpoint, help="each stage against the one before it")
    compare.add_argument("engines", type=Path)
    compare.add_argument("--json", action="store_true", help="print JSON as the last line")
    return parser


def checkpoint_options() -> argparse.ArgumentParser:
    """The options of a checkpoint: a parser to be the parent of others."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--tokenizer", help="directory or file of the tokenizer, where the checkpoint has none")
    options.add_argument("--passage-length", type=int, help="tokens kept of each prompt (FiD: 200, its large readers 250; T5: 256)")
    flag = argparse.BooleanOptionalAction
    options.add_argument("--append-eos", action=flag, help="end encoder inputs with </s> (default: no for FiD's own checkpoints)")
    template = "text of an encoder input, with {question}, {title} and {context} (default: facebookresearch/FiD's)"
    options.add_argument("--prompt-template", metavar="TEXT", help=template)
    template = "text where a passage has no title (default: --prompt-template with an empty title)"
    options.add_argument("--prompt-template-without-title", metavar="TEXT", help=template)
    options.add_argument("--cross-attention-bias", action=flag, help="apply the relative bias in cross-attention (default: FiD's own)")
    return options


def _add_build(command: argparse.ArgumentParser) -> None:
    command.add_argument("--engine", choices=ENGINES, default="auto", help="default: the fastest that this machine has")
    help_ = f"{', '.join(PRECISION_NAMES)}, of those that the engine has (default: fp16 on a GPU, fp32 on a CPU)"
    command.add_argument("--precision", type=_precision, metavar="PRECISION", help=help_)
    _add_graphs(command)
    _add_tensorrt(command)
    _add_library(command, AUTO)


def _precision(text: str) -> str:
    """A precision as a manifest names it; both names are accepted."""
    name = PRECISION_NAMES.get(text, text)
    if name not in PRECISION_NAMES.values():
        raise argparse.ArgumentTypeError(f"wanted one of {', '.join(PRECISION_NAMES)}, got {text!r}")
    return name


def _add_library(command: argparse.ArgumentParser, default: str) -> None:
    choices = (ENGINES_OF_ENCODER, AUTO, *ARCHITECTURES)
    help_ = "on a GPU: the encoder's GEMMs as library kernels for an architecture; none: by engines; auto: where they were measured to be "
    help_ += "faster and can be compiled here (default: %(default)s)"
    command.add_argument("--encoder-kernels", choices=choices, default=default, help=help_)
    help_ = "of library kernels (default: %(default)s)"
    command.add_argument("--encoder-precision", choices=LIBRARY_PRECISIONS, default=LIBRARY_PRECISIONS[0], help=help_)
    help_ = "on a GPU: of cross-attention's keys and values (default: float8 with an encoder in float8 and a key/value head for each head)"
    command.add_argument("--cross-kv-precision", choices=CROSS_KV_PRECISIONS, help=help_)
    command.add_argument("--samples", type=Path, help="questions and passages (JSON lines) that int8 and FP8 are calibrated on")


def library(arguments: argparse.Namespace) -> LibraryOptions:
    """How the encoder's and the decoder's library kernels are to be made."""
    return LibraryOptions(arguments.encoder_kernels, arguments.encoder_precision, arguments.samples, arguments.cross_kv_precision)


def _add_tensorrt(command: argparse.ArgumentParser) -> None:
    command.add_argument("--timing-cache", type=Path, default=TIMING_CACHE, help="default: %(default)s")
    command.add_argument("--jobs", type=int, default=1, help="processes that build TensorRT engines (default: %(default)s)")


def _add_whole_encoder(command: argparse.ArgumentParser) -> None:
    help_ = "on a GPU: the encoder as one graph, for Triton's TensorRT backend, instead of its GEMMs"
    command.add_argument("--whole-encoder", action="store_true", help=help_)


def _add_graphs(command: argparse.ArgumentParser) -> None:
    help_ = "on a GPU: GEMMs with our kernels between them, or encoder, cross_kv and decoder_step as one engine each, for any card and any "
    command.add_argument("--graphs", choices=GRAPHS, default=GRAPHS[0], help=help_ + "TensorRT (default: %(default)s)")


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    help_ = "of the encoder (default: %(default)s); tensorrt is in NVIDIA's container only"
    command.add_argument("--triton-backend", choices=TRITON_BACKENDS, default=TRITON_BACKENDS[0], help=help_)


def _add_limits(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Limits):
        on_gpu = f", on a GPU by its cores and its memory: {GPU_LIMITS[field.name]}" if field.name in GPU_LIMITS else ""
        command.add_argument(f"--{field.name.replace('_', '-')}", type=int, help=f"default: {field.default}{on_gpu}")


def limits(arguments: argparse.Namespace) -> Limits:
    """The limits of a reader, as the command line gives them; where it builds a reader for a GPU, the rest are this machine's."""
    given = {name: value for name in Limits.names() if (value := getattr(arguments, name)) is not None}
    builds = getattr(arguments, "engine", None) in ("auto", *GPU_ENGINES)
    return Limits(**({name: value for name, value in gpu_limits(given.get("reader_instances")).items() if builds} | given))


def options(arguments: argparse.Namespace) -> CheckpointOptions:
    """What `load_checkpoint` takes besides the checkpoint's name."""
    return {
        "tokenizer": arguments.tokenizer,
        "passage_length": arguments.passage_length,
        "append_eos": arguments.append_eos,
        "cross_attention_bias": arguments.cross_attention_bias,
        "prompt_template": arguments.prompt_template,
        "prompt_template_without_title": arguments.prompt_template_without_title,
    }
