"""`python -m export`: from a checkpoint to engines and a model repository. See --help of each command.

Parses the command line, calls the step, prints the result. Errors of the user are one line on standard error, with exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from export.build import PRECISIONS, TIMING_CACHE, CheckpointOptions, build_reader, export_graphs, random_checkpoint, require_reader_name
from export.checkpoint.config import FIDO_PERIOD
from export.errors import Interrupted, UsageError, user_errors
from export.library.options import ARCHITECTURES, AUTO, CROSS_KV_PRECISIONS, LIBRARY_PRECISIONS, LibraryOptions
from export.library.options import ENGINES as ENGINES_OF_ENCODER
from export.tensorrt.detect import default_backend
from serving.contract.limits import Limits

if TYPE_CHECKING:  # torch and NumPy are imported by the steps that need them, so that --help and an up-to-date `readers` are fast
    from export.checkpoint.files import Checkpoint
    from serving.contract.manifest import Manifest

ENGINES = ("auto", "tensorrt", "onnxruntime-gpu", "onnxruntime")
TRITON_BACKENDS = ("python", "tensorrt")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("checkpoint", help="directory (ours, Hugging Face T5, facebookresearch/FiD) or hub name")
    checkpoint = [source, _checkpoint_options()]

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

    commands.add_parser("detect", help="print the fastest engine of this machine: tensorrt, onnxruntime-gpu or onnxruntime")

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


def _checkpoint_options() -> argparse.ArgumentParser:
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
    command.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="on a GPU (default: %(default)s)")
    _add_tensorrt(command)
    _add_library(command, AUTO)


def _add_library(command: argparse.ArgumentParser, default: str) -> None:
    choices = (ENGINES_OF_ENCODER, AUTO, *ARCHITECTURES)
    help_ = "on a GPU: the encoder's GEMMs as library kernels for an architecture; none: by engines; auto: where they were measured to be "
    help_ += "faster and can be compiled here (default: %(default)s)"
    command.add_argument("--encoder-kernels", choices=choices, default=default, help=help_)
    help_ = "of library kernels (default: %(default)s)"
    command.add_argument("--encoder-precision", choices=LIBRARY_PRECISIONS, default=LIBRARY_PRECISIONS[0], help=help_)
    help_ = "on a GPU: of cross-attention's keys and values (default: float8 with an encoder in float8 and a key/value head for each head)"
    command.add_argument("--cross-kv-precision", choices=CROSS_KV_PRECISIONS, help=help_)
    command.add_argument("--samples", type=Path, help="questions and passages (JSON lines) that FP8's scales are measured on")


def _library(arguments: argparse.Namespace) -> LibraryOptions:
    return LibraryOptions(arguments.encoder_kernels, arguments.encoder_precision, arguments.samples, arguments.cross_kv_precision)


def _add_tensorrt(command: argparse.ArgumentParser) -> None:
    command.add_argument("--timing-cache", type=Path, default=TIMING_CACHE, help="default: %(default)s")
    command.add_argument("--jobs", type=int, default=1, help="processes that build TensorRT engines (default: %(default)s)")


def _add_whole_encoder(command: argparse.ArgumentParser) -> None:
    help_ = "on a GPU: the encoder as one graph, for Triton's TensorRT backend, instead of its GEMMs"
    command.add_argument("--whole-encoder", action="store_true", help=help_)


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    help_ = "of the encoder (default: %(default)s); tensorrt is in NVIDIA's container only"
    command.add_argument("--triton-backend", choices=TRITON_BACKENDS, default=TRITON_BACKENDS[0], help=help_)


def _add_limits(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Limits):
        command.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="default: %(default)s")


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(**{name: getattr(arguments, name) for name in Limits.names()})


def _options(arguments: argparse.Namespace) -> CheckpointOptions:
    return {
        "tokenizer": arguments.tokenizer,
        "passage_length": arguments.passage_length,
        "append_eos": arguments.append_eos,
        "cross_attention_bias": arguments.cross_attention_bias,
        "prompt_template": arguments.prompt_template,
        "prompt_template_without_title": arguments.prompt_template_without_title,
    }


def _load(arguments: argparse.Namespace) -> Checkpoint:
    from export.checkpoint.files import load_checkpoint

    return load_checkpoint(arguments.checkpoint, **_options(arguments))


def _readers(arguments: argparse.Namespace) -> int:
    from export.readers import Settings, exported_before, update_reader

    readers = _by_name(arguments.readers, "NAME=CHECKPOINT")
    before = {} if readers else exported_before(arguments.engines)
    readers = readers or {name: checkpoint for name, (checkpoint, _) in before.items()} or _by_name(arguments.default, "NAME=CHECKPOINT")
    if not readers:
        raise UsageError("readers: wanted NAME=CHECKPOINT, got none, and none was exported before")
    flags = _by_name(arguments.flags, "NAME=OPTIONS")
    unknown = sorted(set(flags) - set(readers))
    if unknown:
        raise UsageError(f"--flags: wanted the name of a reader ({', '.join(readers)}), got {', '.join(unknown)}")
    native = arguments.triton_backend == "tensorrt"
    settings = Settings(
        arguments.engines,
        arguments.repository,
        arguments.engine,
        native,
        _limits(arguments),
        arguments.precision,
        arguments.timing_cache,
        arguments.jobs,
        _library(arguments),
    )
    parser = argparse.ArgumentParser(prog="--flags", parents=[_checkpoint_options()], add_help=False)
    options = {name: _options(parser.parse_args(shlex.split(flags.get(name, "")))) for name in readers}
    for name, (_, recorded) in before.items():
        if name not in flags:
            options[name] = recorded
    for name, checkpoint in readers.items():
        update_reader(name, checkpoint, settings, options[name])
    return 0


def _by_name(pairs: Sequence[str], form: str) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary; raises UsageError for another form, a name that cannot be served, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not (value or form.endswith("OPTIONS")):
            raise UsageError(f"wanted {form}, got {pair!r}")
        if require_reader_name(name) in found:
            raise UsageError(f"{form}: {name} is given twice")
        found[name] = value
    return found


def _onnx(arguments: argparse.Namespace) -> int:
    _print_engines(arguments.engines, _graphs(_load(arguments), arguments))
    return 0


def _preset(arguments: argparse.Namespace) -> int:
    checkpoint = random_checkpoint(
        arguments.name,
        arguments.tokenizer,
        fido=arguments.fido,
        period=arguments.period,
        num_kv_heads=arguments.num_kv_heads,
        passage_length=arguments.passage_length,
        seed=arguments.seed,
    )
    _print_engines(arguments.engines, _graphs(checkpoint, arguments))
    return 0


def _graphs(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Manifest:
    return export_graphs(
        checkpoint,
        arguments.engines,
        gpu=arguments.gpu,
        precision=arguments.precision,
        opset=arguments.opset,
        whole_encoder=arguments.whole_encoder,
        library=_library(arguments),
    )


def _build(arguments: argparse.Namespace) -> int:
    manifest = build_reader(
        arguments.checkpoint,
        arguments.engines,
        arguments.engine,
        _limits(arguments),
        options=_options(arguments),
        precision=arguments.precision,
        opset=arguments.opset,
        whole_encoder=arguments.whole_encoder,
        library=_library(arguments),
        timing_cache=arguments.timing_cache,
        jobs=arguments.jobs,
    )
    _print_engines(arguments.engines, manifest)
    return 0


def _engine(arguments: argparse.Namespace) -> int:
    from export.tensorrt.compiler import build_engines

    manifest = build_engines(arguments.graphs, arguments.engines, _limits(arguments), arguments.timing_cache, arguments.jobs)
    _print_engines(arguments.engines, manifest)
    return 0


def _print_engines(directory: Path, manifest: Manifest) -> None:
    megabytes = sum((directory / file).stat().st_size for file in manifest.files) / 1e6
    what = f"{manifest.reader}, {manifest.engine}, {manifest.provenance['parameters']:,} parameters, {megabytes:.1f} MB"
    if manifest.build is not None:
        print(f"{directory}: {what}, TensorRT {manifest.build.version} for {manifest.build.gpu}")
    else:
        print(f"{directory}: {what}, {sum(manifest.provenance['export_s'].values()):.1f} s")


def _detect(arguments: argparse.Namespace) -> int:
    print(default_backend())
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from export.build import convert

    convert(arguments.checkpoint, arguments.output, arguments.period, arguments.num_kv_heads, _options(arguments))
    print(
        f"{arguments.output}: FiDO with period {arguments.period} and {arguments.num_kv_heads} key/value heads.\n"
        "It needs up-training: until it is trained further, it answers much worse than the checkpoint it was converted from."
    )
    return 0


def _repository(arguments: argparse.Namespace) -> int:
    from export.repository import repository_from_engines

    native = arguments.triton_backend == "tensorrt"
    repository_from_engines(arguments.engines, arguments.repository, arguments.reader, _limits(arguments), native_encoder=native)
    print(f"{arguments.repository}: {arguments.reader}, {arguments.reader}_encoder, {arguments.reader}_stream")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from export.compare import compare_stages, table

    errors = compare_stages(_load(arguments), arguments.engines)
    print(table(errors))
    ok = all(error.ok for error in errors)
    if arguments.json:
        print(json.dumps({"ok": ok, "errors": [dataclasses.asdict(error) for error in errors]}))
    return 0 if ok else 1


COMMANDS = {
    "readers": _readers,
    "onnx": _onnx,
    "preset": _preset,
    "build": _build,
    "engine": _engine,
    "detect": _detect,
    "convert": _convert,
    "repository": _repository,
    "compare": _compare,
}


def _interrupt(number: int, _: object) -> NoReturn:
    for again in (signal.SIGINT, signal.SIGTERM):  # a second signal must not end the clean-up
        signal.signal(again, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 after an error of the user, 128 + N after signal N.
    """
    arguments = _parser().parse_args(argv)
    progress = logging.getLogger("export")
    if not progress.handlers:  # lines on standard error: some commands print JSON
        progress.addHandler(logging.StreamHandler())
        progress.setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        return COMMANDS[arguments.command](arguments)
    except Interrupted as interrupt:
        print(f"error: {arguments.command}: stopped by {interrupt}; unfinished files were removed", file=sys.stderr)
        return 128 + signal.Signals[str(interrupt)]
    except Exception as error:
        if not isinstance(error, user_errors()):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
