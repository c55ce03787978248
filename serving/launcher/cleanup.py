"""What a server keeps on this machine, and how it is removed: shared memory regions, a scratch folder.

In: nothing but this process. Out: a `Workspace` for one server, and `remove_leftovers` for what killed servers could not remove. A file
that is locked (flock) as long as any process of a server lives says that its regions and its folder are in use. Process ids cannot say
that: containers with process ids of their own may share one /dev/shm. Processes are ended elsewhere (processes.py).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

SHM = Path("/dev/shm")
SHM_PREFIX = "fido-"
SCRATCH_PREFIX = "fido-triton-"
LOCK = "lock"  # the lock file's name in a scratch folder, and the end of its name in /dev/shm
NAME_ATTEMPTS = 8


class Workspace:
    """Names and files of one server; removed by `remove`, or when this object or the process ends.

    Attributes:
        shm_prefix: every shared memory region of the server has a name that starts so.
        scratch: a folder for the server's files.
        lock_fds: open descriptors of both locks. A process that inherits them keeps the regions and the folder from being removed as
            leftovers, also after this process was killed.
    """

    def __init__(self) -> None:
        self.shm_prefix, shm_lock = _new_prefix()
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
        scratch_lock = _create_locked(self.scratch / LOCK)
        assert scratch_lock is not None, "nobody else writes into a new folder"
        self.lock_fds = (shm_lock, scratch_lock)
        self._remove = weakref.finalize(self, _remove_workspace, self.shm_prefix, self.scratch, self.lock_fds)

    def remove_regions(self) -> None:
        """Remove the shared memory regions; the name stays ours."""
        _remove_regions(self.shm_prefix)

    def remove(self) -> None:
        """Remove regions and folder, and release the locks. A second call does nothing."""
        self._remove()


def remove_leftovers() -> None:
    """Remove this user's shared memory regions and scratch folders of servers that no longer live.

    A file without a lock, with a held lock, or of another user stays. A file that cannot be removed is no error: it must not keep a new
    server from starting.
    """
    for lock in _paths(SHM, SHM_PREFIX):
        if lock.name.endswith(f"-{LOCK}") and (fd := _lock_abandoned(lock)) is not None:
            _remove_regions(lock.name.removesuffix(LOCK))
            _unlink(lock)
            os.close(fd)
    for folder in _paths(Path(tempfile.gettempdir()), SCRATCH_PREFIX):
        if (fd := _lock_abandoned(folder / LOCK)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(fd)


def _new_prefix() -> tuple[str, int]:
    """A prefix of region names that no server has, and the descriptor of its lock."""
    for _ in range(NAME_ATTEMPTS):
        prefix = f"{SHM_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-"
        if (fd := _create_locked(SHM / f"{prefix}{LOCK}")) is not None:
            return prefix, fd
    raise FileExistsError(f"{SHM}: {NAME_ATTEMPTS} new names of shared memory regions were all taken")


def _create_locked(path: Path) -> int | None:
    """Create and lock a file; None if another process has it, or took it for abandoned before it was locked."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _lock_abandoned(path: Path) -> int | None:
    """Lock a lock file of this user that no process holds; None if it is in use, missing, or of another user."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _remove_workspace(shm_prefix: str, scratch: Path, lock_fds: tuple[int, ...]) -> None:
    _remove_regions(shm_prefix)
    shutil.rmtree(scratch, ignore_errors=True)
    _unlink(SHM / f"{shm_prefix}{LOCK}")
    for fd in lock_fds:
        os.close(fd)


def _remove_regions(prefix: str) -> None:
    for region in _paths(SHM, prefix):
        if region.name != f"{prefix}{LOCK}":
            _unlink(region)


def _paths(folder: Path, prefix: str) -> Iterator[Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    yield from (folder / name for name in sorted(names) if name.startswith(prefix))


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
