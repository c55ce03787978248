"""The examples that use nothing of this repository, against a real server: each prints the answer that ReaderClient gets."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from export.repository import repository_from_engines
from fido_client import ReaderClient
from serving.contract.limits import Limits
from serving.launcher.server import TritonServer, models_of

pytestmark = pytest.mark.server

ROOT = pathlib.Path(__file__).parents[2]
QUESTION, PASSAGES = "w3 w4 w5?", ["w6 w7 w8", "w9 w10 — é"]


@pytest.fixture(scope="module")
def server(engines, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    repository_from_engines(engines["fido"][1], repository, "fido", Limits(default_max_new_tokens=12))
    with TritonServer(models_of(["fido"], stream=False), repository) as server:
        yield server


def _printed(command: list, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _check_lines(printed: str, server) -> None:
    with ReaderClient(server.grpc_url, "fido") as reader:
        wanted = reader.answer(QUESTION, PASSAGES)
    assert wanted.text and len(set(wanted.passage_scores)) == 2
    scores = " ".join(f"{score:.2f}" for score in wanted.passage_scores)
    assert printed == f"answer    {wanted.text}\nlog-prob  {wanted.log_prob:.4f}\nscores    {scores}\n"


def test_plain_tritonclient(server, tmp_path):
    script = shutil.copy(ROOT / "examples" / "plain_tritonclient.py", tmp_path)
    _check_lines(_printed([sys.executable, script, QUESTION, *PASSAGES, "--url", server.grpc_url], cwd=tmp_path), server)


def test_curl(server):
    printed = json.loads(_printed([ROOT / "examples" / "curl.sh", server.http_url, "fido"]))
    with ReaderClient(server.grpc_url, "fido") as reader:
        wanted = reader.answer(
            "what is the capital of France?",
            ["Its capital is Paris.", "French is the official language."],
            ["France: Capital", "France: Languages"],
            max_new_tokens=16,
        )
    assert (printed["answer"], printed["tokens"]) == (wanted.text, wanted.tokens)
    assert printed["passage_scores"] == pytest.approx(wanted.passage_scores, abs=1e-5)


def test_curl_of_an_unknown_model_fails(server):
    done = subprocess.run([ROOT / "examples" / "curl.sh", server.http_url, "nobody"], capture_output=True, text=True)
    assert done.returncode != 0 and "nobody" in done.stdout


@pytest.mark.slow
def test_node(server, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("no Node.js on this machine")
    folder = tmp_path / "node"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules", "*.protoset", "package-lock.json"))
    _printed([sys.executable, shutil.copy(ROOT / "examples" / "write_protocol.py", tmp_path)])
    installed = subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, timeout=300)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install the example's two packages here: {installed.stderr.splitlines()[-1:]}")
    _check_lines(_printed(["node", "ask.js", server.grpc_url, "fido", QUESTION, *PASSAGES], cwd=folder), server)
    done = subprocess.run(["node", "ask.js", server.grpc_url, "nobody", QUESTION, "p"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "nobody" in done.stderr
