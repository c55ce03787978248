"""Field row E5: every command block of README.md and docs/*.md runs as printed, in a copy of the tree, with a real server.

A fenced block is one of:
- commands, without a language, as `sh`, `python`, or `console` (a `$ ` line and its output): run;
- `text`: a drawing or output. Right behind commands it is their output: its lines must be among what they print, but for numbers;
- commands behind `<!-- not run: REASON -->`: not run.

Commands see a network of their own, so that the documents' ports are free, and the tree's files, so that what they write is thrown away.
"""

from __future__ import annotations

import dataclasses
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.served.perf_analyzer import HOME, PerfAnalyzerError, find_perf_analyzer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)
TYPED = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)  # a command in a console, with the lines that it goes on in
LANGUAGES = ("", "sh", "python", "console", "text")
# of a bash script: `make serve ...` is started, waited for, and stopped by Ctrl-C at the next one or at the end
SERVE = """
set -em
stop() { if [ -n "$server" ]; then kill -INT -- -$server; wait $server || true; server=; fi; }
trap stop EXIT
serve() {
  stop
  make serve "$@" > serve.log 2>&1 & server=$!
  for _ in $(seq 600); do
    if grep -q "^ready" serve.log; then return; fi
    kill -0 $server 2> /dev/null || break
    sleep 0.1
  done
  cat serve.log; exit 1
}
"""


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    reason: str | None
    output: str

    @property
    def needs_server(self) -> bool:
        return not re.search(r"^make (serve|demo)", self.text, re.MULTILINE) and bool(
            re.search(r"^make ask|^(\$ )?fido-client|localhost:8000|127\.0\.0\.1:8001", self.text, re.MULTILINE)
        )


def blocks_of(page: str, text: str) -> list[Block]:
    found: list[Block] = []
    fences = list(FENCE.finditer(text))
    for fence, following in zip(fences, [*fences[1:], None], strict=False):
        reason = NOT_RUN.search(text, 0, fence.start())
        output = (
            following[2]
            if following and following[1] == "text" and not re.search(r"^#", text[fence.end() : following.start()], re.M)
            else ""
        )
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[1], fence[2], reason[1] if reason else None, output))
    assert text.count("\n```") == 2 * len(fences), f"{page}: a fence that is indented, open, or of a language with other characters"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page.name, page.read_text())]


class Network:
    """A bash in a network of its own that runs one script after another."""

    def __init__(self, site: Path):
        unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
        if not shutil.which("ip") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no network namespaces here (unshare --net), so the documents' ports may be taken")
        path = f"{site}/path-bin:{os.environ['PATH']}"
        # set-up is not to run: it would write into this process's own environment
        kept = {"PYTHON": "false", "PIP_NO_INDEX": "1"} | {
            name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ
        }
        env = {**kept, "PATH": path, "PYTHONPATH": str(site / "clients"), "HF_HUB_OFFLINE": "1"}
        self.site = site
        command = [*unshare, "bash", "-c", "ip link set lo up; exec bash"]
        self.bash = subprocess.Popen(command, cwd=site, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, script: str, timeout_s: float = 240) -> tuple[int, str]:
        file, output = self.site / "block.sh", self.site / "block.out"
        file.write_text(script)
        self._send(f"timeout -k 10 {timeout_s} bash {file} > {output} 2>&1 < /dev/null; echo $?\n")
        assert self.bash.stdout and select.select([self.bash.stdout], [], [], timeout_s + 30)[0], "no end"
        return int(self.bash.stdout.readline()), output.read_text(errors="replace")

    def start(self, command: str, log: Path) -> None:
        self._send(f"set -m\n{command} > {log} 2>&1 < /dev/null &\nset +m\n")

    def _send(self, line: str) -> None:
        assert self.bash.stdin
        self.bash.stdin.write(line)
        self.bash.stdin.flush()

    def close(self) -> None:
        self._send("for job in $(jobs -p); do kill -INT -- -$job; wait $job; done; exit\n")
        self.bash.wait(60)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A copy of the tree as a user has it after `make setup`, with what the documents take as given."""
    site = tmp_path_factory.mktemp("site")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in files:
        if file and (ROOT / file).is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, site / file)
    (site / ".venv").mkdir()
    for name in ("bin", "lib", "include", "lib64", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (site / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    for folder in ("build/demo", "build/corpus"):
        shutil.copytree(ROOT / folder, site / folder)
    installed_s = time.time()  # of all of them: make would install again what is older than what it needs
    for marker in set(re.findall(r"\$\(VENV\)/(\.[\w-]+)", (ROOT / "Makefile").read_text())):
        (site / ".venv" / marker).write_text('{"packages": 27, "downloaded_mb": 127, "on_disk_mb": 433, "seconds": 11.0}\n')
        os.utime(site / ".venv" / marker, (installed_s, installed_s))
    (site / "build/corpus/heldout.jsonl").touch()
    (site / "path/to").mkdir(parents=True)
    for name, checkpoint in (("checkpoint", "fid"), ("fid", "fid"), ("fido", "fido")):
        (site / "path/to" / name).symlink_to(ROOT / "checkpoints" / checkpoint)
    shutil.copy(ROOT / "checkpoints/fid/tokenizer.json", site / "path/to/tokenizer.json")
    lines = (site / "build/corpus/heldout.jsonl").read_text().splitlines()
    (site / "data.jsonl").write_text("\n".join(lines[:20]) + "\n")
    shutil.copy(ROOT / "examples/passages.json", site)
    (site / "path-bin").mkdir()
    command = site / "path-bin/fido-client"
    command.write_text(f'#!/bin/sh\nexec {site}/.venv/bin/python -m fido_client "$@"\n')
    command.chmod(0o755)
    return site


@pytest.fixture(scope="module")
def served(site) -> Iterator[Network]:
    """A network in which `make serve` serves the demo readers and one named nq, as the documents' commands made them."""
    network = Network(site)
    try:
        code, output = network.run(
            "set -e\nmake export READER=nq CHECKPOINT=path/to/checkpoint\nmake export FID=checkpoints/fid FIDO=checkpoints/fido\n"
        )
        assert code == 0, output
        log = site / "server.log"
        log.touch()
        network.start("make serve STREAM=1", log)
        end = time.monotonic() + 120
        while "\nready" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield network
    finally:
        network.close()


def script_of(block: Block) -> str:
    if block.language == "python":
        return f"set -e\n.venv/bin/python - <<'END'\n{block.text}END\n"
    if block.language == "console":
        return "set -e\n" + "\n".join(TYPED.findall(block.text))
    return SERVE + re.sub(r"^make serve\b", "serve", block.text, flags=re.MULTILINE)


def shape(line: str) -> str:
    """A line without its numbers and the width of its blanks."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d,.]*", "0", line)).strip()


RUNNABLE = [block for block in BLOCKS if block.language != "text" and not block.reason]


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"{block.page}:{block.line}")
def test_e5_a_block_runs_as_printed(block, site, request):
    if "perf_analyzer" in block.text:
        try:
            find_perf_analyzer(ROOT / HOME)
        except PerfAnalyzerError as error:
            pytest.skip(str(error))
        if not (site / HOME).exists():
            (site / HOME).symlink_to(ROOT / HOME)
    if "export convert" in block.text:
        (site / "path/to/fido").unlink()  # it is what the block makes
    if block.needs_server:
        code, output = request.getfixturevalue("served").run(script_of(block))
    else:
        network = Network(site)
        try:
            code, output = network.run(script_of(block))
        finally:
            network.close()
    assert code == 0, f"{block.text}\n{output}"
    printed = {shape(line) for line in output.splitlines()}
    wanted = block.output.splitlines() + (TYPED.sub("", block.text).splitlines() if block.language == "console" else [])
    assert [line for line in wanted if shape(line) not in printed] == [], output
    if block.language == "python":
        assert output.strip(), "a snippet that prints its answer"


def test_e5_every_block_is_run_or_says_why_not():
    assert {block.language for block in BLOCKS} <= set(LANGUAGES)
    for block in BLOCKS:
        commands = re.search(r"^(\$ )?(make|curl|pip|python|\.venv/bin|fido-client|perf_analyzer|openssl)\b", block.text, re.MULTILINE)
        assert not (block.language == "text" and commands), f"{block.page}:{block.line}: commands as text are not run: {block.text}"
        assert block.reason is None or len(block.reason) > 10, f"{block.page}:{block.line}: a reason"
    skipped = {(block.page, block.reason) for block in BLOCKS if block.reason}
    pages = {"gpu.md", "architecture.md", "benchmarks.md", "client.md", "operating.md", "scale.md", "training.md"}
    assert len(RUNNABLE) > 20 and {page for page, _ in skipped} <= pages
