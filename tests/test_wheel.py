"""The project's wheel holds every module and data file, and serving and asking need none of the packages of export and training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("serving", "clients", "export", "perf", "training", "examples")

# Imports every module of the wheel while the packages of export, training and the GPU are hidden; prints the imports that failed.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
target, *packages = sys.argv[1:]
sys.path.insert(0, target)
hidden = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "bm25s", "matplotlib", "cupy", "tensorrt", "openvino")
sys.modules.update(dict.fromkeys((*hidden, "triton_python_backend_utils")))
failed, outside, names = {}, [], []
for package in packages:
    found = importlib.import_module(package)
    names += [package, *(info.name for info in pkgutil.walk_packages(found.__path__, package + "."))]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        failed[name] = error.name
    else:
        outside += [] if module.__file__.startswith(target) else [module.__file__]
print(json.dumps({"failed": failed, "outside": outside, "names": names}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of the tracked files, installed into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in tracked:
        if (name.startswith(PACKAGES) and not name.startswith("perf/results/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(target.parent / "wheels"), str(source)],
        [*pip, "install", "--no-deps", "--no-index", "--find-links", str(target.parent / "wheels"), "-t", str(target), "fido-on-triton"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=source)
        assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def imports(installed, tmp_path_factory) -> dict:
    command = [sys.executable, "-c", IMPORT_ALL, str(installed), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_wheel_has_every_module_and_nothing_comes_from_elsewhere(imports):
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert set(imports["names"]) == modules
    assert imports["outside"] == []


@pytest.mark.slow
def test_servers_and_clients_import_without_torch(imports):
    optional = {
        "serving.triton": "triton_python_backend_utils",
        "serving.engines.gpu": "cupy",
        "serving.engines.gpu.tensorrt": "tensorrt",
        "serving.engines.whole": "cupy",
        "serving.engines.openvino": "openvino",
    }
    packages = {"haystack": "haystack", "langchain": "langchain_core", "llama_index": "llama_index", "pyterrier": "pandas"}
    frameworks = {f"clients.fido_client.integrations.{name}": package for name, package in packages.items()}
    optional |= frameworks
    for name, missing in imports["failed"].items():
        if name.startswith(("serving", "clients", "examples")):
            allowed = {package for prefix, package in optional.items() if name.startswith(prefix)}
            assert missing in allowed, f"{name} needs {missing}"
    assert {name for name in imports["failed"] if name.startswith("clients")} <= set(frameworks)


@pytest.mark.slow
def test_the_wheel_has_the_files_that_its_modules_read(installed):
    for pattern in ("serving/engines/gpu/cuda/*.cu*", "serving/launcher/preload/*.c", "training/data/*.json", "examples/*.html"):
        expected = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
        assert expected and [name for name in expected if not (installed / name).is_file()] == []
