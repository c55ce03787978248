"""The suite's own parts, and a smoke run of it on tiny readers against a real server."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
from tritonclient.grpc import service_pb2

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from export.repository import repository_from_engines
from fido_client.data.examples import Context, Example
from fido_client.errors import ReaderError, ReaderUnavailable
from serving.contract.limits import Limits
from tests.stress.faults.clients import unchunked
from tests.stress.mutants.grpc import CHANGES, grpc_mutants
from tests.stress.mutants.http import http_mutants, nested, request

from . import recovery
from .__main__ import FAULTS, main
from .asking import judged_http
from .questions import Case, largest_case, limits_of, word_cases
from .served import descendants, is_alive, parse, resident_bytes, state_and_parent
from .tally import Growth, Tally, Verdict, growths, last_line, notes, table

LIMITS = Limits(max_passages=6, max_question_characters=200, max_new_tokens=40, default_max_new_tokens=12, slots=3, max_in_flight=40)


def test_a_row_counts_verdicts_and_keeps_bad_ones_in_words():
    tally = Tally("a fault")
    tally.judge(Verdict.RIGHT)
    tally.judge(Verdict.TOLD, "no room")
    assert tally.sound
    tally.judge(Verdict.WRONG, "x")
    tally.judge(Verdict.LOST, "y")
    tally.judge(Verdict.LOST, "y")
    tally.crash("fid died")
    assert (tally.tries, tally.wrong, tally.lost, tally.crashed, tally.sound) == (5, 1, 2, 1, False)
    assert notes([tally])[0] == "a fault: neither answered nor told: y (2 times)"


def test_what_was_not_measured_or_left_behind_is_not_sound():
    unmeasured, left = Tally("a"), Tally("b")
    unmeasured.unmeasured.append("no metrics")
    left.leave("2 regions", 2)
    assert not unmeasured.sound and not left.sound
    assert notes([unmeasured]) == ["a: not measured: no metrics"]


def test_rounds_of_a_fault_add_up_and_the_slowest_recovery_counts():
    row, again = Tally("a"), Tally("a")
    row.recovered(1.0)
    again.recovered(3.0)
    again.judge(Verdict.TOLD)
    row.absorb(again)
    assert (row.tries, row.recovery_s) == (1, 3.0)


def test_the_table_ends_with_the_recovery_and_the_last_line_adds_up():
    rows = [Tally("one"), Tally("two")]
    rows[0].judge(Verdict.TOLD)
    rows[1].judge(Verdict.WRONG)
    rows[1].recovered(2.5)
    assert table(rows).splitlines()[2].split() == ["two", "1", "0", "0", "1", "0", "0", "0", "2.50", "s"]
    assert last_line(rows) == "stress: 2 faults, 2 tries, 1 wrong, 0 lost, 0 crashed"


def test_metrics_are_summed_over_all_labels_but_the_model():
    text = (
        '# HELP x y\nx{model="fid",outcome="a"} 2\nx{outcome="b",model="fid"} 3\nx{model="fido"} 1e3\nfree 7\nmy_model{other_model="q"} 1\n'
    )
    assert parse(text) == {"x": {"fid": 5.0, "fido": 1000.0}, "free": {"": 7.0}, "my_model": {"": 1.0}}


def test_processes_are_found_with_brackets_in_their_names():
    assert state_and_parent("12 (a (b) c) S 7 12 12 0") == ("S", 7)


def test_we_are_alive_a_descendant_and_hold_memory():
    assert is_alive(os.getpid()) and os.getpid() in descendants(os.getppid()) and resident_bytes(os.getpid()) > 1 << 20
    assert not is_alive(2**22 + 1)


@pytest.mark.parametrize(("start", "end", "flat"), [(100, 101.9, True), (100, 103, False), (1, 1.9, True), (100, 90, True)])
def test_memory_is_flat_within_two_percent_or_a_megabyte(start, end, flat):
    assert Growth("x", int(start * 1e6), int(end * 1e6)).is_flat == flat


def test_growth_of_what_is_only_there_at_the_end_counts_from_nothing():
    assert [str(g).split()[0] for g in growths([{"a": 1}, {"b": 2}])] == ["a", "b"]
    assert not growths([{}, {"b": 1 << 30}])[0].is_flat


def test_one_sample_out_of_line_is_no_growth_and_a_steady_rise_is():
    def found(*megabytes):
        return growths([{"x": value * 1_000_000} for value in megabytes])[0]

    assert found(100, 130, 101, 99, 102, 98, 100, 131, 100).is_flat
    assert found(100, 101, 102, 103, 104, 105, 106, 107, 108).share == pytest.approx(107 / 101 - 1)
    assert not found(100, 101, 102, 103, 104, 105, 106, 107, 108).is_flat


def test_chunks_are_joined_and_a_broken_off_one_is_kept():
    assert unchunked(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") == b"abcde"
    assert unchunked(b"5\r\nabc") == b"abc"


def test_the_largest_question_fills_every_passage():
    case = largest_case(Case("fid", "q", ["w1 w2"], [""], 5, 0), LIMITS)
    assert [len(passage) for passage in case.passages] == [LIMITS.max_passage_characters] * 6


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return word_cases("fid", LIMITS, 0, 4)


def test_every_grpc_change_changes_the_request(cases):
    for change in CHANGES:
        for seed in range(20):
            rng = random.Random(seed)
            message = cases[seed % 4].message("fid")
            before = service_pb2.ModelInferRequest.FromString(message.SerializeToString())
            change(rng, message, LIMITS)
            # random content of four bytes, or an id, may by chance be what was there
            assert message != before or change.__name__ in ("content_random",), change.__name__


def test_mutants_are_the_same_for_the_same_seed(cases):
    for mutants in (grpc_mutants, http_mutants):
        one, two = (mutants(random.Random(5), cases, "fid", LIMITS) for _ in range(2))
        assert [next(one) for _ in range(300)] == [next(two) for _ in range(300)]


def test_a_request_may_override_or_leave_out_its_length():
    assert b"Content-Length: 2\r\n" in request("/x", b"ab")
    assert b"Content-Length: 9\r\n" in request("/x", b"ab", {"Content-Length": "9"})
    assert b"Content-Length" not in request("/x", b"ab", {"Content-Length": ""})
    assert (nested(2), nested(1, '{"a":', "}")) == ("[[]]", '{"a":1}')


@pytest.fixture(scope="module")
def repository(engines, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    repository_from_engines(engines["released_fid"][1], path, "fid", LIMITS)
    repository_from_engines(engines["fido"][1], path, "fido", LIMITS)
    return path


def test_a_wrong_list_of_answers_is_wrong_though_the_best_is_right(cases):
    for seed in range(20):
        rng = random.Random(seed)
        beams, choices = cases[0].with_beams(rng, LIMITS), cases[0].with_choices(rng, LIMITS)
        assert "num_beams" in beams.body() and "allowed_answers" in choices.tensors("fid") and choices.min_new_tokens == 0
    case = dataclasses.replace(choices, text="a", tokens=2, log_prob=-1.0, answers=("a", "b"))
    assert case.fits("a", 2, -1.0, ("a", "b")) and not case.fits("a", 2, -1.0, ("a", "c")) and not case.fits("a", 2, -1.0)
    body = {"answer": "a", "tokens": 2, "log_prob": -1.0, "answers": ["a", "b"]}
    assert judged_http(json.dumps(body).encode(), case)[0] is Verdict.RIGHT
    assert judged_http(json.dumps(body | {"answers": "a"}).encode(), case)[0] is Verdict.WRONG


def test_limits_are_read_back_from_the_configuration(repository):
    assert limits_of(repository, "fid") == LIMITS


def test_every_fault_has_a_row_of_its_own():
    assert len({fault.__name__ if hasattr(fault, "__name__") else str(fault) for fault in FAULTS.values()}) == len(FAULTS)


@pytest.mark.server
def test_a_few_faults_leave_tiny_readers_sound(repository, capsys):
    faults = ["malformed gRPC", "malformed HTTP", "cancel storm", "beams, choices, cancels", "hanging up"]
    code = main(["--repository", str(repository), "--words", "--scale", "0.05", "--only", *faults])
    printed = capsys.readouterr().out.splitlines()
    assert code == 0, "\n".join(printed)
    assert printed[-1].startswith("stress: 5 faults, ") and printed[-1].endswith(" tries, 0 wrong, 0 lost, 0 crashed")


@pytest.mark.server
@pytest.mark.slow
def test_one_of_two_servers_dies_and_clients_with_retries_lose_nothing(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "BEFORE_S", 1.0)
    monkeypatch.setattr(recovery, "AFTER_S", 4.0)
    question = Example("0", "w1 w2", ("w3",), (Context("w4 w5", "w6"),))
    row = recovery.measure("retries", 2, 20, repository, "fid", [question] * recovery.CLIENTS)
    assert (row.lost, row.other_errors) == (0, 0) and row.asked > 100
    assert row.answers_again_s < 3


def test_what_clients_noticed_of_a_death_is_counted_from_it():
    down, refused = ReaderUnavailable("down", status="UNAVAILABLE"), ReaderError("?")
    outcomes = [recovery.Outcome(*o) for o in ((0, 1, None), (9, 12, down), (9.5, 10.5, refused), (11, 11.5, down), (13, 18, None))]
    row = recovery.summary("x", outcomes, death_s=10)
    assert (row.asked, row.in_flight, row.lost, row.other_errors) == (5, 2, 3, 1)
    assert (row.failed_s, row.answers_again_s, row.slowest_s) == ((0.5, 2), 8, 5)
