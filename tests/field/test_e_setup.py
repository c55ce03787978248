"""Field section E, set-up: a Python that fits, what is checked before a download, no torch to serve, progress, missing guards."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export.build import build_reader
from export.errors import CheckpointError, UsageError
from export.graphs import templates
from serving.__main__ import READY
from serving.contract.limits import Limits
from serving.launcher.endpoints import free_ports
from serving.launcher.environment import missing_guards

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("set_up", ROOT / "deploy" / "set_up.py")
assert spec and spec.loader
set_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(set_up)


def pythons(folder: Path, **versions: str) -> str:
    """A folder with stand-ins for Python that say their version."""
    for name, version in versions.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\necho {version}\n")
        path.chmod(0o755)
    return str(folder)


def test_e1_an_older_python_on_the_path_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", pythons(tmp_path, **{"python3": "3 13", "python3.11": "3 11", "python3.10": "3 10"}))
    monkeypatch.setattr(set_up.sys, "executable", str(tmp_path / "python3"))
    assert set_up.find_python() == str(tmp_path / "python3.11")


def test_e1_without_a_fitting_python_one_line_says_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", pythons(tmp_path, python3="3 13", python="2 7"))
    monkeypatch.setattr(set_up.sys, "executable", str(tmp_path / "python3"))
    with pytest.raises(
        SystemExit, match=r"^error: Python: wanted 3\.10 to 3\.12, got \S+/python3 3\.13, \S+/python 2\.7; install"
    ) as stopped:
        set_up.find_python()
    assert "\n" not in str(stopped.value)


def test_e1_an_environment_of_a_python_without_wheels_is_refused(tmp_path, monkeypatch):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    pythons(tmp_path / "venv" / "bin", python="3 13")
    monkeypatch.setattr(sys, "argv", ["set_up.py", "serve", "--venv", str(tmp_path / "venv")])
    with pytest.raises(SystemExit, match=r"^error: \S+/venv: wanted Python 3\.10 to 3\.12, got 3\.13; remove the folder, or pass VENV="):
        set_up.main()


def test_e1_ray_gets_an_environment_of_its_own(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(set_up, "version_of", asked.append)
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    for name in ("offline", "serve"):
        monkeypatch.setattr(sys, "argv", ["set_up.py", name])
        with pytest.raises(SystemExit, match=r"^error: disk: "):
            set_up.main()
    assert asked == [str(ROOT / folder / "bin" / "python") for folder in (".venv-offline", ".venv")]


@pytest.mark.parametrize("damage", ["no pip", "its Python is gone"])
def test_e1_an_environment_that_is_half_made_is_mended(tmp_path, monkeypatch, damage):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if damage == "no pip" else []), str(venv)], check=True)
    set_up.stamp_of(venv, "serve").write_text("{}")
    if damage == "its Python is gone":
        for path in venv.glob("bin/python*"):
            path.unlink()
            path.symlink_to(tmp_path / "removed")
    interpreter = str(venv / "bin" / "python") if set_up.version_of(str(venv / "bin" / "python")) else set_up.find_python()
    set_up.make_environment(venv, interpreter)
    subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=True)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("Downloading numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.whl (18.3 MB)", ("numpy", 18.3)),
        ("  Downloading tqdm-4.67.1-py3-none-any.whl (78 kB)", ("tqdm", 0.078)),
        ("Using cached numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.whl (18.3 MB)", ("numpy", 0.0)),
        ("  Downloading numpy-1.26.4-cp311-cp311-manylinux_2_17_x86_64.whl.metadata (61 kB)", None),
        ("Collecting numpy==1.26.4", None),
    ],
)
def test_e4_what_pip_prints_is_counted(line, size):
    assert set_up._size_of(line) == size


@pytest.mark.parametrize(("libc", "named"), [(("glibc", "2.31"), r"glibc 2\.31"), (("", ""), "another C library")])
def test_e2_an_old_glibc_is_refused_before_anything_is_made(tmp_path, monkeypatch, libc, named):
    monkeypatch.setattr(set_up.platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(sys, "argv", ["set_up.py", "serve", "--venv", str(tmp_path / "venv")])
    with pytest.raises(SystemExit, match=rf"^error: glibc: wanted 2\.35 or later .*, got {named}.*TRITONSERVER"):
        set_up.main()
    assert not (tmp_path / "venv").exists()


def test_e2_a_server_of_the_user_s_own_is_not_checked(monkeypatch):
    monkeypatch.setattr(set_up.platform, "libc_ver", lambda: ("glibc", "2.31"))
    set_up.check_platform(own_server=True)


def test_e3_a_full_disk_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100_000_000))
    monkeypatch.setattr(sys, "argv", ["set_up.py", "serve", "--venv", str(tmp_path / "venv")])
    with pytest.raises(SystemExit, match=r"^error: disk: wanted 700 MB free in \S+, got 100 MB; free some"):
        set_up.main()
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("name", ["fid", "fido", "fido_converted"])
def test_e3_a_template_and_its_checkpoint_are_what_export_writes(name, tmp_path):
    exported = build_reader(str(ROOT / "checkpoints" / name), tmp_path / "exported", "onnxruntime", Limits())
    filled = templates.fill_template(ROOT / "checkpoints" / name, tmp_path / "filled")
    assert filled.files == exported.files and filled.weights_sha256 == exported.weights_sha256
    assert (filled.sizes, filled.prompt, filled.reader) == (exported.sizes, exported.prompt, exported.reader)


def test_e3_a_template_of_other_weights_is_refused(tmp_path):
    for file in (templates.TEMPLATE_FILE, "tokenizer.json"):
        shutil.copy(ROOT / "checkpoints" / "fid" / file, tmp_path)
    shutil.copy(ROOT / "checkpoints" / "fido" / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"graphs\.json\.xz: does not fit model\.safetensors"):
        templates.fill_template(tmp_path, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(("options", "engine"), [({"passage_length": 64}, "auto"), ({}, "tensorrt")])
def test_e3_without_torch_what_no_template_holds_is_refused(tmp_path, monkeypatch, options, engine):
    monkeypatch.setattr("export.build.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs torch.*make export"):
        build_reader(str(ROOT / "checkpoints" / "fid"), tmp_path / "engines", engine, Limits(), options=options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """`make demo` in a copy of the tree without anything installed, and with nothing in pip's cache."""
    copy = tmp_path_factory.mktemp("clone")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, copy / file)
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    env["PIP_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    env["PATH"] = os.pathsep.join(folder for folder in env["PATH"].split(os.pathsep) if folder != str(Path(sys.prefix, "bin")))
    done = subprocess.run(["make", "demo", f"PYTHON={sys.executable}"], cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy, done.stdout


@pytest.mark.server
@pytest.mark.slow
def test_e3_a_fresh_clone_answers_without_torch(demo):
    copy, printed = demo
    assert printed.splitlines()[-1] == "demo: 6 of 6 answers right"
    packages = [path.name for path in copy.glob(".venv/lib/python3.*/site-packages/*")]
    assert "onnxruntime" in packages and not {"torch", "transformers", "onnx", "scipy"} & {*packages}
    cost = json.loads((copy / ".venv/.serve").read_text())
    assert cost["on_disk_mb"] < 500 and f"{cost['downloaded_mb']} MB downloaded" in printed


@pytest.mark.server
@pytest.mark.slow
def test_e4_set_up_and_export_say_what_they_do(demo):
    _, printed = demo
    lines = printed.splitlines()
    assert any(re.fullmatch(r"  nvidia_pytriton +\d+\.\d MB", line) for line in lines)
    assert any(re.fullmatch(r"set-up: serve: \d+ packages, \d+ MB downloaded, \d+ MB in \.venv, \d+ s", line) for line in lines)
    assert sum(" exported, onnxruntime float32, " in line for line in lines) == 2


@pytest.mark.parametrize(("smallest", "lines"), [(0, ["encoder.onnx", "cross_kv.onnx", "decoder_step.onnx"]), (20_000_000, [])])
def test_e4_a_long_export_says_the_stage_that_it_is_at(tmp_path, monkeypatch, caplog, smallest, lines):
    monkeypatch.setattr("export.graphs.onnx_export.SLOW_PARAMETERS", smallest)
    with caplog.at_level("INFO", logger="export"):
        build_reader(str(ROOT / "checkpoints" / "fid"), tmp_path / "engines", "onnxruntime", Limits())
    assert [re.sub(r"^ +\d+ s: ", "", record.getMessage()) for record in caplog.records] == lines


def test_e6_guards_that_are_missing_are_named_with_their_risk(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    set_up.compile_guards(tmp_path)
    wanted = "set-up: no C compiler, so without heap_trim, stream_locks, readiness (`make serve` names the risks)\n"
    assert capsys.readouterr().out == wanted
    assert missing_guards([]) == [
        "without heap_trim: its memory may grow for hours",
        "without stream_locks: a cancelled gRPC stream may stop all streams, until the next restart",
        "without readiness: it says that it is ready while it answers its last questions",
    ]


@pytest.mark.server
@pytest.mark.slow
def test_e6_ready_warns_of_missing_guards(demo):
    copy, _ = demo
    for library in copy.glob(".venv/lib/lib*.so"):
        library.unlink()
    ports = [f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True)]
    command = [copy / ".venv/bin/python", "-m", "serving", "--repository", "build/demo/model_repository", "--readers", "fido", *ports]
    with subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout
        printed = []
        while not printed or (printed[-1] and printed[-1] != f"{READY}\n"):
            printed.append(serving.stdout.readline())
        serving.send_signal(signal.SIGINT)
        serving.communicate()
    assert [line.split(":")[0] for line in printed[-4:-1]] == [
        f"warning    without {name}" for name in ("heap_trim", "stream_locks", "readiness")
    ]
    assert printed[-1] == f"{READY}\n" and serving.returncode == 0
