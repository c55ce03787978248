"""`make gpu-check` where there is no GPU: all it can check is well, the rest says what to do, and a wrong engine does not pass."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest

from clients.examples import Context, Example
from export.tensorrt import detect
from perf.gpu import check

EXAMPLES = [Example(str(i), f"w{i} w{i + 7}", ("w1",), (Context(f"w{i + 1} w{i + 2} w{i + 3}", "w9"),)) for i in range(12)]


@pytest.mark.server
@pytest.mark.slow
def test_on_a_cpu_the_card_fails_and_the_reader_passes(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(check, "cuda_gpu", lambda: None)
    data = Path("examples/demo_questions.jsonl")
    code = check.main(["--engine", "onnxruntime", "--readers", "fido", "--data", str(data), "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert lines[0].startswith("card         FAILED no NVIDIA GPU or no driver; nvidia-smi")
    assert lines[2].startswith("fido engines ok     onnxruntime float32")
    assert lines[3] == "fido parity  ok     3 of 3 answers as fp32 on the CPU, log-probabilities within 0.0000"
    assert lines[4].startswith("fido served  ok     Triton 2.51 (older than 2.60: trusted clients only): EM 100.0, 3 of 3 as fp32")
    assert lines[-1].startswith("gpu-check: 2 of 5 checks FAILED: card, packages")
    result = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [entry["ok"] for entry in result["checks"]] == [False, False, True, True, True]


def test_an_engine_that_answers_otherwise_does_not_pass(engines) -> None:
    wanted = check.answers(engines["fid"][1], EXAMPLES)
    assert check.parity(engines["fid"][1], wanted, EXAMPLES).startswith("12 of 12 answers as fp32")
    with pytest.raises(check.CheckError, match=r"of 12 answers as fp32 .*; wanted 97% and 0.05: these engines must not serve"):
        check.parity(engines["t5_v1_0"][1], wanted, EXAMPLES)


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        ({}, "No module named 'cupy'; pip install -r requirements-gpu.txt"),
        ({"cupy": "13.6.0", "tensorrt": "9.3.0"}, "TensorRT 9.3.0 is none of those in docs/gpu.md"),
        ({"cupy": "13.6.0", "tensorrt": "11.4.0"}, "TensorRT 11.4.0 \\(its API .*, CuPy 13.6.0 for CUDA 13.1"),
    ],
)
def test_packages_that_do_not_fit_say_what_to_do(packages, said, monkeypatch, capsys) -> None:
    def import_module(name: str) -> object:
        if name not in packages:
            raise ModuleNotFoundError(f"No module named {name!r}")
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 13010)
        return types.SimpleNamespace(__version__=packages[name], cuda=types.SimpleNamespace(runtime=runtime))

    monkeypatch.setattr(check, "importlib", types.SimpleNamespace(import_module=import_module))
    screen = check.Screen()
    assert screen.check("packages", check.packages) == (said.startswith("TensorRT 11"))
    assert re.search(said, capsys.readouterr().out)


def test_a_driver_that_raises_is_a_failed_check_and_the_others_go_on(monkeypatch, capsys) -> None:
    def broken() -> detect.Gpu:
        raise RuntimeError("CUDA error 999")

    monkeypatch.setattr(check, "cuda_gpu", broken)
    screen = check.Screen()
    assert not screen.check("card", check.card) and screen.check("next", lambda: "well")
    assert capsys.readouterr().out == "card         FAILED RuntimeError: CUDA error 999\nnext         ok     well\n"
    assert screen.failed == ["card"]
