"""`python -m export`: from a checkpoint to engines and a model repository. See --help of each command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint.config import FIDO_PERIOD, reader_preset
from serving.contract.limits import Limits
from serving.contract.manifest import SUFFIXES

if TYPE_CHECKING:  # torch is imported only by the command that needs it, so that --help is quick
    from export.checkpoint.files import Checkpoint
    from export.library.encoder import LibraryOptions
    from serving.contract.manifest import Manifest


USER_ERRORS = ("CheckpointError", "CompileError", "ConfigError", "EngineError", "ExportError", "LimitsError", "ManifestError", "PassError")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    checkpoint = argparse.ArgumentParser(add_help=False)
    checkpoint.add_argument("checkpoint", help="directory (ours, Hugging Face T5, facebookresearch/FiD) or hub name")
    checkpoint.add_argument("--tokenizer", help="directory or file of the tokenizer, where the checkpoint has none")
    checkpoint.add_argument("--passage-length", type=int, help="tokens kept of each prompt (FiD: 200, its large readers 250; T5: 256)")
    flag = argparse.BooleanOptionalAction
    checkpoint.add_argument("--append-eos", action=flag, help="end encoder inputs with </s> (default: no for FiD's own checkpoints)")
    checkpoint.add_argument("--cross-attention-bias", action=flag, help="apply the relative bias in cross-attention (default: FiD's own)")

    onnx = commands.add_parser("onnx", parents=[checkpoint], help="checkpoint -> ONNX engines and manifest")
    onnx.add_argument("engines", type=Path, help="directory to write")

    preset = commands.add_parser("preset", help="a reader of published size with random weights, for benchmarks -> ONNX engines")
    preset.add_argument("name", help="base, large, ... or base-xl, large-xxl (encoder-decoder)")
    preset.add_argument("engines", type=Path)
    preset.add_argument("--fido", action="store_true", help=f"cross-attention every {FIDO_PERIOD} layers, one key/value head")
    preset.add_argument("--period", type=int)
    preset.add_argument("--num-kv-heads", type=int)
    preset.add_argument("--passage-length", type=int, default=256)
    preset.add_argument("--tokenizer", required=True, help="tokenizer.json or a directory with one")
    preset.add_argument("--seed", type=int, default=0)

    build = commands.add_parser("build", parents=[checkpoint], help="checkpoint -> engines of one kind, by the steps above and below")
    for command in (onnx, preset, build):
        whole = "encoder as one graph, for Triton's TensorRT backend, in place of its products"
        command.add_argument("--whole-encoder", action="store_true", help=f"on a GPU: the {whole}")
    for command in (onnx, preset):
        command.add_argument("--opset", type=int, help="of the graphs (default: 18; with --gpu 17, the newest that TensorRT 8.6 reads)")
        command.add_argument("--gpu", action="store_true", help="graphs for the GPU: half precision, encoder and decoder step in products")
        command.add_argument("--precision", choices=("float16", "bfloat16"), default="float16", help="of --gpu (default: %(default)s)")

    for command in (onnx, preset, build):
        usual = "auto" if command is build else "none"
        kernels = "on a GPU: the encoder's GEMMs as library kernels for this architecture (sm_90a, sm_100a, sm_120a), or none: engines; "
        kernels += f"auto: for this machine's GPU where they were measured to be faster and can be compiled (default: {usual})"
        command.add_argument("--encoder-kernels", default=usual, metavar="ARCHITECTURE", help=kernels)
        command.add_argument("--encoder-precision", choices=("float16", "float8"), default="float16", help="of library kernels")
        command.add_argument("--samples", type=Path, help="questions and passages (JSON lines) that FP8's scales are measured on")

    build.add_argument("engines", type=Path, help="directory to write; graphs for a GPU are kept beside it, as NAME.graphs")
    build.add_argument("--engine", choices=("auto", *SUFFIXES), default="auto", help="default: the fastest that this machine has")
    build.add_argument("--precision", choices=("float16", "bfloat16"), default="float16", help="on a GPU (default: %(default)s)")
    build.add_argument("--opset", type=int)
    build.add_argument("--timing-cache", type=Path, default=Path("build/tensorrt-timing.cache"))
    build.add_argument("--jobs", type=int, default=1, help="processes that build TensorRT engines (default: %(default)s)")
    _add_limits(build)

    engine = commands.add_parser("engine", help="graphs made with --gpu -> TensorRT engines for this machine's GPU")
    engine.add_argument("graphs", type=Path)
    engine.add_argument("engines", type=Path, help="directory to write")
    engine.add_argument("--timing-cache", type=Path, default=Path("build/tensorrt-timing.cache"))
    engine.add_argument("--jobs", type=int, default=1, help="processes that build (default: %(default)s)")
    _add_limits(engine)

    commands.add_parser("detect", help="print the engine that fits this machine: tensorrt, onnxruntime-gpu or onnxruntime")

    convert = commands.add_parser("convert", parents=[checkpoint], help="FiD -> FiDO, a start for up-training")
    convert.add_argument("output", type=Path, help="directory to write, in our own layout")
    convert.add_argument("--period", type=int, default=FIDO_PERIOD)
    convert.add_argument("--num-kv-heads", type=int, default=1)

    repository = commands.add_parser("repository", help="engines -> Triton model repository")
    repository.add_argument("engines", type=Path)
    repository.add_argument("--reader", choices=("fid", "fido"), required=True, help="name to serve under")
    repository.add_argument("--repository", type=Path, default=Path("model_repository"))
    backends = ("python", "tensorrt")
    repository.add_argument("--triton-backend", choices=backends, default="python", help="of the encoder: tensorrt in NVIDIA's container")
    _add_limits(repository)

    compare = commands.add_parser("compare", parents=[checkpoint], help="each stage against the one before it")
    compare.add_argument("engines", type=Path)
    compare.add_argument("--json", action="store_true", help="a last line of JSON")
    return parser


def _add_limits(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Limits):
        command.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help="default: %(default)s")


def _limits(arguments: argparse.Namespace) -> Limits:
    return Limits(**{name: getattr(arguments, name) for name in Limits.names()})


def main() -> int:
    """Run one command; faults of the input are told in a line each, not by a traceback."""
    arguments = _parser().parse_args()
    command = globals()[f"_{arguments.command}"]
    try:
        return int(command(arguments))
    except (ValueError, RuntimeError) as error:
        # by name, since some of their modules import torch, which not every command needs
        if type(error).__name__ not in USER_ERRORS:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _load(arguments: argparse.Namespace) -> Checkpoint:
    from export.checkpoint.files import load_checkpoint

    return load_checkpoint(
        arguments.checkpoint,
        tokenizer=arguments.tokenizer,
        passage_length=arguments.passage_length,
        append_eos=arguments.append_eos,
        cross_attention_bias=arguments.cross_attention_bias,
    )


def _export(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Manifest:
    opset = {} if arguments.opset is None else {"opset": arguments.opset}
    if arguments.gpu:
        from export.graphs.gpu import export_gpu_reader

        library = _library_options(arguments)
        whole = arguments.whole_encoder
        return export_gpu_reader(checkpoint, arguments.engines, arguments.precision, whole_encoder=whole, library=library, **opset)
    from export.graphs.onnx_export import export_reader

    return export_reader(checkpoint, arguments.engines, **opset)


def _library_options(arguments: argparse.Namespace) -> LibraryOptions | None:
    from export.library.encoder import LibraryOptions, fitting_architecture

    if arguments.encoder_kernels == "auto":
        arguments.encoder_kernels = fitting_architecture()
    if arguments.encoder_kernels == "none" or arguments.whole_encoder:
        return None
    return LibraryOptions(arguments.encoder_kernels, arguments.encoder_precision, arguments.samples)


def _engine(arguments: argparse.Namespace) -> int:
    from export.tensorrt.compiler import build_engines

    manifest = build_engines(arguments.graphs, arguments.engines, _limits(arguments), arguments.timing_cache, arguments.jobs)
    assert manifest.build is not None
    print(f"{arguments.engines}: {manifest.reader}, TensorRT {manifest.build.version} for {manifest.build.gpu}")
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from export.tensorrt.compiler import default_backend

    engine = default_backend() if arguments.engine == "auto" else arguments.engine
    arguments.gpu = engine != "onnxruntime"
    arguments.whole_encoder &= arguments.gpu
    if engine != "tensorrt":
        return _onnx(arguments)
    engines = arguments.engines
    arguments.engines = arguments.graphs = engines.with_name(f"{engines.name}.graphs")
    _onnx(arguments)
    arguments.engines = engines
    return _engine(arguments)


def _detect(arguments: argparse.Namespace) -> int:
    from export.tensorrt.compiler import default_backend

    print(default_backend())
    return 0


def _onnx(arguments: argparse.Namespace) -> int:
    manifest = _export(_load(arguments), arguments)
    megabytes = sum((arguments.engines / file).stat().st_size for file in manifest.files) / 1e6
    seconds = sum(manifest.provenance["export_s"].values())
    print(f"{arguments.engines}: {manifest.reader}, {manifest.provenance['parameters']:,} parameters, {megabytes:.1f} MB, {seconds:.1f} s")
    return 0


def _preset(arguments: argparse.Namespace) -> int:
    from export.checkpoint.files import Checkpoint, read_tokenizer
    from export.model.reader import Reader

    config = reader_preset(arguments.name, fido=arguments.fido, period=arguments.period, num_kv_heads=arguments.num_kv_heads)
    reader = Reader(dataclasses.replace(config, passage_length=arguments.passage_length))
    reader.reset_parameters(arguments.seed)
    checkpoint = Checkpoint(reader.eval(), read_tokenizer(Path(arguments.tokenizer)), f"random-{arguments.name}", "random weights")
    manifest = _export(checkpoint, arguments)
    print(f"{arguments.engines}: {manifest.reader} {arguments.name}, {manifest.provenance['parameters']:,} random parameters")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from export.checkpoint.convert import fido_from_fid
    from export.checkpoint.files import save_reader

    checkpoint = _load(arguments)
    converted = fido_from_fid(checkpoint.reader, arguments.period, arguments.num_kv_heads)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch, "tokenizer.json")
        tokenizer.write_text(checkpoint.tokenizer_json, encoding="utf-8")
        notes = {"converted_from": Path(checkpoint.source).name, "needs": "up-training"}
        save_reader(arguments.output, converted, tokenizer, torch.float32, notes)
    print(
        f"{arguments.output}: FiDO with period {arguments.period} and {arguments.num_kv_heads} key/value heads.\n"
        "It needs up-training: until it is trained further, it answers much worse than the checkpoint it came from."
    )
    return 0


def _repository(arguments: argparse.Namespace) -> int:
    from .repository import repository_from_engines

    native = arguments.triton_backend == "tensorrt"
    repository_from_engines(arguments.engines, arguments.repository, arguments.reader, _limits(arguments), native_encoder=native)
    print(f"{arguments.repository}: {arguments.reader}, {arguments.reader}_encoder, {arguments.reader}_stream")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import compare_stages, table

    errors = compare_stages(_load(arguments), arguments.engines)
    print(table(errors))
    ok = all(error.ok for error in errors)
    if arguments.json:
        print(json.dumps({"ok": ok, "errors": [dataclasses.asdict(error) for error in errors]}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
