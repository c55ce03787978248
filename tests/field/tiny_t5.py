"""Tiny T5s as transformers writes them, and `python -m export` in this process; for the tests of section B."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from export import __main__ as command_line
from export.checkpoint.files import load_checkpoint
from export.compare import transformers_model
from tests.conftest import VOCAB_SIZE

SIZES = {"vocab_size": VOCAB_SIZE, "d_model": 12, "d_kv": 5, "d_ff": 7, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}


class Result(NamedTuple):
    """Of one command."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `python -m export` in this process."""

    def run(*arguments: object) -> Result:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        capsys.readouterr()
        try:
            code = command_line.main([str(argument) for argument in arguments])
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
                signal.signal(number, handler)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(export: Callable[..., Result], tmp_path: Path) -> Callable[..., str]:
    """Exports a checkpoint that must be refused: one line, exit code 1, nothing written. Returns the line."""

    def run(checkpoint: Path, *flags: str) -> str:
        out = tmp_path / "out"
        result = export("onnx", checkpoint, out / "engines", *flags)
        assert result.code == 1 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert len(result.stderr) < 700 and "Traceback" not in result.stderr
        assert not out.exists()
        return result.stderr

    return run


def t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    """A tiny T5 whose every weight matters."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**SIZES, "decoder_start_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.5)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_json: str) -> Path:
    """T5 v1.1's architecture as save_pretrained writes it."""
    directory = tmp_path / "checkpoint"
    t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(tokenizer_json)
    return directory


def edit(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(str(directory / "model.safetensors"))


def write_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in weights.items()}, str(directory / "model.safetensors"), {"format": "pt"}
    )


@torch.no_grad()
def assert_as_transformers(directory: Path, wanted: T5ForConditionalGeneration | None = None) -> None:
    """Our reader of the directory has the logits of transformers' from_pretrained, or of `wanted`."""
    loaded = load_checkpoint(directory)
    model = wanted
    if model is None:
        model, stage = transformers_model(loaded)
        assert stage == "module vs from_pretrained"
    ids, targets = torch.randint(3, VOCAB_SIZE, (1, 20)), torch.randint(3, VOCAB_SIZE, (1, 6))
    theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=targets).logits
    ours = loaded.reader(ids[None], torch.ones_like(ids)[None], targets)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
