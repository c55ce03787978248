"""CUDA graphs with programmatic dependent launch: our kernels start while the kernel before them still runs.

Between two kernels the GPU idles for about a microsecond: the second is launched once the first has ended and its writes are visible.
From compute capability 9.0 on, a kernel may start as soon as all blocks of its predecessor have started. It loads what does not depend on
the predecessor and then waits for its end (`grid_dependency_wait` in cuda/vectors.cuh). This is a property of the graph's edge between the
two. A capture sets it only for pairs that were launched that way, and an engine's kernels are not. So the edges are changed after the
capture, before the graph is instantiated.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import cupy as cp

# Kernels of cuda/ that await the one before. Every one that does not begin a step does.
DEPENDENT_KERNELS = frozenset(
    (
        "add_and_norm",
        "activate",
        "skinny_gemm",
        "self_attention",
        "cross_attention",
        "combine_split_kv",
        "attribution",
        "head_argmax",
        "combine_argmax",
    )
)
PDL_CAPABILITY = 90  # 10 * compute capability from which on kernels can wait for the one before
PDL_DRIVER = 12_030  # the driver's CUDA version from which on edges have properties
ANY_THREAD_MAY_CALL = 2  # cudaStreamCaptureModeRelaxed: other threads load and pack meanwhile
# Of CUDA's driver interface: CUgraphNodeType, CUgraphDependencyType, and the port of a kernel's node that opens when all its blocks run.
KERNEL, PROGRAMMATIC, ALL_BLOCKS_STARTED = 0, 1, 2


class CudaGraphError(RuntimeError):
    """The driver refused to read or change a graph."""


class _Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = [("from_port", ctypes.c_ubyte), ("to_port", ctypes.c_ubyte), ("type", ctypes.c_ubyte), ("reserved", ctypes.c_ubyte * 5)]


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid_block_and_shared_bytes", ctypes.c_uint * 7),
        *((name, ctypes.c_void_p) for name in ("arguments", "extra", "kernel", "context")),
    ]


class CudaGraph:
    """Everything that `run` enqueues on a stream, as one launch.

    Args:
        stream: what `run` enqueues on; nothing else is enqueued there meanwhile.
        run: has run before, so that nothing is loaded or set up any more.
        dependent_launch: False = every kernel waits for the end of the one before, to compare.

    Attributes:
        dependent_launches: kernels that come up while the one before them still runs.

    Raises:
        CudaGraphError: if the driver refuses.
    """

    def __init__(self, stream: cp.cuda.Stream, run: Callable[[], None], *, dependent_launch: bool = True):
        runtime = cp.cuda.runtime
        runtime.streamBeginCapture(stream.ptr, ANY_THREAD_MAY_CALL)
        try:
            run()
        finally:
            graph = runtime.streamEndCapture(stream.ptr)
        self.dependent_launches = _launch_dependents_early(graph) if dependent_launch and supports_dependent_launch() else 0
        self._launchable = runtime.graphInstantiate(graph)
        runtime.graphDestroy(graph)
        runtime.graphUpload(self._launchable, stream.ptr)

    def launch(self, stream: cp.cuda.Stream) -> None:
        """Enqueue it; does not wait."""
        cp.cuda.runtime.graphLaunch(self._launchable, stream.ptr)

    def __del__(self) -> None:
        if launchable := getattr(self, "_launchable", 0):
            cp.cuda.runtime.graphExecDestroy(launchable)


def supports_dependent_launch() -> bool:
    """Whether this thread's GPU and its driver let a kernel come up before the one before it has ended."""
    return int(cp.cuda.Device().compute_capability) >= PDL_CAPABILITY and cp.cuda.runtime.driverGetVersion() >= PDL_DRIVER


def _launch_dependents_early(graph: int) -> int:
    """Let every kernel that awaits the one before start when all blocks of that one run; gives how many do."""
    changed = 0
    for source, target, edge in _edges(graph):
        if _kernel_name(source) is None or _kernel_name(target) not in DEPENDENT_KERNELS:
            continue
        ends = ((ctypes.c_void_p * 1)(source), (ctypes.c_void_p * 1)(target))
        _driver("cuGraphRemoveDependencies_v2", ctypes.c_void_p(graph), *ends, (_Edge * 1)(edge), ctypes.c_size_t(1))
        early = (_Edge * 1)(_Edge(from_port=ALL_BLOCKS_STARTED, type=PROGRAMMATIC))
        _driver("cuGraphAddDependencies_v2", ctypes.c_void_p(graph), *ends, early, ctypes.c_size_t(1))
        changed += 1
    return changed


def _edges(graph: int) -> list[tuple[int, int, _Edge]]:
    """Nodes between which there is an edge, and the edge."""
    count = ctypes.c_size_t()
    _driver("cuGraphGetEdges_v2", ctypes.c_void_p(graph), None, None, None, ctypes.byref(count))
    if not count.value:  # a graph of one node
        return []
    sources, targets = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    edges = (_Edge * count.value)()
    _driver("cuGraphGetEdges_v2", ctypes.c_void_p(graph), sources, targets, edges, ctypes.byref(count))
    return list(zip(sources, targets, edges, strict=True))


def _kernel_name(node: int) -> str | None:
    """The name of the kernel that a node launches; None if it does something else."""
    kind, found, name = ctypes.c_int(), _KernelNode(), ctypes.c_char_p()
    _driver("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    if kind.value != KERNEL:
        return None
    _driver("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(found))
    if found.function:
        _driver("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(found.function))
    else:
        _driver("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(found.kernel))
    return (name.value or b"").decode()


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _driver(function: str, *arguments: Any) -> None:
    """Call the driver, of whose interface CuPy has no part that knows edges."""
    if code := getattr(_library(), function)(*arguments):
        raise CudaGraphError(f"{function}: CUDA driver error {code}")
