"""ONNX -> TensorRT: every graph of a GPU reader compiled for the GPU of this machine, by Polygraphy.

Comes in: a directory that export/graphs/gpu.py wrote. Goes out: the same directory with .plan files in place of .onnx files, and a manifest
that records what the plans were built with and for. TensorRT 8.6, 10, 11 and TensorRT-RTX are supported. The precision is in the graphs:
TensorRT 10 and later take their types as they are, and 8.6 has every layer pinned to them. Needs neither torch nor onnx, except for 8.6,
which needs onnx.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from export.manifest_writer import atomic_directory, describe_compiled, write_atomically, write_manifest
from serving.contract.gemms import decoder_gemms, encoder_gemms, gemm_tensors, packed_cross_kv_tensors
from serving.contract.limits import Limits
from serving.contract.manifest import FLOAT8, FP8_CAPABILITY, EngineBuild, EngineError, Manifest, sha256_of_file
from serving.contract.profiles import Shapes, profile_ranges, profile_shapes
from serving.contract.tensors import GraphTensors, cross_kv_tensors, decoder_step_tensors, encoder_tensors
from serving.contract.versions import COMPILERS, compiler_of, version_of

from .detect import BuildTarget, build_target
from .plan_cache import PlanCache, file_lock, fingerprint

# TensorRT times each kernel so often and takes the mean. Its default of 1 chooses as well on a quiet GPU; 8 cost a few seconds a reader.
TIMINGS = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """One engine to build: its name and its optimization profiles."""

    name: str
    profiles: list[dict[str, Shapes]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """The tasks of one process.

    Attributes:
        graphs: directory of the ONNX files.
        directory: where the plans go.
        precision: of the graphs.
        timing_cache: file of kernel timings; the plan cache is the directory `plans` next to it.
    """

    graphs: Path
    directory: Path
    precision: str
    timing_cache: Path
    target: BuildTarget
    tasks: list[Task]


def graphs_of(manifest: Manifest) -> dict[str, GraphTensors]:
    """Names and tensors of all graphs of a GPU reader.

    Raises:
        EngineError: if the graphs are for a CPU.
    """
    sizes, encoder, decoder = manifest.sizes, manifest.encoder, manifest.decoder
    if not manifest.on_gpu:
        raise EngineError("these graphs are for a CPU; export them with --gpu")
    if decoder is None:
        specs = {"encoder": encoder_tensors, "cross_kv": cross_kv_tensors, "decoder_step": decoder_step_tensors}
        return {name: tensors_of(sizes, "float16") for name, tensors_of in specs.items()}
    graphs = {} if encoder else {"encoder": encoder_tensors(sizes, "float16")}
    graphs["cross_kv"] = packed_cross_kv_tensors(sizes)
    if encoder is not None and manifest.encoder_library is None:
        graphs |= {gemm.engine: gemm_tensors(encoder, gemm, manifest.precision) for gemm in encoder_gemms(encoder)}
    return graphs | {gemm.engine: gemm_tensors(decoder, gemm, manifest.precision) for gemm in decoder_gemms(sizes)}


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
        directory: for the engines; replaced if it exists, unchanged if anything fails.
        limits: what the engines must serve: passages, slots, passages of one encoder call.
        timing_cache: file that keeps kernel timings from build to build; made if missing. Plans are cached in `plans` next to it.
        jobs: processes that build. Builds time kernels, and two builds on one GPU disturb each other: once the step became a tenth slower.
        log: called with each line of progress.

    Raises:
        ManifestError: if the graphs are damaged.
        EngineError: if a build fails.
    """
    manifest = Manifest.load(graphs)
    manifest.verify(graphs, tuple(manifest.files))
    with atomic_directory(directory) as tmp_dir:
        target = build_target()
        _require_fp8(graphs, manifest, target)
        tasks = tasks_of(manifest, limits)
        log(f"{graphs}: {len(tasks)} engines with TensorRT {target.tensorrt} for {target.gpu.name}")
        seconds: dict[str, float] = {}
        shards = [
            Shard(graphs, tmp_dir, manifest.precision, timing_cache, target, tasks[i::jobs]) for i in range(min(max(jobs, 1), len(tasks)))
        ]
        for finished in _in_processes(shards) if len(shards) > 1 else map(_compile_shard, shards):
            seconds |= finished
            for file, spent in finished.items():
                log(f"  {file}: {spent:.1f} s, {(tmp_dir / file).stat().st_size / 1e6:.1f} MB")
        for name in manifest.files:
            if not name.endswith((".onnx", ".onnx.data")):
                shutil.copyfile(graphs / name, tmp_dir / name)
        profiles = {f"{task.name}.plan": task.profiles for task in tasks}
        build = EngineBuild(target.gpu.name, target.gpu.compute_capability, target.tensorrt, profiles, seconds)
        return write_manifest(describe_compiled(manifest, tmp_dir, build), tmp_dir)


def _require_fp8(graphs: Path, manifest: Manifest, target: BuildTarget) -> None:
    """Refuse a reader whose keys and values this machine's GPU could not read: its decoder would not load."""
    capability = target.gpu.compute_capability
    major, minor = (int(part) for part in capability.split("."))
    if manifest.cross_kv_precision == FLOAT8 and 10 * major + minor < FP8_CAPABILITY:
        raise EngineError(
            f"{graphs}: FP8 keys and values of cross-attention: wanted a GPU of compute capability {FP8_CAPABILITY / 10} or later, "
            f"got {capability}; export the reader with --cross-kv-precision float16"
        )


def _in_processes(shards: list[Shard]) -> Iterator[dict[str, float]]:
    # spawned, not forked: CUDA does not survive a fork
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; this one terminates the others
    with ProcessPoolExecutor(len(shards), multiprocessing.get_context("spawn"), signal.signal, ignored) as pool:
        try:
            for future in as_completed([pool.submit(_compile_shard, shard) for shard in shards]):
                yield future.result()
        except BrokenProcessPool as error:
            raise EngineError("a process that builds engines died, for want of memory perhaps; build with fewer --jobs") from error
        except BaseException:
            # an error or a signal: a build runs for minutes, and leaving the pool would wait for it
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _compile_shard(shard: Shard) -> dict[str, float]:
    """Compile the engines of one shard with one compiler; returns file -> seconds."""
    compiler = Compiler(shard.precision, shard.timing_cache)
    cache = PlanCache(shard.timing_cache.with_name("plans"))
    seconds = {}
    for task in shard.tasks:
        started = time.perf_counter()
        graph, plan = shard.graphs / f"{task.name}.onnx", shard.directory / f"{task.name}.plan"
        key = _fingerprint(graph, task, shard, compiler.options)
        if not cache.fetch(key, plan):
            content = compiler.compile(graph, task.profiles)
            cache.store(key, content)
            plan.write_bytes(content)
        seconds[plan.name] = round(time.perf_counter() - started, 1)
    compiler.save_timings()
    return seconds


def _fingerprint(graph: Path, task: Task, shard: Shard, options: dict[str, Any]) -> str:
    """Of everything that a plan depends on. Readers with equal encoders share its plans, and other slots leave the encoder's valid."""
    weights = graph.with_name(f"{graph.name}.data")
    return fingerprint(
        {
            "graph": sha256_of_file(graph),
            "weights": sha256_of_file(weights) if weights.exists() else None,
            "profiles": task.profiles,
            "precision": shard.precision,
            "options": options,
            "timings": TIMINGS,
            "target": dataclasses.asdict(shard.target),
        }
    )


class Compiler:
    """TensorRT by Polygraphy. The kernel timings of one build serve the next.

    Attributes:
        options: of the builder; a plan depends on them.

    Args:
        precision: of the graphs. Only TensorRT 8.6 needs it, as a builder flag.
        timing_cache: file of the timings; None keeps them in memory only.

    Raises:
        EngineError: if this TensorRT is too old, or does not have the precision.
    """

    def __init__(self, precision: str, timing_cache: Path | None = None):
        trt = self._trt = _tensorrt()
        self._strongly_typed = is_strongly_typed(trt.__version__) if trt.__name__ == "tensorrt" else True
        self._timing_cache = timing_cache
        self._timings = b""
        if timing_cache is not None and timing_cache.exists() and self._strongly_typed:
            self._timings = timing_cache.read_bytes()
        # layer names and shapes stay readable in the engine; this costs no time
        self.options: dict[str, Any] = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
        if not self._strongly_typed:
            family = compiler_of(trt.__version__)
            if family is None or precision not in family.precisions:
                raise EngineError(f"precision {precision} needs TensorRT 10 or later, here is {trt.__version__}; export float16")
            # the plugin libraries of this version need cuBLAS 12 and cuDNN 8; TensorRT's own kernels do without
            own = [trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS]
            # Several contexts of one profile, which is the default from 10 on. The list turns off all other preview features, "faster
            # dynamic shapes" among them, which makes no difference to single GEMMs.
            previews = [trt.PreviewFeature.PROFILE_SHARING_0806]
            self.options |= {
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
            EngineError: if TensorRT refuses the graph; its log, on standard error, names the node.
        """
        # Polygraphy looks for TensorRT when it is first imported; _tensorrt() has found it by now
        from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        G_LOGGER.module_severity = {"": G_LOGGER.ERROR}
        listed = []
        for shapes in profiles:
            profile = Profile()
            for name, (smallest, optimal, largest) in shapes.items():
                profile.add(name, min=smallest, opt=optimal, max=largest)
            listed.append(profile)
        try:
            builder, network, parser = network_from_onnx_path(str(path), **({"strongly_typed": True} if self._strongly_typed else {}))
            if not self._strongly_typed:
                _pin_types(self._trt, network, path)
            config = CreateConfig(profiles=listed, **self.options)(builder, network)
            config.avg_timing_iterations = TIMINGS
            # 8.6 writes a timing cache that it cannot read ("Myelin error from unknown graph"), so each of its builds times for itself.
            # The others get the timings as bytes: a cache object would keep its network, weights included, in memory.
            timings = None
            if self._strongly_typed:
                timings = config.create_timing_cache(self._timings)
                config.set_timing_cache(timings, True)
            plan = bytes(engine_bytes_from_network((builder, network, parser), config=config))
            if timings is not None:
                self._timings = bytes(timings.serialize())
            return plan
        except PolygraphyException as error:
            raise EngineError(f"{path.name}: TensorRT {self._trt.__version__} cannot build it: {error}") from error

    def save_timings(self) -> None:
        """Merge the timings into the file, for the next reader. Other processes that save at the same time lose nothing."""
        if self._timing_cache is None or not self._timings:
            return
        with file_lock(self._timing_cache.with_name(f"{self._timing_cache.name}.lock")):
            saved = self._timing_cache.read_bytes() if self._timing_cache.exists() else b""
            write_atomically(self._timing_cache, merged_timings(self._trt, saved, self._timings) if saved else self._timings)


def is_strongly_typed(version: str) -> bool:
    """Whether a TensorRT takes the types of the graph. One that is newer than all we know is taken to do so.

    Raises:
        EngineError: if it is older than all we know, or between them.
    """
    family = compiler_of(version)
    if family is None and version_of(version) < COMPILERS[-1].tensorrt.first:
        raise EngineError(f"TensorRT: wanted {', '.join(str(known.tensorrt) for known in COMPILERS)}, got {version}; see docs/gpu.md")
    return family is None or family.typing == "strong"


def merged_timings(trt: Any, saved: bytes, new: bytes) -> bytes:
    """Two serialized timing caches as one; `new` alone where `saved` is of another GPU or another TensorRT."""
    from polygraphy.backend.trt import get_trt_logger

    builder = trt.Builder(get_trt_logger())
    config = builder.create_builder_config()
    merged, other = config.create_timing_cache(new), config.create_timing_cache(saved)
    if merged is None or other is None or not merged.combine(other, False):
        return new
    return bytes(merged.serialize())


def _tensorrt() -> Any:
    """The TensorRT that Polygraphy uses: tensorrt, or tensorrt_rtx where POLYGRAPHY_USE_TENSORRT_RTX=1."""
    if os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") == "1":
        try:
            import tensorrt_rtx
        except ImportError:  # only the wheel of the bindings is installed, which has another name
            import tensorrt_rtx_bindings as tensorrt_rtx

            sys.modules["tensorrt_rtx"] = tensorrt_rtx  # Polygraphy imports it from here
        return tensorrt_rtx
    import tensorrt

    return tensorrt


def _pin_types(trt: Any, network: Any, path: Path) -> None:
    """Pin every arithmetic layer to the type that its node has in the graph, as TensorRT 10 does by itself.

    Otherwise 8.6 computes the norms in half precision. The types come from the ONNX file: 8.6 calls every tensor of its network float32
    where none was set.
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
