"""Compiled plans kept from build to build, by a fingerprint of everything that a plan depends on.

Comes in: a fingerprint and a plan. Goes out: the same plan to a later build, with its hash verified. The cache is bounded: the plans used
least recently are evicted. Several processes may use one cache at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from export.manifest_writer import write_atomically
from serving.contract.manifest import sha256_of_file

MAX_CACHE_BYTES = 8 << 30


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hex digest of named values; equal values give equal digests in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:32]


class PlanCache:
    """Plans in a directory: `KEY.plan`, and its SHA-256 in `KEY.sha256`, which is written last.

    Args:
        directory: made if missing.
        max_bytes: bound of all plans together. The newest plan stays, whatever its size.
    """

    def __init__(self, directory: Path, max_bytes: int = MAX_CACHE_BYTES):
        self._directory, self._max_bytes = directory, max_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, key: str, target: Path) -> bool:
        """Copy a plan to `target`; False if it is not in the cache, or was damaged there. A damaged plan is dropped."""
        plan, digest = self._files(key)
        tmp_file = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            wanted = digest.read_text()
            shutil.copyfile(plan, tmp_file)
            if sha256_of_file(tmp_file) != wanted:
                digest.unlink(missing_ok=True)
                plan.unlink(missing_ok=True)
                return False
            os.replace(tmp_file, target)
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                os.utime(plan)
            return True
        except FileNotFoundError:
            return False
        finally:
            tmp_file.unlink(missing_ok=True)

    def store(self, key: str, content: bytes) -> None:
        """Add a plan, then evict the plans used least recently until the rest fit."""
        plan, digest = self._files(key)
        digest.unlink(missing_ok=True)
        write_atomically(plan, content)
        write_atomically(digest, hashlib.sha256(content).hexdigest().encode())
        self._evict(kept=plan)

    def _files(self, key: str) -> tuple[Path, Path]:
        return self._directory / f"{key}.plan", self._directory / f"{key}.sha256"

    def _evict(self, kept: Path) -> None:
        with file_lock(self._directory / ".lock"):
            plans = sorted(((path.stat().st_mtime_ns, path) for path in self._directory.glob("*.plan") if path != kept), reverse=True)
            total = kept.stat().st_size if kept.exists() else 0
            for _, plan in plans:  # from the newest to the oldest
                total += plan.stat().st_size
                if total > self._max_bytes:
                    plan.with_suffix(".sha256").unlink(missing_ok=True)
                    plan.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made if missing; the other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
