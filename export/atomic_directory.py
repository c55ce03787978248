"""Directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Give a new folder beside `directory` to write to, which takes its place at the end; after an error `directory` is as before."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        yield beside
        if directory.exists():
            shutil.rmtree(directory)
        os.replace(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
