"""Behaviours of Triton 2.51 that would bite: each is avoided by design, and a test here says which and holds it so.

Those that need the real server are in test_server.py: leftovers in shared memory (test_stopping_leaves_no_process_and_no_shared_memory),
cancelled requests that keep their place (test_a_cancelled_question_frees_its_slot_and_its_place). Cancelled streams that stop all streams
are in ../launcher/test_preload_sources.py, crashes and kills in tests/stress.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest

from export.repository import READERS, model_names, reader_config
from serving.contract.limits import Limits
from serving.contract.tensors import READER_TENSORS
from serving.launcher import installation
from serving.launcher.installation import ServerError
from serving.pipeline.request import RequestError, read_request

ROOT = Path(__file__).parents[3]
SERVING = {path.name: path.read_text() for path in (ROOT / "serving").rglob("*.py")}
assert len(SERVING) > 20, "the tests below would look at nothing"


def test_numpy_2_returns_empty_outputs_and_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.1.0")
    with pytest.raises(ServerError, match=r"numpy: wanted 1.26, got 2.1.0"):
        installation.require_numpy_1()


def test_bls_to_a_decoupled_model_corrupts_memory_so_the_encoder_is_not_one():
    assert not re.search(r"exec\(.*decoupled|async_exec", "".join(SERVING.values()))
    for reader in READERS:
        text = (ROOT / "model_repository" / model_names(reader)["encoder"] / "config.pbtxt").read_text()
        assert "model_transaction_policy" not in text


def test_the_response_cache_ignores_request_parameters_so_what_changes_an_answer_is_a_tensor():
    names = {spec.name for spec in READER_TENSORS.inputs}
    assert {"max_new_tokens", "min_new_tokens"} <= names
    # The one parameter decides whether there is an answer in time, not which. HTTP generate has no other place for it.
    tensors = {"question": np.array([b"q"], object), "passages": np.array([b"p"], object)}
    with_parameter = read_request(tensors, Limits(), {"timeout": 5})
    assert dataclasses.replace(with_parameter, timeout_us=0) == read_request(tensors, Limits())
    with pytest.raises(RequestError, match="max_new_tokens: wanted an input tensor"):
        read_request(tensors, Limits(), {"max_new_tokens": 5})
    assert "response_cache" not in reader_config("fid", Limits(), stream=False)


def test_a_missing_max_batch_size_is_completed_by_triton_so_zero_is_written():
    for path in (ROOT / "model_repository").glob("*/config.pbtxt"):
        assert re.search(r"^max_batch_size: \d+$", path.read_text(), re.M), path


def test_model_control_lets_clients_load_models_so_it_is_off():
    assert '"--model-control-mode=none"' in SERVING["server.py"]


def test_iterative_sequences_lose_cancelled_requests_so_the_loop_is_ours():
    assert not any("iterative_sequence" in path.read_text() for path in (ROOT / "model_repository").glob("*/config.pbtxt"))


def test_metrics_cost_a_message_each_so_no_step_sets_one():
    assert "pb_utils" not in SERVING["scheduler.py"]
    assert "Metric" not in SERVING["response.py"]
