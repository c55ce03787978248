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

from export import command_line
from export.build import (
    build_reader,
    export_graphs,
    random_checkpoint,
    require_reader_name,
)
from export.errors import Interrupted, UsageError, user_errors
from export.tensorrt.detect import default_backend

if TYPE_CHECKING:  # torch and NumPy are imported by the steps that need them, so that --help and an up-to-date `readers` are fast
    from export.checkpoint.files import Checkpoint
    from serving.contract.manifest import Manifest


def _load(arguments: argparse.Namespace) -> Checkpoint:
    from export.checkpoint.files import load_checkpoint

    return load_checkpoint(arguments.checkpoint, **command_line.options(arguments))


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
        arguments.graphs,
        command_line.limits(arguments),
        arguments.precision,
        arguments.timing_cache,
        arguments.jobs,
        command_line.library(arguments),
    )
    parser = argparse.ArgumentParser(prog="--flags", parents=[command_line.checkpoint_options()], add_help=False)
    options = {name: command_line.options(parser.parse_args(shlex.split(flags.get(name, "")))) for name in readers}
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
        graphs=arguments.graphs,
        library=command_line.library(arguments),
    )


def _build(arguments: argparse.Namespace) -> int:
    manifest = build_reader(
        arguments.checkpoint,
        arguments.engines,
        arguments.engine,
        command_line.limits(arguments),
        options=command_line.options(arguments),
        precision=arguments.precision,
        opset=arguments.opset,
        whole_encoder=arguments.whole_encoder,
        graphs=arguments.graphs,
        library=command_line.library(arguments),
        timing_cache=arguments.timing_cache,
        jobs=arguments.jobs,
    )
    _print_engines(arguments.engines, manifest)
    return 0


def _engine(arguments: argparse.Namespace) -> int:
    from export.tensorrt.compiler import build_engines

    manifest = build_engines(arguments.graphs, arguments.engines, command_line.limits(arguments), arguments.timing_cache, arguments.jobs)
    _print_engines(arguments.engines, manifest)
    return 0


def _print_engines(directory: Path, manifest: Manifest) -> None:
    megabytes = sum((directory / file).stat().st_size for file in manifest.files) / 1e6
    what = (
        f"{manifest.reader}, {manifest.engine} {manifest.precision}, {manifest.provenance['parameters']:,} parameters, {megabytes:.1f} MB"
    )
    if manifest.build is not None:
        print(f"{directory}: {what}, TensorRT {manifest.build.version} for {manifest.build.gpu}")
    else:
        print(f"{directory}: {what}, {sum(manifest.provenance['export_s'].values()):.1f} s")


def _detect(arguments: argparse.Namespace) -> int:
    print(default_backend())
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from export.build import convert

    convert(arguments.checkpoint, arguments.output, arguments.period, arguments.num_kv_heads, command_line.options(arguments))
    print(
        f"{arguments.output}: FiDO with period {arguments.period} and {arguments.num_kv_heads} key/value heads.\n"
        "It needs up-training: until it is trained further, it answers much worse than the checkpoint it was converted from.\n"
        "`python -m training uptrain CHECKPOINT DATA --out DIR` converts and trains (docs/training.md)."
    )
    return 0


def _repository(arguments: argparse.Namespace) -> int:
    from export.repository import repository_from_engines

    native = arguments.triton_backend == "tensorrt"
    repository_from_engines(
        arguments.engines, arguments.repository, arguments.reader, command_line.limits(arguments), native_encoder=native
    )
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
    arguments = command_line.parser(__doc__).parse_args(argv)
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
