"""TritonServer against a stand-in of tritonserver."""

from __future__ import annotations

import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.launcher import installation, log, multi_process
from serving.launcher.endpoints import PortError, free_ports
from serving.launcher.installation import ServerError, find_installation
from serving.launcher.server import START_ATTEMPTS, TritonServer
from tests.serving.launcher.stand_in import ends_within, install_stand_in, write_models


def failure_within(server: TritonServer, seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while (failure := server.failure()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return failure


def test_a_native_encoder_has_no_process_and_is_not_missed(tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch)
    repository = write_models(tmp_path / "repository", fid_encoder="tensorrt", fid="python")
    with TritonServer(["fid_encoder", "fid"], repository) as server:
        time.sleep(0.3)
        assert server.failure() is None
        assert set(server.model_processes()) == {"tritonserver", "fid"}
        os.kill(server.model_processes()["fid"], signal.SIGKILL)
        assert failure_within(server, 5) == "the process of fid has died"


def test_a_python_model_whose_process_never_came_is_missed(tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch, "repository.joinpath('fid_encoder').unlink()")
    repository = write_models(tmp_path / "repository", fid_encoder="python", fid="python")
    with TritonServer(["fid_encoder", "fid"], repository) as server:
        time.sleep(0.3)
        assert server.failure() == "the process of fid_encoder has died"


def test_stopping_ends_every_process_and_removes_regions_and_scratch(tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch, "open('/dev/shm/' + sys.argv[3].rpartition('=')[2] + 'x', 'w')")
    repository = write_models(tmp_path / "repository", fid="python")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with TritonServer(["fid"], repository) as server:
        pids, prefix = set(server.model_processes().values()), server.shm_prefix
        scratch = server.log.parent
        assert Path(f"/dev/shm/{prefix}x").exists()
    assert scratch.name.startswith("fido-triton-") and not scratch.exists()
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert all(ends_within(pid, 2) for pid in pids)


def test_a_failed_start_quotes_the_first_fault_and_its_log_is_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MAX_FILE_BYTES", 1 << 16)
    lines = "print('E1124 13:38:36.1 8 x.cc:1] \"the cause\"'); [print('x' * 99) for _ in range(20_000)]; sys.stdout.flush(); sys.exit(3)"
    install_stand_in(tmp_path, monkeypatch, lines)
    repository = write_models(tmp_path / "repository", fid="python")
    with pytest.raises(ServerError, match="ended with code 3") as caught, TritonServer(["fid"], repository, log=tmp_path / "log" / "a.log"):
        pass
    assert "the cause" in str(caught.value) and len(str(caught.value)) < 5_000
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) <= (log.OLD_FILES + 1) * log.MAX_FILE_BYTES


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch)
    repository = write_models(tmp_path / "repository", fid="python")
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"--log .*/file/a.log: cannot be written"):
        TritonServer(["fid"], repository, log=tmp_path / "file" / "a.log").__enter__()


@pytest.mark.parametrize(("how", "starts"), [("os.abort()", START_ATTEMPTS), ("sys.exit(1)", 1)])
def test_a_start_that_triton_aborts_is_tried_again_and_one_that_it_refuses_is_not(tmp_path, monkeypatch, how, starts):
    counted = tmp_path / "starts"
    install_stand_in(tmp_path, monkeypatch, f"open({str(counted)!r}, 'a').write('x'); {how}")
    repository = write_models(tmp_path / "repository", fid="python")
    with pytest.raises(ServerError, match="before it was ready"), TritonServer(["fid"], repository):
        pass
    assert counted.read_text() == "x" * starts


def test_a_port_that_another_server_takes_at_the_last_moment_is_named(tmp_path, monkeypatch):
    """Our check has passed by then; Triton's own message says a socket is in use, not whose option it is."""
    install_stand_in(tmp_path, monkeypatch, "print('error: Socket already in use', flush=True); sys.exit(1)")
    repository = write_models(tmp_path / "repository", fid="python")
    server = TritonServer(["fid"], repository, ports := tuple(free_ports(3)))
    with socket.socket() as other:
        start = server._start

        def start_and_lose_the_port() -> None:
            start()
            other.bind(("127.0.0.1", ports[1]))
            other.listen()

        monkeypatch.setattr(server, "_start", start_and_lose_the_port)
        with pytest.raises(PortError, match=f"--grpc-port {ports[1]}: another process listens"):
            server.__enter__()


def installed_as_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str = "", version: str = "2.71.0\n") -> Path:
    """A stand-in in the layout of NVIDIA's builds, whose binary is reached by a link."""
    root = tmp_path / "opt"
    (root / "bin").mkdir(parents=True)
    stub = root / "backends" / "python" / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"\x7fELF..libpython3.%d.so.1.0\0" % sys.version_info[1])
    if version:
        (root / "TRITON_VERSION").write_text(version)
    install_stand_in(root / "bin", monkeypatch, before)
    (tmp_path / "link").symlink_to(root / "bin" / "tritonserver")
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "link"))
    return root


def test_a_server_given_by_path_has_its_backends_beside_it(tmp_path, monkeypatch):
    root = installed_as_a_tree(tmp_path, monkeypatch, f"open({str(tmp_path / 'arguments')!r}, 'w').write(chr(10).join(sys.argv))")
    with TritonServer(["fid"], write_models(tmp_path / "repository", fid="python")) as server:
        assert f"--backend-directory={root / 'backends'}" in (tmp_path / "arguments").read_text().splitlines()
        assert server.triton == (2, 71, 0)


def test_a_server_without_backends_beside_it_looks_where_it_was_built_to(tmp_path, monkeypatch):
    install_stand_in(tmp_path, monkeypatch)
    assert find_installation().backends is None


def test_a_backend_of_another_python_is_refused(tmp_path, monkeypatch):
    root = installed_as_a_tree(tmp_path, monkeypatch)
    (root / "backends/python/triton_python_backend_stub").write_bytes(b"libpython3.99.so.1.0\0")
    with pytest.raises(ServerError, match=r"triton_python_backend_stub: built for Python 3\.99, this is 3\.\d+; .*PYTHON=python3\.99"):
        find_installation()


@pytest.mark.parametrize("file", ["2.51.0\n", ""], ids=["a file says it", "only the running server says it"])
def test_numpy_2_is_refused_for_an_old_server_whoever_tells_its_version(tmp_path, monkeypatch, file):
    starts = tmp_path / "starts"
    before = f"""open({str(starts)!r}, 'a').write('x'); v2 = '{{"version": "2.51.0"}}'"""
    installed_as_a_tree(tmp_path, monkeypatch, before, file)
    monkeypatch.setattr(installation.importlib.metadata, "version", lambda _: "2.4.0")
    with pytest.raises(ServerError, match=r"numpy: wanted 1\.26 for Triton 2\.51\.0, got 2\.4\.0"):
        TritonServer(["fid"], write_models(tmp_path / "repository", fid="python")).__enter__()
    assert starts.exists() != bool(file)


def test_an_old_server_that_others_can_reach_is_warned_of(tmp_path, monkeypatch, capsys):
    from serving import __main__ as command

    monkeypatch.setattr(command, "reader_table", lambda _: [])
    for triton, address, warned in (((2, 51), "0.0.0.0", True), ((2, 51), "127.0.0.1", False), ((2, 71, 0), "0.0.0.0", False)):
        server = TritonServer([], tmp_path, address=address)
        server.triton = triton
        monkeypatch.setattr(command, "served_reader", lambda *_: SimpleNamespace(name="fid", why=""))
        command.announce(server, ["fid"])
        server.stop()
        assert ("warning    Triton 2.51 on 0.0.0.0: some requests end it" in capsys.readouterr().out) == warned


def test_the_library_path_with_a_blank_reaches_the_server_whole(tmp_path, monkeypatch):
    from serving.launcher import environment

    folder = tmp_path / "with blank"
    folder.mkdir()
    (folder / "libheap_trim.so").write_bytes(b"no library, but the loader only warns")
    monkeypatch.setattr(environment, "HEAP_TRIM", folder / "libheap_trim.so")
    for name in ("STREAM_LOCKS", "READINESS"):
        monkeypatch.setattr(environment, name, tmp_path / "none.so")
    install_stand_in(tmp_path, monkeypatch, f"open({str(tmp_path / 'preload')!r}, 'w').write(os.environ.get('LD_PRELOAD', ''))")
    repository = write_models(tmp_path / "repository", fid="python")
    with TritonServer(["fid"], repository) as server:
        (library,) = (tmp_path / "preload").read_text().split()
        assert library.endswith("/libheap_trim.so") and " " not in library
        assert Path(library).read_bytes().startswith(b"no library")
        assert [line.split(":")[0] for line in server.missing_guards] == ["without stream_locks", "without readiness"]


def test_servers_that_start_together_ask_sysconfig_one_at_a_time(monkeypatch):
    """It fills its table at the first question; a second thread found it empty, and said that libpython is missing."""
    inside, most, real = [0], [0], sysconfig.get_config_var

    def get_config_var(name):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        inside[0] -= 1
        return real(name)

    monkeypatch.setattr(installation.sysconfig, "get_config_var", get_config_var)
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setattr(installation, "CONTAINER_SERVER", Path("/nowhere"))
    threads = [threading.Thread(target=installation.find_installation) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


CONTROL = """#!{python}
import os, pathlib, signal, sys, time
pipes = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
asked = " ".join(sys.argv[1:]) or sys.stdin.read().strip()
with open({calls!r}, "a") as calls:
    print(asked, os.environ.get("CUDA_VISIBLE_DEVICES"), file=calls)
if asked == "get_server_list":
    print({servers!r})
if sys.argv[1:] == ["-f"]:
    {before}
    (pipes / "control").touch()
    time.sleep(600)
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts a stand-in of the multi-process service's program on the path, and makes every reader one for a GPU; the file of its calls."""

    def install(before: str = "", servers: str = "4711") -> Path:
        program, calls = tmp_path / "bin" / multi_process.CONTROL, tmp_path / "calls"
        program.parent.mkdir()
        program.write_text(CONTROL.format(python=sys.executable, calls=str(calls), before=before or "pass", servers=servers))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr("serving.launcher.server.on_gpu", lambda repository: True)
        monkeypatch.setattr(multi_process, "PROBE", "import os; os.environ['CUDA_MPS_PIPE_DIRECTORY']")
        return calls

    return install


def variables_of(pid: int) -> dict[str, str]:
    return dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in line)


def test_a_gpu_server_has_a_multi_process_service_of_its_own_and_ends_it(tmp_path, monkeypatch, control):
    calls = control()
    install_stand_in(tmp_path, monkeypatch)
    repository = write_models(tmp_path / "repository", fid="python")
    with TritonServer(["fid"], repository, variables={"CUDA_VISIBLE_DEVICES": "1"}) as server:
        pipes = Path(variables_of(server.process.pid)["CUDA_MPS_PIPE_DIRECTORY"])
        assert (pipes / "control").exists() and pipes.is_relative_to(server.log.parent)
        assert variables_of(server.model_processes()["fid"])["CUDA_VISIBLE_DEVICES"] == "1"
    # the daemon sees all GPUs: it would number those that it sees anew
    assert calls.read_text().splitlines() == ["-f None", "get_server_list None", "quit -t 5 None"]
    assert not pipes.exists()


@pytest.mark.parametrize("fault", ["daemon", "clients", "connection", "chosen", "off"])
def test_a_gpu_server_does_without_a_multi_process_service_that_fails_or_is_not_wanted(tmp_path, monkeypatch, control, fault):
    calls = control("sys.exit(1)" if fault == "daemon" else "", "" if fault == "connection" else "4711")
    if fault == "clients":
        monkeypatch.setattr(multi_process, "PROBE", "raise SystemExit(805)")
    if fault == "chosen":
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere/else")
    install_stand_in(tmp_path, monkeypatch)
    with TritonServer(["fid"], write_models(tmp_path / "repository", fid="python"), multi_process=fault != "off") as server:
        assert variables_of(server.process.pid).get("CUDA_MPS_PIPE_DIRECTORY") == ("/somewhere/else" if fault == "chosen" else None)
    assert calls.exists() == (fault in ("daemon", "clients", "connection"))
