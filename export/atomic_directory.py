"""Directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Give a new folder tmp_dir `directory` to write to, which takes its place at the end; after an error `directory` is as before."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    tmp_dir = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield tmp_dir
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(tmp_dir, directory)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
