"""What the test cluster is made of: Kubernetes from Debian's source package, and images of this project, made without a registry.

Both are kept in a cache folder, ${XDG_CACHE_HOME:-~/.cache}/fido-cluster. Kubernetes is compiled once; the image is made anew when a file
that it holds has changed. The addresses of Debian's packages are those of this machine's apt.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fido-cluster"
SUITE = "bookworm"  # Debian 12: the last whose source package builds the parts of a cluster, not only kubectl
VERSION = "v1.20.2"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
# Programs and the Debian packages that bring them.
IMAGE_TOOLS = {"podman": "podman", "buildah": "buildah", "runc": "runc", "debootstrap": "debootstrap"}
CLUSTER_TOOLS = {
    **IMAGE_TOOLS,
    "etcd": "etcd-server",
    "containerd": "containerd",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "go": "golang-go",
    "dpkg-source": "dpkg-dev",
    "make": "make",
    "rsync": "rsync",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "catatonit": "catatonit",
    "openssl": "openssl",
}
IMAGE, PAUSE, MODELS = "localhost/fido:latest", "localhost/pause:1", "/repository"
# of the tree, all that the image holds
SOURCES = ("serving", "deploy/container", "deploy/set_up.py", "requirements.txt", "requirements-triton.txt")
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class BuildError(Exception):
    """Something is missing, or could not be made. The message says what to do."""


def check_tools(tools: dict[str, str]) -> None:
    """Raise BuildError with the packages to install if a program of `tools` is missing."""
    missing = {program: package for program, package in tools.items() if shutil.which(program) is None}
    if missing:
        wanted = " ".join(sorted(set(missing.values())))
        raise BuildError(f"wanted {', '.join(tools)}; not found: {', '.join(missing)}: apt-get install --no-install-recommends {wanted}")


class Engine:
    """podman and buildah with a storage of their own, in `folder`."""

    def __init__(self, folder: Path):
        self._place = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        self._env = {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf")}

    def __call__(self, tool: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run and return what was printed, both streams in one."""
        command = [tool, *self._place, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False, **options}
        return subprocess.run(command, env=self._env, **options)

    def checked(self, tool: str, *arguments: Any, **options: Any) -> str:
        """The same. Raises BuildError with the end of what was printed if it fails."""
        done = self(tool, *arguments, **options)
        if done.returncode != 0:
            raise BuildError(f"{tool} {arguments[0]} failed: {done.stdout[-3000:]}")
        return done.stdout

    def import_folder(self, folder: Path, name: str, *changes: str) -> None:
        """Make an image of one layer, the files of `folder`; `changes` are lines of a Dockerfile."""
        with subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE) as tar:
            self.checked("podman", "import", *[part for change in changes for part in ("--change", change)], "-", name, stdin=tar.stdout)


def debian_source() -> tuple[str, str]:
    """Address and keyring of Debian 12's packages, as this machine's apt has them; the keyring may be empty."""
    lines = ["$(REPO_URI)", "$(CODENAME)", "$(COMPONENT)", "$(SIGNED_BY)"]
    command = ["apt-get", "indextargets", "--format", "|".join(lines), "Created-By: Packages", "Label: Debian"]
    for line in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines():
        address, codename, component, keyring = line.split("|")
        if (codename, component) == (SUITE, "main"):
            return address, "" if keyring.startswith("$") else keyring
    raise BuildError(f"apt: wanted a source of Debian 12 ({SUITE} main), got none: run apt-get update, or run this on Debian 12")


def plain_image(engine: Engine, folder: Path) -> None:
    """Make `localhost/fido`, the target `plain` of deploy/container/Dockerfile, on a Debian 12 made by debootstrap in `folder`."""
    if engine("podman", "image", "exists", "localhost/debian:12").returncode != 0:
        root = folder / "debian"
        shutil.rmtree(root, ignore_errors=True)
        address, _ = debian_source()
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, root, address], check=True, stdout=subprocess.DEVNULL)
        # behind a proxy that signs anew, pip in the image needs the certificates that it has here
        if (certificates := os.environ.get("PIP_CERT")) is not None:
            shutil.copy(certificates, root / "etc" / "pip-ca.pem")
            (root / "etc" / "pip.conf").write_text("[global]\ncert = /etc/pip-ca.pem\n")
        engine.import_folder(root, "localhost/debian:12")
        shutil.rmtree(root)
    build = ["build", "--layers", "--isolation", "chroot", "--network", "host", "--target", "plain"]
    build += ["--build-arg", "PLAIN_IMAGE=localhost/debian:12"]
    engine.checked("buildah", *build, "-f", ROOT / "deploy/container/Dockerfile", "-t", "localhost/fido", ROOT)


def kubernetes(log: Callable[[str], None]) -> Path:
    """The folder with Kubernetes' programs, compiled the first time: 15 minutes on two cores, 4 GB of disk while it lasts."""
    programs = CACHE / "kubernetes" / VERSION
    if all((programs / name).exists() for name in PROGRAMS):
        return programs
    log(f"compiling Kubernetes {VERSION} from Debian's source package, once: about 15 minutes on two cores")
    work = CACHE / "kubernetes" / "source"
    shutil.rmtree(work, ignore_errors=True)
    (work / "lists" / "partial").mkdir(parents=True)
    address, keyring = debian_source()
    (work / "sources.list").write_text(f"deb-src {f'[signed-by={keyring}] ' if keyring else ''}{address} {SUITE} main\n")
    settings = {"Dir::Etc::sourcelist": work / "sources.list", "Dir::Etc::sourceparts": "/dev/null", "Dir::State::lists": work / "lists"}
    apt = ["apt-get", "-q", *[part for name, value in settings.items() for part in ("-o", f"{name}={value}")]]
    with (CACHE / "kubernetes.log").open("w") as output:

        def run(*command: Any, **options: Any) -> None:
            if subprocess.run([*map(str, command)], stdout=output, stderr=output, cwd=work, check=False, **options).returncode:
                raise BuildError(f"{command[0]} failed: see {output.name}")

        run(*apt, "update")
        run(*apt, "source", "kubernetes")
        (source,) = (path for path in work.glob("kubernetes-*") if path.is_dir())
        (source / "version").write_text(_version_file())
        # Its kubelet is linked dynamically unless told otherwise, and then all packages are compiled a second time, with cgo.
        env = {**os.environ, "HOME": str(work), "KUBE_GIT_VERSION_FILE": "version", "KUBE_STATIC_OVERRIDES": "cmd/kubelet"}
        what = " ".join(f"cmd/{name}" for name in PROGRAMS)
        run("nice", "make", "-C", source, f"GOFLAGS=-p={os.cpu_count()}", "GOLDFLAGS=-w -s", f"WHAT={what}", env=env)
    programs.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        shutil.move(source / "_output" / "bin" / name, programs / name)
    _remove_read_only(work)
    return programs


def _version_file() -> str:
    """Without it the programs call themselves v0.0.0, and Helm refuses them."""
    major, minor, _ = VERSION[1:].split(".")
    values = {"COMMIT": "0" * 40, "TREE_STATE": "clean", "VERSION": VERSION, "MAJOR": major, "MINOR": minor}
    return "".join(f"KUBE_GIT_{name}='{value}'\n" for name, value in values.items())


def _remove_read_only(folder: Path) -> None:
    """Go's module cache is read-only."""
    subprocess.run(["chmod", "-R", "u+w", folder], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def images(repository: Path, log: Callable[[str], None]) -> Path:
    """A tar file with the images of the cluster: this project's, with `repository` at MODELS, and Kubernetes' pause."""
    key = _digest([ROOT / name for name in SOURCES] + [repository])
    tar = CACHE / "images" / f"{key}.tar"
    if tar.exists():
        return tar
    log("building the image of this project")
    engine = Engine(CACHE / "containers")
    plain_image(engine, CACHE)
    work = engine.checked("buildah", "from", "localhost/fido").strip().splitlines()[-1]
    try:
        engine.checked("buildah", "copy", "--chown", "1000:1000", work, repository, MODELS)
        engine.checked("buildah", "commit", work, IMAGE)
    finally:
        engine("buildah", "rm", work)
    pause = CACHE / "pause"
    pause.mkdir(exist_ok=True)
    shutil.copy(shutil.which("catatonit") or "catatonit", pause / "catatonit")
    engine.import_folder(pause, PAUSE, 'ENTRYPOINT ["/catatonit", "-P"]')
    shutil.rmtree(tar.parent, ignore_errors=True)
    tar.parent.mkdir(parents=True)
    unfinished = tar.with_suffix(".unfinished")
    engine.checked("podman", "save", "--multi-image-archive", "--output", unfinished, IMAGE, PAUSE)
    unfinished.rename(tar)
    return tar


def _digest(places: Sequence[Path]) -> str:
    """Of the names and contents of all files in `places`, without compiled Python."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(place.parent)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
