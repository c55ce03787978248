"""CUDA graphs with programmatic dependent launch: a kernel starts while the kernel before it still runs.

In: a function that enqueues work on a stream. Out: that work as one launch.

Between two kernels the GPU idles for about a microsecond: it launches the second once the first has ended and its writes are visible. From
compute capability 9.0 on, the second kernel may start as soon as all blocks of the first have started. It then loads data that does not
depend on the first, and waits for the end of the first (`grid_dependency_wait` in cuda/vectors.cuh). Whether a kernel may start early is a
property of the graph's edge to it. A capture sets the property only if the kernel was launched with an attribute for it, and neither CuPy
nor the engines launch kernels so. This module therefore changes the edges after the capture, before it instantiates the graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import cupy as cp

# The kernels of cuda/ that call grid_dependency_wait: all but `embed`, which begins a graph, and the encoder's `attention`.
DEPENDENT_KERNELS = frozenset(
    (
        "add_and_norm",
        "activate",
        "hopper_attention",
        "skinny_gemm",
        "self_attention",
        "cross_attention",
        "combine_split_kv",
        "attribution",
        "head_argmax",
        "combine_argmax",
    )
)
PDL_CAPABILITY = 90  # 10 * the first compute capability with programmatic dependent launch
PDL_DRIVER = 12_030  # the first CUDA version of the driver whose edges have properties
ANY_THREAD_MAY_CALL = 2  # cudaStreamCaptureModeRelaxed: other threads may allocate and copy during a capture
# Node type, edge type and port of CUDA's driver interface. The port of a kernel node fires when all its blocks have started.
KERNEL, PROGRAMMATIC, ALL_BLOCKS_STARTED = 0, 1, 2


class CudaGraphError(RuntimeError):
    """The driver refused to read or to change a graph."""


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
    """The work that `run` enqueues on a stream, as one launch.

    Args:
        stream: the stream that `run` enqueues on. Nothing else may be enqueued there during the capture.
        run: enqueues the work. It must have run before: a capture fails if something is loaded or allocated.
        dependent_launch: False = no kernel starts before the one before it has ended; for comparisons.

    Attributes:
        dependent_launches: number of kernels that start while the one before them still runs.

    Raises:
        CudaGraphError: if the driver refuses.
    """

    def __init__(self, stream: cp.cuda.Stream, run: Callable[[], object], *, dependent_launch: bool = True):
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
        """Enqueue the graph on `stream`, without waiting for the result."""
        cp.cuda.runtime.graphLaunch(self._launchable, stream.ptr)

    def __del__(self) -> None:
        if launchable := getattr(self, "_launchable", 0):
            cp.cuda.runtime.graphExecDestroy(launchable)


def supports_dependent_launch() -> bool:
    """Whether this thread's GPU and the driver have programmatic dependent launch."""
    return int(cp.cuda.Device().compute_capability) >= PDL_CAPABILITY and cp.cuda.runtime.driverGetVersion() >= PDL_DRIVER


def _launch_dependents_early(graph: int) -> int:
    """Change the edges to DEPENDENT_KERNELS to programmatic ones; returns how many there are."""
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
    """(source node, target node, properties) of each edge."""
    count = ctypes.c_size_t()
    _driver("cuGraphGetEdges_v2", ctypes.c_void_p(graph), None, None, None, ctypes.byref(count))
    if not count.value:  # a graph of one node
        return []
    sources, targets = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    edges = (_Edge * count.value)()
    _driver("cuGraphGetEdges_v2", ctypes.c_void_p(graph), sources, targets, edges, ctypes.byref(count))
    return list(zip(sources, targets, edges, strict=True))


def _kernel_name(node: int) -> str | None:
    """The name of the kernel that a node launches; None if the node is not a kernel."""
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
    """Call the CUDA driver directly: CuPy has no interface to a graph's edges."""
    if code := getattr(_library(), function)(*arguments):
        raise CudaGraphError(f"{function}: CUDA driver error {code}")
