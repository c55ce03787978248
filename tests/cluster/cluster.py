"""A Kubernetes cluster of two nodes on this machine: each has a kubelet, a containerd, a bridge and cgroups of its own.

Everything listens on loopback or on the bridges. Runs as root. What it changes on the machine is undone at its end, also after a failure,
and at the start of the next one if this process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .build import CACHE, PAUSE, BuildError

STATE = Path("/run/fido-cluster")  # a socket's path must be short
RUN = CACHE / "run"
CGROUPS = Path("/sys/fs/cgroup")
CGROUP = "fido-cluster"
NODES = ("node1", "node2")
API_PORT, ETCD_PORT, KUBELET_PORT = 16443, 12379, 20250
SERVICES, PODS = "10.96.0.0/24", "10.90.0.0/16"
SYSCTLS = ("net/ipv4/ip_forward", "net/ipv4/conf/all/route_localnet", "net/bridge/bridge-nf-call-iptables")
# The kubelet and the CNI plugins use these folders whatever they are told.
FIXED_FOLDERS = ("/var/lib/kubelet", "/var/lib/cni/results", "/var/log/pods", "/var/log/containers")
# Seconds until a silent node counts as lost, and until its pods are replaced. Kubernetes' defaults are 40 and 300.
NODE_GRACE_S, UNREACHABLE_S = 12, 5


class Cluster:
    """Two nodes and their control plane.

    Args:
        programs: folder of Kubernetes' programs.
        images: tar file with the images that the nodes hold.
        logs: folder for the output of every program.
    """

    def __init__(self, programs: Path, images: Path, logs: Path) -> None:
        self._programs, self._images, self._logs = programs, images, logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = _only_one()
        self.kubeconfig = RUN / "kubeconfig"

    def __enter__(self) -> Cluster:
        undo_leftovers()
        RUN.mkdir(parents=True)
        before = {"sysctls": _sysctls(), "entries": {folder: sorted(_entries(folder)) for folder in FIXED_FOLDERS}}
        (RUN / "before.json").write_text(json.dumps(before))
        shutil.rmtree(self._logs, ignore_errors=True)
        self._logs.mkdir(parents=True)
        try:
            self._start_control_plane()
            for node in NODES:
                self.start_node(node)
            _wait(lambda: self.ready_nodes() == set(NODES), 120, "two nodes that are ready")
            self._start("kube-proxy", *_flags(_PROXY, kubeconfig=self.kubeconfig))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        undo_leftovers()
        os.close(self._lock)

    def kubectl(self, *arguments: str, timeout_s: float = 300) -> str:
        """What kubectl prints. Raises BuildError with its complaint if it fails."""
        beside = Path(sys.executable).parent / "kubectl"
        program = str(beside) if beside.exists() else "kubectl"
        command = [program, "--kubeconfig", str(self.kubeconfig), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode != 0:
            raise BuildError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Objects of the default namespace."""
        return list(json.loads(self.kubectl("get", kind, "-o", "json"))["items"])

    def ready_nodes(self) -> set[str]:
        """Names of the nodes that are ready."""
        return {node["metadata"]["name"] for node in self.items("nodes") if is_ready(node)}

    def start_node(self, node: str) -> None:
        """Start a node, or start it again after `kill_node`."""
        index, state, folder = NODES.index(node) + 1, STATE / node, RUN / node
        for path in (state, folder / "cni"):
            path.mkdir(parents=True, exist_ok=True)
        _make_cgroups(f"{CGROUP}/{node}")
        _silence("--delete", node)
        (folder / "cni" / "10-bridge.conflist").write_text(json.dumps(_cni(node, index, folder)))
        (folder / "containerd.toml").write_text(_CONTAINERD.format(folder=folder, state=state, pause=PAUSE))
        (folder / "kubelet.json").write_text(json.dumps(_kubelet(node, index, folder)))
        self._start(f"containerd-{node}", shutil.which("containerd"), "--config", folder / "containerd.toml")
        socket = state / "containerd.sock"
        ctr = ["ctr", "--address", str(socket), "-n", "k8s.io"]
        _wait(lambda: subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode == 0, 30, f"containerd of {node}")
        if not (folder / "imported").exists():
            subprocess.run([*ctr, "images", "import", str(self._images)], check=True, stdout=subprocess.DEVNULL)
            (folder / "imported").touch()
        settings = {
            "kubeconfig": self.kubeconfig,
            "config": folder / "kubelet.json",
            "hostname-override": node,
            "root-dir": folder / "kubelet",
            "cert-dir": folder / "certificates",
            "container-runtime": "remote",
            "container-runtime-endpoint": f"unix://{socket}",
        }
        self._start(f"kubelet-{node}", *_flags({}, **settings))

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its network is silent at once, and all its processes are gone."""
        _silence("--insert", node)
        for name in (f"kubelet-{node}", f"containerd-{node}"):
            process = self._processes.pop(name)
            process.kill()
            process.wait()
        _kill_all(node)

    def processes(self, pod: dict[str, Any]) -> dict[int, str]:
        """Process ids of a pod's containers on this machine, and their command lines."""
        uid = pod["metadata"]["uid"]
        return {pid: _read(f"/proc/{pid}/cmdline").replace("\0", " ") for pid in _pids() if uid in _read(f"/proc/{pid}/cgroup")}

    def _start(self, name: str, *command: Any) -> None:
        program = [*map(str, command)] if not str(command[0]).startswith("--") else [str(self._programs / _base(name)), *map(str, command)]
        with (self._logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(program, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def _start_control_plane(self) -> None:
        token, key = os.urandom(16).hex(), RUN / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (RUN / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        self.kubeconfig.write_text(json.dumps(_kubeconfig(token)))
        self.kubeconfig.chmod(0o600)
        client, peer = (f"http://127.0.0.1:{port}" for port in (ETCD_PORT, ETCD_PORT + 1))
        urls = {"listen-client-urls": client, "advertise-client-urls": client, "listen-peer-urls": peer}
        urls |= {"initial-advertise-peer-urls": peer, "initial-cluster": f"default={peer}"}
        self._start("etcd", shutil.which("etcd"), *_flags({}, **{"data-dir": RUN / "etcd"}, **urls))
        files = {"service-account-key-file": key, "service-account-signing-key-file": key, "token-auth-file": RUN / "tokens.csv"}
        self._start("kube-apiserver", *_flags(_API, **files, **{"etcd-servers": client, "cert-dir": RUN / "certificates"}))
        _wait(self._answers, 60, "the API server")
        self._start("kube-controller-manager", *_flags(_CONTROLLERS, kubeconfig=self.kubeconfig))
        self._start("kube-scheduler", *_flags(_SCHEDULER, kubeconfig=self.kubeconfig))

    def _answers(self) -> bool:
        with contextlib.suppress(BuildError):
            return self.kubectl("get", "--raw", "/readyz") == "ok"
        return False


def is_ready(item: dict[str, Any]) -> bool:
    """Whether a node or a pod is ready, and is not about to end."""
    conditions = {each["type"]: each["status"] for each in item["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in item["metadata"]


def undo_leftovers() -> None:
    """End every process of the nodes, and remove mounts, bridges, rules, cgroups and files of a cluster that is over or was killed."""
    for node in NODES:
        _kill_all(node)
    for line in reversed(_read("/proc/mounts").splitlines()):
        if (place := line.split()[1]).startswith((str(RUN), str(STATE))):
            subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
    for node in NODES:
        subprocess.run(["ip", "link", "delete", _bridge(node)], check=False, capture_output=True)
    _remove_rules()
    for controller in CGROUPS.iterdir():
        for cgroup, _, _ in os.walk(controller / CGROUP, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(cgroup)
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((RUN / "before.json").read_text())
        for name, value in before["sysctls"].items():
            (Path("/proc/sys") / name).write_text(value)
        for place, names in before["entries"].items():
            for name in _entries(place) - set(names):
                _remove(Path(place) / name)
            if not names:
                with contextlib.suppress(OSError):
                    os.rmdir(place)
    for folder in (STATE, RUN):
        shutil.rmtree(folder, ignore_errors=True)
    if RUN.exists():
        raise BuildError(f"{RUN}: wanted to remove it, and could not: is something mounted there? See /proc/mounts")


def _kill_all(node: str) -> None:
    """End all processes in the node's cgroups, its container shims, and what a killed test left of its kubelet and containerd."""
    deadline = time.monotonic() + 30
    marks = (str(STATE / node), str(RUN / node))
    while pids := [pid for pid in _pids() if _belongs(pid, node, marks)]:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise BuildError(f"{node}: wanted no process, got {pids} after 30 s")
        time.sleep(0.1)


def _belongs(pid: int, node: str, marks: tuple[str, ...]) -> bool:
    if pid == os.getpid() or "State:\tZ" in _read(f"/proc/{pid}/status"):
        return False
    words = _read(f"/proc/{pid}/cmdline").split("\0")
    ours = Path(words[0]).name in ("containerd", "containerd-shim-runc-v2", "kubelet") and any(mark in " ".join(words) for mark in marks)
    return ours or f"/{CGROUP}/{node}/" in _read(f"/proc/{pid}/cgroup")


def _remove_rules() -> None:
    """Take the chains of Kubernetes and of CNI, the jumps to them, and our own rules out of the packet filter."""
    marks = ("KUBE-", "CNI-", *map(_bridge, NODES))
    for program in ("iptables", "ip6tables"):
        rules = subprocess.run([f"{program}-save"], capture_output=True, text=True, check=False).stdout
        kept = [line for line in rules.splitlines() if not any(mark in line for mark in marks)]
        if len(kept) != len(rules.splitlines()):
            subprocess.run([f"{program}-restore"], input="\n".join(kept) + "\n", text=True, check=True)


def _make_cgroups(name: str) -> None:
    """Make a cgroup in every hierarchy. One without processors and memory nodes takes no process."""
    for controller in {path.resolve() for path in CGROUPS.iterdir()}:
        folder = controller
        for part in name.split("/"):
            parent, folder = folder, folder / part
            folder.mkdir(exist_ok=True)
            for setting in ("cpuset.cpus", "cpuset.mems"):
                if (folder / setting).exists():
                    (folder / setting).write_text((parent / setting).read_text())


def _only_one() -> int:
    CACHE.mkdir(parents=True, exist_ok=True)
    lock = os.open(CACHE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BuildError(f"{CACHE}: another test cluster runs; wait for its end") from None
    return lock


def _wait(happened: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise BuildError(f"wanted {what} within {timeout_s:g} s; see the logs in build/log/cluster")
        time.sleep(0.5)


def _flags(more: dict[str, Any], **named: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in {**more, **named}.items()]


def _base(name: str) -> str:
    return name.split("-node")[0]


def _bridge(node: str) -> str:
    return f"fido-{node}"


def _silence(change: str, node: str) -> None:
    """Drop, or no longer drop, all that comes from a node: packets to it are sent, and nothing answers."""
    rule = ["PREROUTING", "--in-interface", _bridge(node), "--jump", "DROP"]
    subprocess.run(["iptables", "--table", "raw", change, *rule], check=change == "--insert", capture_output=True)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _sysctls() -> dict[str, str]:
    return {name: text for name in SYSCTLS if (text := _read(f"/proc/sys/{name}"))}


def _entries(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _kubeconfig(token: str) -> dict[str, Any]:
    cluster = {"server": f"https://127.0.0.1:{API_PORT}", "insecure-skip-tls-verify": True}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    }


def _cni(node: str, index: int, folder: Path) -> dict[str, Any]:
    subnet = f"10.90.{index}.0/24"
    addresses = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": str(folder / "ipam")}
    bridge = {"type": "bridge", "bridge": _bridge(node), "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": addresses}
    return {"cniVersion": "0.4.0", "name": _bridge(node), "plugins": [bridge]}


def _kubelet(node: str, index: int, folder: Path) -> dict[str, Any]:
    one_percent = {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"}
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "127.0.0.1",
        "port": KUBELET_PORT + 10 * index,
        "healthzPort": KUBELET_PORT + 10 * index + 1,
        "readOnlyPort": 0,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{CGROUP}/{node}",
        "volumePluginDir": str(folder / "plugins"),
        "failSwapOn": False,
        "evictionHard": one_percent,
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "3s",
        "featureGates": {"SizeMemoryBackedVolumes": True},
    }


_API = {
    "bind-address": "127.0.0.1",
    "secure-port": API_PORT,
    "insecure-port": 0,
    "service-cluster-ip-range": SERVICES,
    "service-account-issuer": "https://fido-cluster",
    "authorization-mode": "RBAC",
    "disable-admission-plugins": "ServiceAccount",
    "default-not-ready-toleration-seconds": UNREACHABLE_S,
    "default-unreachable-toleration-seconds": UNREACHABLE_S,
}
_CONTROLLERS = {
    "bind-address": "127.0.0.1",
    "port": 0,
    "leader-elect": "false",
    "node-monitor-period": "2s",
    "node-monitor-grace-period": f"{NODE_GRACE_S}s",
}
_SCHEDULER = {"bind-address": "127.0.0.1", "port": 0, "leader-elect": "false"}
_PROXY = {
    "proxy-mode": "iptables",
    "cluster-cidr": PODS,
    "hostname-override": NODES[0],
    "healthz-bind-address": "127.0.0.1:20256",
    "metrics-bind-address": "127.0.0.1:20249",
    # this machine's connection tracking stays as it is
    "conntrack-max-per-core": 0,
    "conntrack-min": 0,
    "conntrack-tcp-timeout-established": 0,
    "conntrack-tcp-timeout-close-wait": 0,
}
_CONTAINERD = """version = 2
root = "{folder}/containerd"
state = "{state}/containerd"
[grpc]
  address = "{state}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"""
