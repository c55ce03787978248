"""The distribution fido-client: installs by itself in a fresh environment of each Python at hand, and answers from there."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.clients.scripted_server import ScriptedServer

ROOT = pathlib.Path(__file__).parents[2]
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")

ASK = """
import asyncio, sys
from fido_client import Answer, AnswerStream, AsyncReaderClient, ReaderClient, ReaderError, ReaderTimeout, ReaderUnavailable, RequestRefused

with ReaderClient(sys.argv[1], "nq", retries=2) as reader:
    answer = reader.answer("q", ["p", {"title": "t", "text": "x"}])
    assert isinstance(answer, Answer) and (answer.text, answer.tokens) == ("Paris", 3), answer
    assert [result.text for result in reader.answer_many([{"question": "q", "passages": ["p"]}] * 5)] == ["Paris"] * 5
    assert [part.text for part in reader.stream("q", ["p"])] == ["Pa", "ris"]

async def run():
    async with AsyncReaderClient(sys.argv[1], "nq") as reader:
        assert (await reader.answer("q", ["p"])).text == "Paris"
        assert [result.text async for result in reader.answer_many([{"question": "q", "passages": ["p"]}] * 5)] == ["Paris"] * 5
        async with reader.stream("q", ["p"]) as stream:
            assert [part.text async for part in stream] == ["Pa", "ris"]

asyncio.run(run())
heavy = {"torch", "onnxruntime", "tokenizers", "tqdm", "clients"} & set(sys.modules)
assert not heavy, heavy
print("numpy", sys.modules["numpy"].__version__)
"""


def _python(version: str) -> str | None:
    """An interpreter of the version, if this machine has one that starts."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    candidates = [*sorted(pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), shutil.which(f"python{version}")]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def _run(command: list[object], **kwargs: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_fresh_environment_installs_it_and_answers(server: ScriptedServer, tmp_path: pathlib.Path, version: str) -> None:
    python = _python(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    source, venv = tmp_path / "clients", tmp_path / "venv"
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "clients", source, ignore=ignored)
    _run([python, "-m", "venv", venv])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    numpy = ["numpy<2"] if version in ("3.9", "3.12") else []  # both majors of NumPy, where both have wheels
    _run([*pip, source, *numpy], env=environment)
    printed = _run([venv / "bin" / "python", "-c", ASK, server.url], cwd=tmp_path, env=environment)
    assert printed.startswith("numpy 1." if numpy else "numpy ")
    assert (next((venv / "lib").glob("python*/site-packages/fido_client")) / "py.typed").is_file()

    (tmp_path / "passages.json").write_text('["p"]')
    command = [venv / "bin" / "fido-client", "ask", "--url", server.url, "--question", "q", "--passages", "passages.json"]
    assert _run(command, cwd=tmp_path, env=environment).startswith("answer       Paris\n")


def test_names_of_the_package_are_those_that_it_lists() -> None:
    import fido_client

    assert {name: getattr(fido_client, name).__name__ for name in fido_client.__all__ if name != "Passage"} == {
        name: name for name in fido_client.__all__ if name != "Passage"
    }
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fido_client.nothing


@pytest.mark.parametrize("module", ["clients.reader_client", "clients.request", "clients.metrics", "clients.examples"])
def test_a_checkouts_old_names_are_the_new_ones_without_an_installation(module: str) -> None:
    code = f"""
import {module} as old, sys
names = [name for name in vars(old) if not name.startswith("_") and getattr(vars(old)[name], "__module__", "").startswith("fido_client")]
assert names, vars(old)
import fido_client
assert old.__name__.startswith("fido_client."), old
assert fido_client.__file__ == {str(ROOT / "clients/fido_client/__init__.py")!r}, fido_client.__file__
assert not [name for name in sys.modules if name.startswith("clients.fido_client")]
"""
    _run([sys.executable, "-c", code], cwd=ROOT)


def test_python_m_clients_is_the_command() -> None:
    assert _run([sys.executable, "-m", "clients", "--help"], cwd=ROOT).startswith("usage: fido-client [-h] COMMAND")
