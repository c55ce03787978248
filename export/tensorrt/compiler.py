"""ONNX -> TensorRT: every graph of a GPU reader compiled for the GPU of this machine, by Polygraphy.

Comes in: a directory that gpu_graphs.py wrote. Goes out: the same with .plan files in place of .onnx, and a manifest that records what
they were built with and for. One way for TensorRT 8.6, 10, 11 and TensorRT-RTX: the precision is in the graphs. From 10 on the compiler
takes types as they are; 8.6 is told layer by layer to do so. Needs neither torch nor onnx.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from export.atomic_directory import atomic_directory
from serving.contract.gemms import decoder_gemms, encoder_gemms, gemm_tensors, packed_cross_kv_tensors
from serving.contract.limits import Limits
from serving.contract.manifest import MANIFEST_FILE, EngineBuild, EngineError, Manifest, sha256_of_file
from serving.contract.profiles import Shapes, profile_ranges, profile_shapes
from serving.contract.tensors import GraphTensors, encoder_tensors

STRONGLY_TYPED_FROM = 10
# Runs of a kernel that its time is the mean of. One, the default, chooses as well on a quiet GPU; eight cost a few seconds a reader.
TIMINGS = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """One engine to build: its name and its optimization profiles."""

    name: str
    profiles: list[dict[str, Shapes]]


def graphs_of(manifest: Manifest) -> dict[str, GraphTensors]:
    """Names and tensors of all graphs of a GPU reader.

    Raises:
        EngineError: if they are a CPU's.
    """
    sizes, encoder, decoder = manifest.sizes, manifest.encoder, manifest.decoder
    if decoder is None:
        raise EngineError("these graphs are for a CPU; export them with --gpu")
    graphs = {} if encoder else {"encoder": encoder_tensors(sizes, "float16")}
    graphs["cross_kv"] = packed_cross_kv_tensors(sizes)
    of_encoder = encoder_gemms(encoder) if encoder and manifest.encoder_library is None else ()
    for stack, gemms in ((encoder, of_encoder), (decoder, decoder_gemms(sizes))):
        for gemm in gemms:
            assert stack is not None
            graphs[gemm.engine] = gemm_tensors(stack, gemm, manifest.precision)
    return graphs


def tasks_of(manifest: Manifest, limits: Limits) -> list[Task]:
    """All engines of a reader with their profiles."""
    length = manifest.prompt.passage_length
    return [
        Task(name, [profile_shapes(tensors, ranges) for ranges in profile_ranges(name, limits, length)])
        for name, tensors in graphs_of(manifest).items()
    ]


def build_engines(
    graphs: Path, directory: Path, limits: Limits, timing_cache: Path, jobs: int = 1, log: Callable[[str], None] = print
) -> Manifest:
    """Compile all graphs of a reader.

    Args:
        graphs: directory that `export_gpu_reader` wrote.
        directory: for the engines; replaced if it exists, left as it is if anything fails.
        limits: what the engines must be able to serve: passages, slots, passages a call.
        timing_cache: file that keeps kernel timings from build to build; made if missing. Beside it, in `plans`, lie the engines
            built so far.
        jobs: processes that build. Builds time kernels, and two on one GPU disturb each other: once it cost a step a tenth.
        log: told about progress.

    Raises:
        ManifestError: if the graphs are damaged.
        EngineError: if a build fails.
    """
    manifest = Manifest.load(graphs)
    manifest.verify(graphs, tuple(manifest.files))
    with atomic_directory(directory) as tmp_dir:
        gpu, compute_capability, version = describe_gpu()
        tasks = tasks_of(manifest, limits)
        log(f"{graphs}: {len(tasks)} engines with TensorRT {version} for {gpu}")
        seconds: dict[str, float] = {}
        shards = [tasks[i::jobs] for i in range(min(jobs, len(tasks)))]
        work = [(graphs, tmp_dir, manifest.precision, timing_cache, shard) for shard in shards]
        for done in _in_processes(work, jobs) if jobs > 1 else map(_compile_shard, work):
            seconds |= done
            for file, spent in done.items():
                log(f"  {file}: {spent:.1f} s, {(tmp_dir / file).stat().st_size / 1e6:.1f} MB")
        for name in manifest.files:
            if not name.endswith((".onnx", ".onnx.data")):
                shutil.copyfile(graphs / name, tmp_dir / name)
        built = dataclasses.replace(
            manifest,
            engine="tensorrt",
            files={file.name: sha256_of_file(file) for file in sorted(tmp_dir.iterdir())},
            build=EngineBuild(gpu, compute_capability, version, {f"{task.name}.plan": task.profiles for task in tasks}, seconds),
        )
        (tmp_dir / MANIFEST_FILE).write_text(built.to_json(), encoding="utf-8")
    return built


Work = tuple[Path, Path, str, Path, list[Task]]


def _in_processes(work: list[Work], jobs: int) -> Iterator[dict[str, float]]:
    # spawned, not forked: CUDA does not live through a fork
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_compile_shard, item) for item in work]):
            yield future.result()


def _compile_shard(work: Work) -> dict[str, float]:
    """Compile engines with one compiler; gives file -> seconds."""
    graphs, directory, precision, timing_cache, tasks = work
    compiler = Compiler(precision, timing_cache)
    built_before = timing_cache.with_name("plans")
    built_before.mkdir(parents=True, exist_ok=True)
    seconds = {}
    for task in tasks:
        started = time.perf_counter()
        file, graph = f"{task.name}.plan", graphs / f"{task.name}.onnx"
        kept = built_before / f"{_fingerprint(graph, task, precision)}.plan"
        if not kept.exists():
            tmp_dir = kept.with_suffix(f".{os.getpid()}")
            tmp_dir.write_bytes(compiler.compile(graph, task.profiles))
            tmp_dir.replace(kept)
        shutil.copyfile(kept, directory / file)
        seconds[file] = round(time.perf_counter() - started, 1)
    compiler.save_timings()
    return seconds


def _fingerprint(graph: Path, task: Task, precision: str) -> str:
    """Of everything that an engine depends on: two readers with one encoder shard its engines, and other slots leave it as it is."""
    files = [sha256_of_file(file) for file in (graph, graph.with_name(f"{graph.name}.data")) if file.exists()]
    return hashlib.sha256(repr((files, task.profiles, precision, TIMINGS, describe_gpu())).encode()).hexdigest()[:32]


def describe_gpu() -> tuple[str, str, str]:
    """Name and compute capability of the GPU, and the version of the compiler.

    Raises:
        EngineError: if there is no GPU or no TensorRT.
    """
    try:
        import cupy
        import tensorrt

        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except ImportError as error:
        raise EngineError(f"TensorRT engines cannot be built here: {error}; see requirements-gpu.txt") from error
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise EngineError(f"TensorRT engines cannot be built here: no usable GPU ({error})") from error
    return properties["name"].decode(), f"{properties['major']}.{properties['minor']}", tensorrt.__version__


def default_backend() -> str:
    """What `make export` makes where nobody says: "tensorrt" if a GPU and TensorRT are here, else "onnxruntime-gpu" or "onnxruntime"."""
    try:
        describe_gpu()
        return "tensorrt"
    except EngineError:
        pass
    try:
        import cupy
        import onnxruntime

        has_gpu = cupy.cuda.runtime.getDeviceCount() > 0
        return "onnxruntime-gpu" if has_gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "onnxruntime"
    except ImportError:
        return "onnxruntime"
    except cupy.cuda.runtime.CUDARuntimeError:
        return "onnxruntime"


class Compiler:
    """TensorRT by Polygraphy, with the kernel timings of one build handed to the next.

    Args:
        precision: of the graphs; TensorRT 8.6 alone must be told that it may use it.
        timing_cache: file for the timings; None keeps them in memory only.

    Raises:
        EngineError: if this TensorRT does not have the precision.
    """

    def __init__(self, precision: str, timing_cache: Path | None = None):
        trt = self._trt = _tensorrt()
        self._typed = trt.__name__ != "tensorrt" or int(trt.__version__.split(".")[0]) >= STRONGLY_TYPED_FROM
        # 8.6 writes a cache that it cannot read ("Myelin error from unknown graph"); in memory it serves
        self._timing_cache = timing_cache if self._typed else None
        self._timings: Any = None
        self._kept: list[Any] = []  # what the timings in memory may refer to
        # layer by layer names and shapes stay readable in the engine, for perf/gpu/profile.py; it costs no time
        self._options: dict[str, Any] = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
        if not self._typed:
            if precision != "float16":
                raise EngineError(f"precision {precision} needs TensorRT 10 or later, here is {trt.__version__}; export float16")
            # the plugin libraries of this version need cuBLAS 12 and cuDNN 8; its own kernels do as well
            own = [trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS]
            # Several contexts of one profile: the default from 10 on. What is not named is off, "faster dynamic shapes" among them, which
            # makes no difference to single gemms
            previews = [trt.PreviewFeature.PROFILE_SHARING_0806]
            self._options |= {
                "fp16": True,
                "tf32": True,
                "precision_constraints": "obey",
                "tactic_sources": own,
                "preview_features": previews,
            }

    def compile(self, path: Path, profiles: list[dict[str, Shapes]]) -> bytes:
        """One ONNX file to a serialized engine.

        Args:
            path: the graph.
            profiles: input name -> (min, opt, max) shapes, one dictionary a profile.

        Raises:
            EngineError: if TensorRT refuses; its log, on standard error, names the node.
        """
        # Polygraphy looks for TensorRT when it is first used; _tensorrt() has found it by now
        from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = {"": G_LOGGER.ERROR}
        listed = []
        for shapes in profiles:
            profile = Profile()
            for name, (least, best, most) in shapes.items():
                profile.add(name, min=least, opt=best, max=most)
            listed.append(profile)
        try:
            built = network_from_onnx_path(str(path), **({"strongly_typed": True} if self._typed else {}))
            builder, network, _ = built
            if not self._typed:
                _obey_types(self._trt, network, path)
            config = CreateConfig(profiles=listed, **self._options)(builder, network)
            config.avg_timing_iterations = TIMINGS
            if self._timings is None:
                self._timings = config.create_timing_cache(self._saved_timings())
            config.set_timing_cache(self._timings, True)
            self._kept.append((built, config))
            return bytes(engine_bytes_from_network(built, config=config))
        except PolygraphyException as error:
            raise EngineError(f"{path.name}: TensorRT {self._trt.__version__} cannot build it: {error}") from error

    def _saved_timings(self) -> bytes:
        return self._timing_cache.read_bytes() if self._timing_cache is not None and self._timing_cache.exists() else b""

    def save_timings(self) -> None:
        """Write the timings to the file, for the next reader."""
        if self._timing_cache is not None and self._timings is not None:
            self._timing_cache.parent.mkdir(parents=True, exist_ok=True)
            self._timing_cache.write_bytes(bytes(self._timings.serialize()))


def _tensorrt() -> Any:
    """The TensorRT that Polygraphy uses: tensorrt, or tensorrt_rtx where POLYGRAPHY_USE_TENSORRT_RTX=1."""
    if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") == "1":
        try:
            import tensorrt_rtx
        except ImportError:  # the bindings' wheel without the one that gives them this name
            import tensorrt_rtx_bindings as tensorrt_rtx

            sys.modules["tensorrt_rtx"] = tensorrt_rtx  # Polygraphy imports it from here
        return tensorrt_rtx
    import tensorrt

    return tensorrt


def _obey_types(trt: Any, network: Any, path: Path) -> None:
    """Pin every arithmetic layer to the type that its node has in the graph, as TensorRT 10 does by itself.

    Without it 8.6 computes the norms in half precision. The network cannot be asked: 8.6 calls every tensor fp32 that has no type set.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    dtypes = {onnx.TensorProto.FLOAT: trt.float32, onnx.TensorProto.FLOAT16: trt.float16}
    wanted = {node.name: dtypes.get(types.get(node.output[0], 0)) for node in model.graph.node}
    kinds = trt.LayerType
    arithmetic = {kinds.ELEMENTWISE, kinds.REDUCE, kinds.UNARY, kinds.MATRIX_MULTIPLY, kinds.SOFTMAX, kinds.ACTIVATION}
    for layer in network:
        dtype = wanted.get(layer.name)
        if layer.type in arithmetic and dtype is not None:
            layer.precision = dtype
            for i in range(layer.num_outputs):
                layer.set_output_type(i, dtype)
