"""The decode loop over the real engines: whoever comes and goes, every answer is the torch reader's, token for token."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.contract.manifest import Manifest
from serving.pipeline.scheduler import DecodeSequence, Scheduler
from tests.conftest import CONFIGS, CPU_BACKENDS, random_passages
from tests.export.graphs.test_cpu import loaded, packed

PASSAGES, LONGEST = (1, 2, 5, 20, 3, 9), 40


class Prepared:
    """A reader with questions of very different lengths, encoded, and their answers by torch."""

    def __init__(self, engines, name: str, backend: str):
        checkpoint, directory = engines[name]
        self.manifest = Manifest.load(directory)
        encoder, self.decoder = loaded(directory, backend, slots=3)
        length = CONFIGS[name].passage_length
        self.questions, self.tokens = [], []
        for seed, n in enumerate(PASSAGES):
            ids, mask = random_passages(n, length, seed)
            self.questions.append(packed(encoder, ids[0], mask[0], length))
            self.tokens.append(checkpoint.reader.generate(ids, mask, LONGEST, min_new_tokens=LONGEST).tokens[0])


@pytest.fixture(scope="module")
def prepared(engines):
    made: dict[tuple[str, str], Prepared] = {}

    def prepare(name: str, backend: str) -> Prepared:
        if (name, backend) not in made:
            made[name, backend] = Prepared(engines, name, backend)
        return made[name, backend]

    return prepare


ARRIVALS = st.lists(
    st.tuples(st.integers(0, len(PASSAGES) - 1), st.integers(1, LONGEST - 1), st.sampled_from([0.0, 0.0, 0.001, 0.005])),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["fid", "grouped", "released_fid"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=ARRIVALS)
def test_answers_do_not_depend_on_who_else_is_in_flight(prepared, name, backend, arrivals):
    reader = prepared(name, backend)
    loop = Scheduler(reader.decoder, start_token=0, eos_token=reader.manifest.eos_token_id, max_waiting=99)
    running = []
    for which, most, pause in arrivals:
        found: list[int] = []
        done, errors = threading.Event(), []

        def on_end(error: Exception | None, errors=errors, done=done) -> None:
            errors.append(error)
            done.set()

        # the end token is forbidden until after the last token that is compared: random readers end early or never
        hidden, positions = reader.questions[which]
        loop.submit(DecodeSequence(hidden, positions, most, most + 1, lambda token, _, found=found: found.append(token), on_end))
        running.append((which, most, found, done, errors))
        time.sleep(pause)
    for which, most, found, done, errors in running:
        assert done.wait(20) and errors == [None]
        assert found == reader.tokens[which][:most]
    loop.stop()
