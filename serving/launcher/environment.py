"""Environment variables of tritonserver and its Python models: packages, memory settings, and the libraries that are preloaded.

`make setup` compiles the libraries (preload/*.c) where there is a C compiler. A server without them serves, with the risks that GUARDS
names.
"""

from __future__ import annotations

import os
import shutil
import site
import sys
from collections.abc import Sequence
from pathlib import Path

from .installation import PROJECT, Installation

HEAP_TRIM, STREAM_LOCKS, READINESS = (Path(sys.prefix, "lib", f"lib{name}.so") for name in ("heap_trim", "stream_locks", "readiness"))
GUARDS = {
    "heap_trim": "its memory may grow for hours",
    "stream_locks": "a cancelled gRPC stream may stop all streams, until the next restart",
    "readiness": "it says that it is ready while it answers its last questions",
}
# glibc gives up to eight heaps per core to the threads of a process. Each heap keeps what its largest burst took, and glibc raises the size
# from which it returns a block to the system with every large block that is freed. One heap per core, and blocks from this size on always
# returned: memory is lower and stops growing sooner (measured by the soak of tests/stress). With fewer heaps than cores, threads wait for
# each other, most of all in the tokenizer.
LARGE_BLOCK_BYTES = 256 << 10
# Each thread keeps free blocks of its own, which trimming does not return. Triton has 240 threads: their blocks were more than all memory
# in use, and grew for hours. heap_trim.c removes this setting for the models: they have few threads, and tokenizing is faster with it.
NO_THREAD_CACHES = "glibc.malloc.tcache_count=0"
SERVER_ALONE = ("LD_PRELOAD", "GLIBC_TUNABLES")  # not for the shell that starts the server


def malloc_settings() -> dict[str, str]:
    """Settings of glibc's allocator for a server that runs for months."""
    return {
        "MALLOC_ARENA_MAX": str(max(2, len(os.sched_getaffinity(0)))),
        "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(LARGE_BLOCK_BYTES),
    }


def environment(installation: Installation, preloaded: Sequence[Path] | None = None) -> dict[str, str]:
    """Environment variables for the server: this environment's packages and this project for its Python models.

    Variables that are set already go before ours.

    Args:
        installation: the server.
        preloaded: libraries to preload, as `preloadable` returns them; None takes those of `make setup` as they lie.
    """
    env = {**malloc_settings(), **os.environ}
    paths = [str(PROJECT), *site.getsitepackages()]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    libraries = [str(folder) for folder in installation.libraries]
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    preloaded = [library for library in (HEAP_TRIM, STREAM_LOCKS, READINESS) if library.is_file()] if preloaded is None else preloaded
    if any(library.name == HEAP_TRIM.name for library in preloaded):
        env.setdefault("GLIBC_TUNABLES", NO_THREAD_CACHES)
    if preloaded:
        env["LD_PRELOAD"] = " ".join([*filter(None, [env.get("LD_PRELOAD")]), *map(str, preloaded)])
    return env


def preloadable(scratch: Path) -> list[Path]:
    """The compiled libraries at paths that LD_PRELOAD can hold: it separates paths by blanks and colons and has no quotes.

    A library at another path is copied into `scratch`. One that `scratch` cannot hold either is left out.
    """
    found = []
    for library in (HEAP_TRIM, STREAM_LOCKS, READINESS):
        if library.is_file():
            copy = scratch / library.name
            if not _fits(library) and _fits(copy):
                shutil.copyfile(library, copy)
            found += [path for path in (library, copy) if _fits(path)][:1]
    return found


def missing_guards(preloaded: Sequence[Path]) -> list[str]:
    """One line for each library that a server runs without: its name and the risk."""
    names = {path.name for path in preloaded}
    return [f"without {name}: {risk}" for name, risk in GUARDS.items() if f"lib{name}.so" not in names]


def _fits(path: Path) -> bool:
    return not any(character in str(path) for character in " :")
