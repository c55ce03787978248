"""The preloaded C sources, compiled here and loaded into programs that do what Triton's threads do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SOURCES = Path(__file__).parents[3] / "serving/launcher/preload"
LIBRARY = "void *TRITONBACKEND_ResponseSend(void *send, unsigned flags, void *error) { ((void (*)(void))send)(); return error; }"
# In each round the handler locks request, then stream; the sender, inside ResponseSend, stream, then request. Both mutexes are new.
PROGRAM = """
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
void *TRITONBACKEND_ResponseSend(void *, unsigned, void *);
static pthread_mutex_t *request, *stream;
static pthread_barrier_t both;
static int inside;
static void enter(void) { if (__atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST) != 1) { puts("two inside"); exit(2); } }
static void leave(void) { __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST); }
static pthread_mutex_t *new_mutex(void) {
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_t *mutex = malloc(sizeof *mutex);
    pthread_mutex_init(mutex, &kind);
    return mutex;
}
static void send(void) {
    pthread_mutex_lock(stream);
    pthread_barrier_wait(&both);
    pthread_mutex_lock(request);
    enter(); leave();
    pthread_mutex_unlock(request);
    pthread_mutex_unlock(stream);
}
static void *sender(void *unused) { return TRITONBACKEND_ResponseSend((void *)send, 0, NULL); }
int main(void) {
    for (int round = 0; round < 10; ++round) {
        pthread_t thread;
        request = new_mutex(), stream = new_mutex();
        pthread_barrier_init(&both, NULL, 2);
        pthread_mutex_lock(request);
        pthread_mutex_lock(request);
        pthread_create(&thread, NULL, sender, NULL);
        pthread_barrier_wait(&both);
        pthread_mutex_lock(stream);
        enter(); leave();
        pthread_mutex_unlock(stream);
        pthread_mutex_unlock(request);
        pthread_mutex_unlock(request);
        pthread_join(thread, NULL);
        free(request), free(stream);
    }
    printf("done %s", getenv("LD_PRELOAD") ? getenv("LD_PRELOAD") : "none");
}
"""


def compiled(folder: Path, name: str, source: str, *options: str) -> Path:
    (folder / f"{name}.c").write_text(source)
    subprocess.run(["cc", "-O2", "-pthread", "-o", str(folder / name), str(folder / f"{name}.c"), *options], check=True)
    return folder / name


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preload")
    for name in ("heap_trim", "stream_locks"):
        compiled(folder, f"lib{name}.so", (SOURCES / f"{name}.c").read_text(), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    compiled(folder, "libtriton.so", LIBRARY, "-shared", "-fPIC")
    return compiled(folder, "program", PROGRAM, f"-L{folder}", "-ltriton", f"-Wl,-rpath,{folder}")


def printed(program: Path, preload: str, timeout_s: float) -> str:
    env = {**os.environ, "LD_PRELOAD": preload}
    return subprocess.run([str(program)], env=env, capture_output=True, text=True, timeout=timeout_s, check=True).stdout


def test_the_deadlock_is_resolved_and_is_one_without_the_library(program):
    assert printed(program, str(program.parent / "libstream_locks.so"), 30).startswith("done")
    with pytest.raises(subprocess.TimeoutExpired):
        printed(program, "", 2)


@pytest.mark.parametrize("separator", [" ", ":"])
def test_children_load_the_other_libraries_and_not_this_one(program, separator):
    ours, other = (str(program.parent / f"lib{name}.so") for name in ("stream_locks", "heap_trim"))
    assert printed(program, ours, 30) == "done none"
    assert printed(program, separator.join([other, ours]), 30) == f"done {other}"
    assert printed(program, separator.join([ours, other]), 30) == f"done {other}"


def test_no_function_newer_than_glibc_2_30_is_needed(program):
    symbols = subprocess.run(["nm", "-D", str(program.parent / "libstream_locks.so")], capture_output=True, text=True).stdout
    assert "pthread_mutex_timedlock" in symbols and "pthread_mutex_clocklock" not in symbols
