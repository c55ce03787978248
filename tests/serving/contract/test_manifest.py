"""Files are checked against the manifest, and the checked content is what is loaded; engines of another GPU are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

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
