"""Which versions of Triton, Python, NumPy, TensorRT, CUDA and glibc go together. Data and comparisons; runs on Python 3.8 without packages.

`make setup`, the launcher's checks and the table in docs/operating.md all read it, so that a version is raised in one place.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Span:
    """Versions from `first` to `last`, both included: with a `last` of (2, 51) any 2.51 is in it. None is without a bound."""

    first: tuple[int, ...]
    last: tuple[int, ...] | None

    def __contains__(self, version: tuple[int, ...]) -> bool:
        return version >= self.first and (self.last is None or version[: len(self.last)] <= self.last)

    def __str__(self) -> str:
        if self.last is None:
            return f"{dotted(self.first)} or later"
        return dotted(self.first) if self.first == self.last else f"{dotted(self.first)} to {dotted(self.last)}"


@dataclasses.dataclass(frozen=True)
class Platform:
    """A way to get a Triton server, and what it runs with.

    Attributes:
        name: as the documentation calls it.
        triton: versions of the server.
        python: versions that the Python models may have.
        numpy: versions that they may have.
        glibc: of the machine; None where the server brings its own or was built there.
        use: what it is for.
    """

    name: str
    triton: Span
    python: Span
    numpy: Span
    glibc: Span | None
    use: str


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A family of TensorRT versions.

    Attributes:
        tensorrt: its versions.
        python: versions that its bindings have wheels for.
        cuda: versions of CUDA that it was built with.
        precisions: of the graphs that it compiles.
        typing: "strong": types are those of the graph; "weak": builder flags and pinned layers choose them.
        state: what was run with it.
    """

    tensorrt: Span
    python: Span
    cuda: Span
    precisions: tuple[str, ...]
    typing: str
    state: str


@dataclasses.dataclass(frozen=True)
class WorkAround:
    """Code that only a fault of Triton asks for.

    Attributes:
        name: of the work-around.
        fault: what Triton does.
        until: the first version that does without; None as long as no version does.
        retired_by: the test that tells when it can go: a test of pytest, or a command and what to change for it.
    """

    name: str
    fault: str
    until: tuple[int, ...] | None
    retired_by: str

    def needed(self, triton: tuple[int, ...] | None) -> bool:
        """Whether a server of this version, None if unknown, needs it."""
        return triton is None or self.until is None or triton < self.until


WHEEL = Platform(
    name="the wheel `nvidia-pytriton` (`make setup`)",
    triton=Span((2, 51), (2, 51)),
    python=Span((3, 10), (3, 12)),  # that NumPy 1.26 has wheels for
    numpy=Span((1, 26), (1, 26)),
    glibc=Span((2, 35), None),
    use="demo, tests, trusted clients",
)
OWN = Platform(
    name="NVIDIA's container, or `TRITONSERVER=path`",
    triton=Span((2, 53), None),
    python=Span((3, 10), (3, 14)),
    numpy=Span((1, 26), (2,)),
    glibc=None,
    use="production",
)
PLATFORMS = (WHEEL, OWN)
# Advisories of 2025 (CVE-2025-23310, -23311: HTTP chunks; -23319, -23320, -23334: shared memory of Python models) name every version before
# container 25.07. From this version on no request is known that kills the server.
SAFE_FROM: tuple[int, ...] = (2, 60)
# The family of NVIDIA's containers that production should use: Triton 2.71, CUDA 13.
CONTAINER_TAGS = "26.07-py3 or later"

COMPILERS = (
    Compiler(Span((8, 6), (8, 6)), Span((3, 6), (3, 10)), Span((12,), (12,)), ("float16",), "weak", "run on H100 and H200"),
    Compiler(Span((10,), (10,)), Span((3, 10), (3, 13)), Span((12,), (13,)), ("float16", "bfloat16"), "strong", "run on a stand-in"),
    Compiler(
        Span((11,), (11,)),
        Span((3, 10), (3, 14)),
        Span((13,), (13,)),
        ("float16", "bfloat16"),
        "strong",
        "its API and parser by TensorRT-RTX 1.7, without a GPU",
    ),
)

NUMPY_1 = WorkAround(
    "NumPy 1.26 is required",
    "with NumPy 2 the Python backend returns empty outputs, and text inputs end the model's process",
    (2, 53),
    "tests/serving/triton/test_triton_quirks.py::test_numpy_2_returns_empty_outputs_and_is_refused",
)
STREAM_LOCKS = WorkAround(
    "`stream_locks.c` is preloaded",
    "a cancelled gRPC stream may stop all streams",
    None,
    "tests/serving/launcher/test_preload_sources.py::test_triton_still_needs_it",
)
FINAL_FLAG = WorkAround(
    "a stream's final flag comes 0.3 s after its totals",
    "a final flag that meets a cancel ends the server",
    None,
    "make storm, with DELAY_S = 0 in serving/triton/final_flag.py",
)
START_AGAIN = WorkAround(
    "a start that Triton aborts is tried again",
    "loading several Python models at once, it sometimes aborts over a lock of its own",
    None,
    "make stress, with START_ATTEMPTS = 1 in serving/launcher/server.py",
)
WORK_AROUNDS = (NUMPY_1, STREAM_LOCKS, FINAL_FLAG, START_AGAIN)


def version_of(text: str) -> tuple[int, ...]:
    """(2, 51, 0) of "2.51.0" and of "2.51.0dev"; empty if it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", text.strip())
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    """(2, 51) as 2.51."""
    return ".".join(map(str, version))


def compiler_of(tensorrt: str) -> Compiler | None:
    """The family of a TensorRT version, as "10.14.1"; None if it is none of ours."""
    return next((family for family in COMPILERS if version_of(tensorrt) in family.tensorrt), None)


def platform_table() -> str:
    """The servers as a Markdown table."""
    lines = ["| server | Triton | Python | NumPy | glibc | for |", "|---|---|---|---|---|---|"]
    for p in PLATFORMS:
        lines.append(f"| {p.name} | {p.triton} | {p.python} | {p.numpy} | {p.glibc or 'its own'} | {p.use} |")
    return "\n".join(lines) + "\n"


def compiler_table() -> str:
    """The compilers as a Markdown table."""
    lines = ["| TensorRT | Python | CUDA | precisions | types | seen |", "|---|---|---|---|---|---|"]
    for c in COMPILERS:
        lines.append(f"| {c.tensorrt} | {c.python} | {c.cuda} | {', '.join(c.precisions)} | {c.typing} | {c.state} |")
    return "\n".join(lines) + "\n"


def work_around_table() -> str:
    """The work-arounds as a Markdown table."""
    lines = ["| work-around | because | until Triton | what says when it can go |", "|---|---|---|---|"]
    for w in WORK_AROUNDS:
        until = dotted(w.until) if w.until else "none is known"
        lines.append(f"| {w.name} | {w.fault} | {until} | `{w.retired_by.split('::')[-1]}` |")
    return "\n".join(lines) + "\n"
