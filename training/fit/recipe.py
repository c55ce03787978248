"""The complete training on one machine: FiD and FiDO in parallel, then the conversion, then all evaluations.

Out, under ``--out``: ``fid/``, ``fido/``, ``fido_converted/`` (checkpoints, logs, state) and ``results/``
(output and predictions of each evaluation). After an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

from export.checkpoint.config import ReaderConfig, StackConfig
from training.corpus.tokenizer import VOCAB_SIZE

# The demo readers' sizes.
#
# FiD and FiDO share the encoder, the vocabulary and the training budget. FiDO's decoder has cross-attention in every
# second layer only (layer-sparse) and one key/value head (multi-query); the savings pay for more and wider layers.

PASSAGE_LENGTH = 128
FIDO_PERIOD = 2
READERS = ("fid", "fido")


def reader_config(name: str, vocab_size: int = VOCAB_SIZE) -> ReaderConfig:
    """The configuration of a demo reader.

    Args:
        name: "fid" or "fido".
        vocab_size: Of the tokenizer.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in READERS:
        raise ValueError(f"reader: wanted one of {', '.join(READERS)}, got {name!r}")
    encoder = StackConfig(d_model=192, d_kv=32, d_ff=384, num_layers=4, num_heads=6, num_kv_heads=6)
    if name == "fid":
        decoder = StackConfig(d_model=192, d_kv=32, d_ff=384, num_layers=2, num_heads=6, num_kv_heads=6)
    else:
        decoder = StackConfig(d_model=192, d_kv=32, d_ff=512, num_layers=4, num_heads=6, num_kv_heads=1)
    return ReaderConfig(
        encoder=encoder,
        decoder=decoder,
        vocab_size=vocab_size,
        encoder_decoder_attention_period=1 if name == "fid" else FIDO_PERIOD,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        scale_decoder_outputs=True,
        append_eos=True,
        passage_length=PASSAGE_LENGTH,
    )


# questions file -> passages to read
EVALUATIONS = {"heldout.jsonl": (1, 2, 4, 8, 10), "heldout_40.jsonl": (10, 20, 40), "real.jsonl": (10,)}


def _start(log: pathlib.Path, *arguments: str) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen([sys.executable, "-m", "training", *arguments], stdout=stream, stderr=subprocess.STDOUT)


def _wait(processes: dict[str, subprocess.Popen]) -> None:
    codes = {name: process.wait() for name, process in processes.items()}
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        raise RuntimeError(f"recipe: wanted exit code 0 from every part, got {failed}; see the logs in results/")


def _evaluate(arguments: argparse.Namespace, name: str) -> dict[str, subprocess.Popen]:
    started = {}
    for data, n_passages in EVALUATIONS.items():
        result = arguments.out / "results" / f"{name}-{pathlib.Path(data).stem}"
        started[result.name] = _start(
            result.with_suffix(".txt"),
            *("evaluate", "--checkpoint", str(arguments.out / name), "--data", str(arguments.corpus / data)),
            *("--device", arguments.device, "--predictions", str(result.with_suffix(".jsonl"))),
            *("--n-passages", *map(str, n_passages)),
        )
    return started


def run_recipe(arguments: argparse.Namespace) -> None:
    """Train and evaluate the three demo readers.

    Raises:
        RuntimeError: If a part fails.
    """
    common = ["--corpus", str(arguments.corpus), "--device", arguments.device, "--num-workers", str(arguments.num_workers)]
    if arguments.no_cuda_graphs:
        common.append("--no-cuda-graphs")
    _wait(
        {
            name: _start(
                arguments.out / "results" / f"{name}.log",
                *("train", "--reader", name, "--out", str(arguments.out / name), "--seconds", str(arguments.seconds), *common),
            )
            for name in ("fid", "fido")
        }
    )
    up_training = {
        "fido_converted": _start(
            arguments.out / "results" / "fido_converted.log",
            *("up-train", "--from", str(arguments.out / "fid"), "--out", str(arguments.out / "fido_converted")),
            *("--seconds", str(arguments.up_training_seconds), *common),
        )
    }
    if not arguments.no_evaluation:
        _wait({**_evaluate(arguments, "fid"), **_evaluate(arguments, "fido")})
    _wait(up_training)
    if not arguments.no_evaluation:
        _wait(_evaluate(arguments, "fido_converted"))
