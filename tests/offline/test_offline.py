"""`python -m offline` on two nodes of one machine: killed and resumed, rows set aside, a killed server. Needs `make setup FOR=offline`."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fido_client.data.examples import read_examples
from serving.launcher.processes import descendants
from serving.pipeline.in_process import InProcessReader

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("OFFLINE_PYTHON", ROOT / ".venv-offline" / "bin" / "python"))
pytestmark = [pytest.mark.skipif(not PYTHON.is_file(), reason="ray: `make setup FOR=offline`"), pytest.mark.slow]

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
FILES = 40  # questions of the JSON list
LINES = 600


def example(number: int, **more) -> dict:
    return {
        "id": f"q{number}",
        "question": f"w{number % 50} w3",
        "ctxs": [{"title": f"w{k}", "text": f"w{number % 40} w{k}"} for k in range(3)],
        **more,
    }


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster, and the process that holds it."""
    with subprocess.Popen([PYTHON, "-c", TWO_NODES], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [str(PYTHON), "-u", "-m", "offline", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*arguments: object, code: int = 0) -> str:
    process = start(*arguments)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def in_offline_environment(script: str, *arguments: object) -> str:
    done = subprocess.run([PYTHON, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(folder: Path) -> list[dict]:
    if not folder.is_dir():
        return []
    script = "import json, sys, pyarrow.parquet as pq\nprint(json.dumps(pq.read_table(sys.argv[1]).to_pylist()))"
    rows: list[dict] = json.loads(in_offline_environment(script, folder))
    return rows


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*")}


def kill_once(process: subprocess.Popen[str], answers: Path, shards: int) -> None:
    """Kill a run as soon as it has done so many shards."""
    deadline_s = time.monotonic() + 120
    while len(stamps(answers)) < shards:
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()


def test_a_run_that_is_killed_goes_on_and_every_question_is_answered_once(cluster, engines, tmp_path):
    _, reader = engines["fido"]
    lines = [json.dumps(example(number)) for number in range(LINES)]
    poison = {
        3: '{"id": "q3", "question":',
        17: json.dumps(example(17, ctxs=[])),
        40: json.dumps(example(40, question="  ")),
        222: json.dumps(example(222, ctxs=["w1"] * 41)),
        401: json.dumps(example(401, ctxs="w1")),
    }
    for number, line in poison.items():
        lines[number] = line
    jsonl, listed, parquet = tmp_path / "lines.jsonl", tmp_path / "list.json.gz", tmp_path / "table.parquet"
    jsonl.write_text("\n\n".join(lines) + "\n")
    listed.write_bytes(gzip.compress(json.dumps([{**example(k), "id": None} for k in range(FILES)], indent=1).encode()))
    rows = [example(number) for number in range(LINES, LINES + 100)]
    in_offline_environment(
        "import json, sys, pyarrow as pa, pyarrow.parquet as pq\n"
        "pq.write_table(pa.Table.from_pylist(json.loads(sys.argv[1])), sys.argv[2], row_group_size=33)",
        json.dumps(rows),
        parquet,
    )
    out = tmp_path / "out"
    command = (jsonl, listed, parquet, "--out", out, "--engines", reader, "--reader", "tiny", "--shard-rows", 20, "--address", cluster[0])
    command = (*command, "--max-new-tokens", 8)

    kill_once(start(*command), out / "answers", 8)
    done = stamps(out / "answers")
    assert 8 <= len(done) < 30, "the kill came while shards were left"
    output = run(*command)

    assert done.items() <= stamps(out / "answers").items(), "what was done is not done again"
    answers, aside = table(out / "answers"), table(out / "set_aside")
    wanted = [f"q{number}" for number in range(LINES + 100) if number not in poison] + [f"list.json.gz:{row}" for row in range(FILES)]
    assert sorted(row["id"] for row in answers) == sorted(wanted)
    assert f"{LINES + 100 + FILES} questions, {len(wanted)} answered, {len(poison)} set aside" in output, output
    assert {row["row"]: row["source"] for row in aside} == poison
    errors = {row["row"]: row["error"] for row in aside}
    assert "not JSON" in errors[3] and "at least one" in errors[17] and "some text" in errors[40]
    assert "wanted 1 to 40, got 41" in errors[222] and "ctxs: wanted a list" in errors[401]
    by_id = {row["id"]: row for row in answers}
    with InProcessReader(reader) as alone:
        for number in (0, 599, 633, 699):
            asked = example(number)
            found = alone.answer(asked["question"], [c["text"] for c in asked["ctxs"]], [c["title"] for c in asked["ctxs"]], 8)
            assert by_id[f"q{number}"]["answer"] == found.text
            assert by_id[f"q{number}"]["log_prob"] == pytest.approx(sum(found.log_probs), abs=1e-4)

    # a third run asks nothing; rows set aside are asked with --again, and the others of their shards are not
    assert "0 of them asked now" in run(*command)
    mended = json.dumps(example(401, ctxs=[{"text": "w1"}]))
    jsonl.write_text(jsonl.read_text().replace(poison[401], mended))
    assert f"{jsonl}: " in run(*command, code=1), "the file has changed"
    jsonl.write_text(jsonl.read_text().replace(mended, poison[401]).replace('"  "', '"w1"'))
    output = run(*command, "--again")
    assert f"{len(wanted) + 1} answered, {len(poison) - 1} set aside, {len(poison)} of them asked now" in output, output


def test_what_is_wrong_with_the_command_is_said_in_one_line(tmp_path):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(json.dumps(example(1)) + "\n")
    missing = run(jsonl, "--out", tmp_path / "o", "--repository", tmp_path / "r", code=1)
    assert "there is no such folder (`make export` makes one)" in missing
    assert "b.jsonl: there is no such file" in run(tmp_path / "b.jsonl", "--out", tmp_path / "o", "--url", "127.0.0.1:1", code=1)
    assert "named twice" in run(jsonl, jsonl, "--out", tmp_path / "o", "--url", "127.0.0.1:1", code=1)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "manifest.json").write_text(json.dumps({"format": 1, "reader": "fid", "files": []}))
    output = run(jsonl, "--out", tmp_path / "o", "--url", "127.0.0.1:1", code=1)
    assert "reader: 'fid' then, 'fido' now" in output and "pass another --out" in output and output.count("\n") == 1


ENDS_THE_SERVER = """
import sys
import clients
from fido_client.errors import ReaderError, ReaderUnavailable
from offline import readers
from offline.inputs import Row
from fido_client.data.examples import example_from

readers.PAUSES_S = (0.0, 0.0, 0.0)

class Answer:
    text, log_prob, tokens = "w", 0.0, 1

class Server:
    '''In flight with "poison", all fail until it has started again, which takes three looks; "odd" fails alone.'''
    away, asked, ends = 0, [], 0
    def is_ready(self):
        self.away = max(0, self.away - 1)
        return self.away == 0
    def ask(self, requests):
        requests = list(requests)
        for at, request in enumerate(requests):
            if any(r.question == "poison" for r in requests[at : at + 4]) or self.away:
                self.ends += self.away == 0
                self.away = 3
            if self.away:
                yield ReaderUnavailable("gone", status="UNAVAILABLE")
                continue
            self.asked.append(request.question)
            yield ReaderError("odd") if request.question == "odd" else Answer

source = readers.Source("a:1", None, None, "fido", 4, 1.0, 60.0)
readers.READY_POLL_S = 0
questions = ["poison" if k == 21 else "odd" if k == 30 else f"q{k}" for k in range(40)]
rows = [Row(q, k, example_from({"question": q, "ctxs": ["t"]}, q, where=""), "", "") for k, q in enumerate(questions)]
server = Server()
answers, faults = readers.ShardReader(source, readers.Settings("fido", None, None, 40), "/nowhere").answered(server, rows)
print(sorted(row.row for row, _ in answers) == [k for k in range(40) if k not in (21, 30)], [(row.id, e) for row, e in faults], server.ends)
print(len([q for q in server.asked if q.startswith("q")]) - len(set(server.asked) - {"odd"}))
"""


def test_a_question_that_ends_its_server_is_set_aside_and_the_others_are_answered():
    first, second = in_offline_environment(ENDS_THE_SERVER).splitlines()
    assert first == "True [('poison', 'gone'), ('odd', 'odd')] 4", "one end with others in flight, three alone"
    assert second == "0", "no other question was asked twice"


@pytest.mark.server
@pytest.mark.usefixtures("cluster")  # which a run without --address does not join
def test_a_killed_server_of_an_actor_comes_back_and_no_question_is_lost(tmp_path):
    examples = list(read_examples(ROOT / "examples" / "demo_questions.jsonl"))
    jsonl, out = tmp_path / "lines.jsonl", tmp_path / "out"
    with jsonl.open("w") as file:
        for number in range(400):
            chosen = examples[number % len(examples)]
            ctxs = [context.as_passage() for context in chosen.contexts[:2]]
            file.write(json.dumps({"id": number, "question": chosen.question, "ctxs": ctxs}) + "\n")
    process = start(jsonl, "--out", out, "--repository", ROOT / "build" / "demo" / "model_repository", "--shard-rows", 50)
    deadline_s = time.monotonic() + 180
    while len(stamps(out / "answers")) < 2:
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()[0]
        time.sleep(0.05)
    programs = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in descendants(process.pid)}
    (server,) = [pid for pid, program in programs.items() if program.endswith(b"/tritonserver")]
    os.kill(server, signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert "1 actors on 1 nodes" in output, output
    assert process.returncode == 0 and "400 questions, 400 answered, 0 set aside" in output, output
    assert sorted(int(row["id"]) for row in table(out / "answers")) == list(range(400))
