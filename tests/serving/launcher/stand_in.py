"""A program that behaves like tritonserver towards the launcher: it answers the ready check and starts a process per Python model."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

PROGRAM = """#!{python}
import http.server, os, pathlib, signal, subprocess, sys, threading
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
repository = pathlib.Path(options["model-repository"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
{before}
for config in sorted(repository.glob("*/config.pbtxt")):
    if 'backend: "python"' in config.read_text():
        stub = "/backends/python/triton_python_backend_stub"
        subprocess.Popen(
            [stub, "-c", "import time; time.sleep(600)", str(repository / config.parent.name / "1" / "model.py")], executable=sys.executable
        )

class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/v2":
            self.wfile.write(globals().get("v2", "").encode())

    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", int(options["http-port"])), Ready).serve_forever()
"""


def install_stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> Path:
    """Make the stand-in the server to run; `before` is Python that it runs first."""
    program = folder / "tritonserver"
    program.write_text(PROGRAM.format(python=sys.executable, before=before))
    program.chmod(0o755)
    monkeypatch.setenv("TRITONSERVER", str(program))
    return program


def write_models(repository: Path, **backends: str) -> Path:
    """A repository with models of the given backends and no engines."""
    for model, backend in backends.items():
        (repository / model / "1").mkdir(parents=True)
        (repository / model / "config.pbtxt").write_text(f'name: "{model}"\nbackend: "{backend}"\n')
    return repository


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    """Wait until a process has ended; False if it does not."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)
