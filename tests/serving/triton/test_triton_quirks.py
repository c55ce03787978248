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

from examples.demo import READERS
from export.repository import configs_of, model_names, reader_config, render_config
from serving.contract import versions
from serving.contract.limits import Limits
from serving.contract.tensors import READER_TENSORS, EngineSizes
from serving.launcher import installation
from serving.launcher.installation import ServerError
from serving.pipeline.request import RequestError, read_request

ROOT = Path(__file__).parents[3]
SERVING = {path.name: path.read_text() for path in (ROOT / "serving").rglob("*.py")}
assert len(SERVING) > 20, "the tests below would look at nothing"
SIZES = EngineSizes(768, 768, 12, (5, 11), 12, 1, 64, 32128)
CONFIGS = {
    model_names(reader)[role]: render_config(fields)
    for reader in READERS
    for on_gpu in (False, True)
    for role, fields in configs_of(reader, SIZES, Limits(), on_gpu=on_gpu).items()
}


def test_numpy_2_returns_empty_outputs_and_is_refused(monkeypatch):
    """Up to Triton 2.52; 2.71 was seen to work with NumPy 2.4."""
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.1.0")
    for triton in ((2, 51), (2, 52, 0)):
        with pytest.raises(ServerError, match=rf"numpy: wanted 1.26 for Triton {versions.dotted(triton)}, got 2.1.0: .*empty outputs"):
            installation.require_supported(triton)
    installation.require_supported((2, 71, 0))
    installation.require_supported(None)
    with pytest.raises(ServerError, match=r"Triton: wanted 2\.51 or later, got 2\.50\.0"):
        installation.require_supported((2, 50, 0))


def test_every_work_around_names_what_retires_it():
    for work_around in versions.WORK_AROUNDS:
        file, separator, name = work_around.retired_by.partition("::")
        if separator:
            assert f"\ndef {name}(" in (ROOT / file).read_text(), work_around
        else:
            target, module, setting = re.fullmatch(r"make (\w+), with (\w+) = \S+ in (\S+)", work_around.retired_by).group(1, 3, 2)
            assert f"\n{target}: " in (ROOT / "Makefile").read_text() and f"\n{setting} = " in (ROOT / module).read_text()
    needed_by = {triton: [w.name for w in versions.WORK_AROUNDS if w.needed(triton)] for triton in ((2, 51, 0), (2, 71, 0), None)}
    assert needed_by[2, 51, 0] == needed_by[None] and set(needed_by[None]) - set(needed_by[2, 71, 0]) == {versions.NUMPY_1.name}


def test_the_documentation_has_the_tables_of_versions():
    operating, gpu, reliability = ((ROOT / "docs" / page).read_text() for page in ("operating.md", "gpu.md", "reliability.md"))
    assert versions.platform_table() in operating and versions.compiler_table() in gpu and versions.work_around_table() in reliability
    assert f"`{versions.CONTAINER_TAGS.split()[0]}`" in operating


def test_requirements_and_package_agree_with_the_table_of_versions():
    """The pins are for the wheel's Python versions, and others for those that only a server of the user's own has."""
    first, last = versions.OWN.python.first, versions.OWN.python.last
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={versions.dotted(first)},<3.{last[1] + 1}"' in project
    pins = dict(re.findall(r"^numpy==(\S+); python_version (\S+ \S+)$", (ROOT / "requirements.txt").read_text(), re.M))
    by_python = {python.replace('"', ""): versions.version_of(pin) for pin, python in pins.items()}
    beyond = f"3.{versions.WHEEL.python.last[1] + 1}"
    assert by_python[f"< {beyond}"] in versions.WHEEL.numpy
    assert by_python[f">= {beyond}"] in versions.OWN.numpy and by_python[f">= {beyond}"] not in versions.WHEEL.numpy
    wheel = re.search(r"^nvidia-pytriton==(\S+)$", (ROOT / "requirements-triton.txt").read_text(), re.M)
    assert wheel and wheel[1] == "0.7.0", "another wheel: its Triton's version goes into versions.WHEEL"


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [
        (versions.Span((2, 51), (2, 51)), ["2.51", "2.51.9"], ["2.50.9", "2.52"]),
        (versions.Span((1, 26), (2,)), ["1.26.4", "2.0", "2.5.5"], ["1.25", "3.0"]),
        (versions.Span((2, 53), None), ["2.53", "3"], ["2.52.9"]),
    ],
)
def test_a_span_holds_all_patches_of_its_last_version(span, inside, outside):
    assert [text for text in (*inside, *outside) if versions.version_of(text) in span] == inside


def test_tensorrt_families_are_found_by_version():
    assert [
        c and versions.dotted(c.tensorrt.first) for c in map(versions.compiler_of, ("8.6.0", "8.5", "10.14.1.48", "11.4.0", "12.0"))
    ] == [
        "8.6",
        None,
        "10",
        "11",
        None,
    ]


def test_bls_to_a_decoupled_model_corrupts_memory_so_the_encoder_is_not_one():
    assert not re.search(r"exec\(.*decoupled|async_exec", "".join(SERVING.values()))
    for reader in READERS:
        assert "model_transaction_policy" not in CONFIGS[model_names(reader)["encoder"]]


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
    for model, text in CONFIGS.items():
        assert re.search(r"^max_batch_size: \d+$", text, re.M), model


def test_model_control_lets_clients_load_models_so_it_is_off():
    assert '"--model-control-mode=none"' in SERVING["server.py"]


def test_iterative_sequences_lose_cancelled_requests_so_the_loop_is_ours():
    assert not any("iterative_sequence" in text for text in CONFIGS.values())


def test_metrics_cost_a_message_each_so_no_step_sets_one():
    assert "pb_utils" not in SERVING["scheduler.py"]
    assert "Metric" not in SERVING["response.py"]
