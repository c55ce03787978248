"""Triton's output becomes two files of bounded size, one of them JSON lines, and never blocks Triton."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from serving.launcher import log
from serving.launcher.log import EXCERPT_LINES, LogExcerpt, LogPump, request_fields

FIELDS = {"model": "fido", "request": 'a "b"', "outcome": "answered", "answer": "é\u2028\n\\", "total_ms": 1.5, "error": None}
HEAD = "I1126 08:27:15.353726 1043 reader_model.py:126] "


def as_triton_writes_it(fields: dict) -> str:
    return HEAD + json.dumps(json.dumps(fields, ensure_ascii=False), ensure_ascii=False)


def pumped(folder: Path, *content: bytes) -> LogPump:
    pump = LogPump(folder / "tritonserver.log", folder / "requests.jsonl")
    for part in content:
        os.write(pump.write_fd, part)
    pump.close_write_end()
    pump.join()
    return pump


def test_requests_are_json_lines_of_their_own(tmp_path):
    other = f'{HEAD}"successfully loaded"'
    lines = [as_triton_writes_it(FIELDS), other, HEAD + json.dumps(FIELDS)]  # the last: with Triton's escaping off
    pumped(tmp_path, "\n".join(lines).encode())
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().split("\n") if line]
    assert [{key: value for key, value in request.items() if key != "time"} for request in requests] == [FIELDS, FIELDS]
    assert all(next(iter(request)) == "time" for request in requests)
    assert (tmp_path / "tritonserver.log").read_text() == other + "\n"


@pytest.mark.parametrize(
    "line", ["", "I x] ", f'{HEAD}"{{broken"', f"{HEAD}{{}}", f'{HEAD}"[1]"', f'{HEAD}"{{\\"model\\": 1}}"', '{"model": 1}']
)
def test_what_is_no_request_stays_in_the_log(line):
    assert request_fields(line) is None


def test_a_line_is_taken_whole_however_it_arrives(tmp_path):
    content = as_triton_writes_it(FIELDS).encode()
    middle = content.index("é".encode()) + 1  # in the middle of a character
    pumped(tmp_path, content[:middle], content[middle:] + b"\n")
    assert json.loads((tmp_path / "requests.jsonl").read_text())["answer"] == FIELDS["answer"]


def test_files_rotate_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 1000)
    pumped(tmp_path, *(b"line %05d\n" % i for i in range(3000)))
    files = sorted(tmp_path.glob("tritonserver.log*"))
    assert len(files) == log.OLD_FILES + 1 and all(path.stat().st_size <= 1000 for path in files)
    assert (tmp_path / "tritonserver.log").read_text().endswith("line 02999\n")


def test_earlier_output_stays(tmp_path):
    pumped(tmp_path, b"first\n")
    pumped(tmp_path, b"second\n")
    assert (tmp_path / "tritonserver.log").read_text() == "first\nsecond\n"


def test_a_full_disk_does_not_block_the_server(tmp_path):
    pump = LogPump(Path("/dev/full"), Path("/dev/full"))
    content = (b"x" * 99 + b"\n") * 20_000 + as_triton_writes_it(FIELDS).encode()

    def write() -> None:
        for i in range(0, len(content), 5000):
            os.write(pump.write_fd, content[i : i + 5000])

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive()
    pump.close_write_end()
    assert pump.excerpt().startswith("xxx"), "it was read to the end"


def test_a_line_without_end_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MAX_LINE_BYTES", 10_000)
    taken = []
    monkeypatch.setattr(LogExcerpt, "add", lambda self, line: taken.append(len(line)))
    pumped(tmp_path, *[b"y" * 5000] * 40)
    assert sum(taken) == 200_000 and max(taken) <= 10_000 + log.READ_BYTES


def test_the_excerpt_is_the_cause_and_not_what_follows_it_for_pages():
    cause = 'E1124 13:38:36.1 8619 model_lifecycle.cc:642] "failed to load fid: decoder_step.onnx: SHA-256 wanted 12..., got 34..."'
    after = [f"E1124 13:38:39.{i} 8619 ev_epoll1_linux.cc:373] (event_engine) Epoll1Poller encountered epoll_wait error" for i in range(50)]
    others = [f"E1124 13:38:40.1 8619 x.cc:1] another {i}" for i in range(50)]
    excerpt = LogExcerpt()
    for line in ["I1124 13:38:35.1 8619 server.cc:1] started", cause, *after, *others]:
        excerpt.add(line)
    assert excerpt.lines()[:3] == [cause, after[0], others[0]] and len(excerpt.lines()) == EXCERPT_LINES


def test_without_a_fault_the_excerpt_is_the_end():
    excerpt = LogExcerpt()
    for i in range(100):
        excerpt.add(f"line {i} " + "z" * 10_000)
    assert excerpt.lines()[-1].startswith("line 99 ") and len("".join(excerpt.lines())) <= EXCERPT_LINES * log.EXCERPT_CHARACTERS
