"""Files are checked against the manifest, and the checked content is what is loaded; engines of another GPU are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from serving.contract import versions
from serving.contract.gemms import StackSizes
from serving.contract.library_kernels import Choice, EncoderKernel, EncoderLibrary, Tiling
from serving.contract.manifest import BuildTarget, EngineBuild, EngineError, Manifest, ManifestError, Prompt, require_bf16
from serving.contract.tensors import EngineSizes

FILES = {"encoder.onnx": b"graph", "encoder.onnx.data": b"weights above 2 GB", "encoder.wi.plan": b"plan"}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    sizes = EngineSizes(8, 8, 1, (0,), 1, 1, 8, 97)
    return Manifest("fid", "onnxruntime", "float32", sizes, Prompt("{question}", 8, True), 0, 1, 0, hashes, "0" * 64, {})


def test_every_file_is_accepted_as_it_was_written(manifest: Manifest, tmp_path: Path) -> None:
    manifest.verify(tmp_path, tuple(FILES))
    assert manifest.read(tmp_path, "encoder.wi.plan") == b"plan"


@pytest.mark.parametrize("file", ["encoder.onnx", "encoder.onnx.data"])
def test_a_graph_is_checked_with_its_external_data(manifest: Manifest, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(FILES[file][::-1])
    with pytest.raises(ManifestError, match=f"{file}: SHA-256 wanted [0-9a-f]{{16}}..., got "):
        manifest.verify(tmp_path, ("encoder.onnx",))
    (tmp_path / file).unlink()
    with pytest.raises(ManifestError, match=f"{file}: missing"):
        manifest.verify(tmp_path, ("encoder.onnx",))


def test_all_faults_are_named_at_once(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").unlink()
    (tmp_path / "encoder.wi.plan").write_bytes(b"another")
    with pytest.raises(ManifestError) as caught:
        manifest.verify(tmp_path, ("encoder.onnx", "encoder.wi.plan", "decoder.wi.plan"))
    for said in ("encoder.onnx: missing", "encoder.wi.plan: SHA-256", "decoder.wi.plan: not in manifest.json"):
        assert said in str(caught.value)


@pytest.mark.parametrize("fault", ["altered", "missing", "unknown", "a directory"])
def test_read_gives_verified_content_only(manifest: Manifest, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "encoder.wi.plan"
    if fault == "altered":
        path.write_bytes(b"plam")
    elif fault in ("missing", "a directory"):
        path.unlink()
    if fault == "a directory":
        path.mkdir()
    name = "decoder.wi.plan" if fault == "unknown" else path.name
    said = {"altered": "SHA-256 wanted", "missing": "missing", "unknown": "not in manifest.json", "a directory": "cannot be read"}[fault]
    with pytest.raises(ManifestError, match=f"{name}: {said}"):
        manifest.read(tmp_path, name)


@pytest.mark.parametrize("file", ["encoder.onnx", "encoder.onnx.data"])
@pytest.mark.parametrize("change", ["replaced", "written to", "removed"])
def test_a_file_that_changes_between_check_and_load_is_refused(manifest: Manifest, tmp_path: Path, file: str, change: str) -> None:
    path = tmp_path / file
    with pytest.raises(ManifestError, match=f"{file}: (replaced or written to while it was loaded|missing)"):
        with manifest.verified(tmp_path, ("encoder.onnx",)):
            if change == "replaced":  # as a new export does, here even with the same size and time
                state = path.stat()
                other = tmp_path / "other"
                other.write_bytes(FILES[file][::-1])
                os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
                other.replace(path)
            elif change == "written to":
                path.write_bytes(b"longer than before, so that no clock matters")
            else:
                path.unlink()


def test_an_error_of_the_load_is_not_replaced(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), manifest.verified(tmp_path, ("encoder.onnx",)):
        (tmp_path / "encoder.onnx").unlink()
        raise ZeroDivisionError


def test_an_engine_of_another_gpu_or_tensorrt_is_refused_by_name() -> None:
    build = EngineBuild("NVIDIA H200", "9.0", "8.6.0", {}, {})
    build.require_target("fid/encoder.plan", BuildTarget("NVIDIA H200", "9.0", "8.6.0"))
    with pytest.raises(EngineError) as caught:
        build.require_target("fid/encoder.plan", BuildTarget("NVIDIA L4", "8.9", "10.4.0"))
    for said in ("fid/encoder.plan", "NVIDIA H200", "NVIDIA L4", "8.9", "10.4.0", "make export ENGINE=tensorrt"):
        assert said in str(caught.value)
    with pytest.raises(EngineError, match=r"TensorRT: built for 8\.6\.0, here 10\.4\.0; ") as caught:
        build.require_target("fid/encoder.plan", BuildTarget("NVIDIA H200", "9.0", "10.4.0"))
    assert "GPU" not in str(caught.value)


def test_a_build_survives_its_json() -> None:
    build = EngineBuild("GPU", "9.0", "8.6.0", {"encoder.plan": [{"input_ids": ((1, 1), (4, 8), (4, 8))}]}, {"encoder.plan": 1.5})
    assert EngineBuild.from_dict(json.loads(json.dumps(dataclasses.asdict(build)))) == build


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_bf16_is_accepted_where_a_cpu_multiplies_it(tmp_path: Path, flag: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: fpu {flag} avx2\n\nprocessor\t: 1\n")
    require_bf16("reader", tmp_path / "cpuinfo")


def test_bf16_is_refused_by_name_where_it_would_be_emulated(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Old CPU\nflags\t\t: avx512f avx512_vnni\n\nmodel name\t: x\nflags\t: amx_bf16\n")
    with pytest.raises(EngineError, match=r"reader: bf16: wanted a CPU with avx512_bf16 or amx_bf16, got Old CPU .*PRECISION=fp32"):
        require_bf16("reader", tmp_path / "cpuinfo")
    with pytest.raises(EngineError, match="got an unknown CPU"):
        require_bf16("reader", tmp_path / "missing")


def test_a_manifest_survives_its_file(manifest: Manifest, tmp_path: Path) -> None:
    stack = StackSizes(8, 1, 1, 1, 8, 16, True, 1e-6)
    library = EncoderLibrary(
        "sm_90a", "float8", "float16", (Choice(0, EncoderKernel("qkv", "float8", Tiling(128, 192, 2, pingpong=True))),)
    )
    build = EngineBuild("GPU", "9.0", "8.6.0", {"encoder.plan": [{"input_ids": ((1, 1), (4, 8), (4, 8))}]}, {"encoder.plan": 1.5})
    some: dict[str, Any] = {"encoder": stack, "build": build}
    others: dict[str, Any] = {"decoder": stack, "encoder_library": library, "cross_kv_precision": "float8"}
    for parts in ({}, some, others):
        full = dataclasses.replace(manifest, **parts)
        (tmp_path / "manifest.json").write_text(full.to_json())
        assert Manifest.load(tmp_path) == full


def test_a_manifest_that_cannot_be_used_says_why_and_what_to_do(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"

    def refused() -> str:
        with pytest.raises(ManifestError, match=rf"^{path}: .*`make export` makes") as caught:
            Manifest.load(tmp_path)
        return str(caught.value).removeprefix(f"{path}: ")

    assert refused().startswith("missing; ")
    path.mkdir()
    assert refused().startswith("unreadable (")
    path.rmdir()
    fields = json.loads(manifest.to_json())
    for content, said in (
        ("{", "unreadable ("),
        ("[]", "format: wanted 4, got None"),
        (json.dumps({**fields, "format": 3}), "format: wanted 4, got 3"),
        (json.dumps({**fields, "eos_token_id": 2}), "its SHA-256: wanted "),
        (json.dumps({name: value for name, value in fields.items() if name != "sha256"}), "its SHA-256: wanted None, got "),
        (dataclasses.replace(manifest, sizes={"cross_attention_layers": []}).to_json(), "other fields than wanted ("),  # type: ignore[arg-type]
        (dataclasses.replace(manifest, sizes={}).to_json(), "other fields than wanted ("),  # type: ignore[arg-type]
    ):
        path.write_text(content)
        assert refused().startswith(said)


@pytest.mark.parametrize(
    ("engine", "file", "on_gpu"),
    [("onnxruntime", "encoder.onnx", False), ("onnxruntime-gpu", "encoder.onnx", True), ("tensorrt", "encoder.plan", True)],
)
def test_the_backend_decides_where_an_engine_runs_and_how_its_file_is_called(
    manifest: Manifest, engine: str, file: str, on_gpu: bool
) -> None:
    found = dataclasses.replace(manifest, engine=engine)
    assert (found.engine_file("encoder"), found.on_gpu) == (file, on_gpu)


def test_a_prompt_is_its_template_and_its_head_is_all_before_what_may_be_cut() -> None:
    plain = Prompt("q: {question} t: {title} c: {context}", 8, True)
    assert plain.text("Q", "T", "C") == "q: Q t: T c: C" and plain.text("Q", "", "C") == "q: Q t:  c: C"
    assert plain.head("Q", "T") == plain.head("Q", "") == "q: Q t: "
    untitled = dataclasses.replace(plain, template_without_title="{question}: {context}")
    assert untitled.text("Q", "T", "C") == "q: Q t: T c: C" and untitled.text("Q", "", "C") == "Q: C"
    assert untitled.head("Q", "T") == "q: Q t: " and untitled.head("Q", "") == "Q: "
    assert Prompt("only {question}", 8, True).head("Q", "") == "only Q"


# Which versions go together.


@pytest.mark.parametrize(
    ("tensorrt", "first", "last"),
    [("8.6.1", (3, 6), (3, 10)), ("10.0", (3, 10), (3, 13)), ("10.14.1.48", (3, 10), (3, 13)), ("11.4", (3, 10), (3, 14))],
)
def test_a_compiler_takes_the_pythons_from_its_first_to_its_last(tensorrt, first, last):
    family = versions.compiler_of(tensorrt)
    assert family is not None and first in family.python and (*last, 7) in family.python
    assert (first[0], first[1] - 1) not in family.python and (last[0], last[1] + 1) not in family.python
    assert ("bfloat16" in family.precisions) == (family.typing == "strong") == (tensorrt[0] != "8")


@pytest.mark.parametrize("version", ["8.5", "8.7", "9.0", "12.1", "", "x"])
def test_other_compilers_belong_to_no_family(version):
    assert versions.compiler_of(version) is None


def test_a_work_around_is_needed_until_its_version_and_where_the_version_is_unknown():
    assert all(work_around.needed(None) for work_around in versions.WORK_AROUNDS)
    assert versions.NUMPY_1.needed((2, 51)) and versions.NUMPY_1.needed((2, 52, 9)) and not versions.NUMPY_1.needed((2, 53))
    assert versions.STREAM_LOCKS.needed((2, 99))
