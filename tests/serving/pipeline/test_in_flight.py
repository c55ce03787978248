"""The decode loop over the real engines: whoever comes and goes, every answer is the torch reader's, token for token."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.contract.limits import Limits
from serving.contract.manifest import Manifest, ManifestError
from serving.engines.cpu import OnnxDecoder
from serving.pipeline.in_process import InProcessReader
from serving.pipeline.prompt import PromptError
from serving.pipeline.request import RequestError
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


def test_the_chain_in_one_process_answers_as_torch_and_refuses_as_the_server(engines):
    checkpoint, directory = engines["fid"]
    asked = [(f"w{i} w{i + 1}", [f"w{i + j} w{j}" for j in range(i + 1)], i + 3) for i in range(4)]
    with InProcessReader(directory, Limits(slots=2, max_new_tokens=12, default_max_new_tokens=5, max_passages=9)) as reader:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda a: reader.answer(a[0], a[1], max_new_tokens=a[2], min_new_tokens=a[2]), asked))
        for (question, passages, length), answer in zip(asked, found, strict=True):
            tokens = reader.prompt.encode(question, passages)
            ids, mask = (torch.from_numpy(array[None].astype(np.int64)) for array in (tokens.input_ids, tokens.attention_mask))
            wanted = checkpoint.reader.generate(ids, mask, length, min_new_tokens=length)
            assert answer.tokens == wanted.tokens[0] and len(answer.log_probs) == length
            assert answer.text == reader.prompt.text(answer.tokens) and max(answer.log_probs) <= 0
        assert len(reader.answer("w1", ["w2"], min_new_tokens=5).tokens) == 5
        titled = reader.answer("w1", ["w2"], ["w3 w4"], min_new_tokens=5)
        assert titled.log_probs != reader.answer("w1", ["w2"], min_new_tokens=5).log_probs
        with pytest.raises(RequestError, match="max_new_tokens: wanted 1 to 12, got 13"):
            reader.answer("w1", ["w2"], max_new_tokens=13)
        with pytest.raises(PromptError, match="question: "):
            reader.answer("w1 " * 30, ["w2"])


def test_an_error_of_the_decoder_reaches_who_asked(engines, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("the decoder broke")

    monkeypatch.setattr(OnnxDecoder, "step", broken)
    with InProcessReader(engines["fid"][1]) as reader, pytest.raises(RuntimeError, match="the decoder broke"):
        reader.answer("w1", ["w2"])


def test_a_changed_tokenizer_is_refused_before_anything_is_loaded(engines, tmp_path):
    shutil.copytree(engines["fid"][1], tmp_path / "fid")
    with (tmp_path / "fid" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ManifestError, match=r"tokenizer\.json: SHA-256"):
        InProcessReader(tmp_path / "fid")
