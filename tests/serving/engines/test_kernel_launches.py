"""kernels.py against the CUDA sources: defines, number of arguments, shared memory of every launch; and every source compiles.

NVRTC compiles without a GPU. What the kernels compute is tested on one, in tests/gpu.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from serving.contract.call_sizes import attention_tiles
from serving.contract.gemms import StackSizes
from serving.contract.manifest import EngineError
from serving.contract.tensors import EngineSizes
from tests.serving.engines import fake_cupy

STACK = StackSizes(768, 12, 12, 12, 64, 2048, True, 1e-6)
DEFAULT_SHARED_BYTES = 48 * 1024
H100_SHARED_BYTES = 227 * 1024
ATTENTION_STATIC_BYTES = 2 * 2 * 64 * (64 + 8) * 2  # two stages of 64 keys and values, as encoder_attention.cu declares them
KERNEL = re.compile(r'extern "C" __global__ void(?: __launch_bounds__\([^{]*?\))? (\w+)\((.*?)\)\s*\{', re.DOTALL)


class Kernel:
    """A compiled kernel: checks its launches as the driver would."""

    def __init__(self, name: str, parameters: int):
        self.name, self.parameters = name, parameters
        self.shared_size_bytes = ATTENTION_STATIC_BYTES if name == "attention" else 0
        self.max_dynamic_shared_size_bytes = DEFAULT_SHARED_BYTES - self.shared_size_bytes
        self.launches: list[int] = []

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int = 0) -> None:
        assert len(arguments) == self.parameters, self.name
        assert all(size > 0 for size in (*grid, *block)) and np.prod(block) <= 1024, self.name
        assert shared_mem <= self.max_dynamic_shared_size_bytes, f"{self.name}: CUDA_ERROR_INVALID_VALUE"
        self.launches.append(shared_mem)


class RawModule:
    modules: ClassVar[list[RawModule]] = []

    def __init__(self, code: str, options: tuple[str, ...]):
        self.source, self.options = code, options
        self.code = re.sub(r'//.*|"(?!C")[^"\n]*"', "", code)
        self.defines = {option[2:].split("=")[0] for option in options if option.startswith("-D")}
        self.kernels = {name: Kernel(name, parameters.count(",") + 1) for name, parameters in KERNEL.findall(self.code)}
        self.modules.append(self)

    def get_function(self, name: str) -> Kernel:
        return self.kernels[name]


@pytest.fixture
def kernels(runtime: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real kernels.py."""
    monkeypatch.delitem(sys.modules, "serving.engines.gpu.kernels")
    cupy: Any = sys.modules["cupy"]
    monkeypatch.setattr(RawModule, "modules", [])
    monkeypatch.setattr(cupy, "RawModule", RawModule, raising=False)
    monkeypatch.setattr(cupy.cuda.runtime, "cudaDevAttrMaxSharedMemoryPerBlockOptin", 97, raising=False)
    attributes = {97: H100_SHARED_BYTES}
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetAttribute", lambda attribute, device: attributes[attribute], raising=False)
    return importlib.import_module("serving.engines.gpu.kernels")


def empty(*shape: int, dtype: Any = np.float16) -> Any:
    return fake_cupy.array(np.zeros(shape, dtype))


def launch_everything(kernels: Any, kv_heads: int, *, cross_fp8: bool = False) -> None:
    """Every kernel once, with the shapes of a base reader."""
    rows, heads, width, capacity = 24, 12, 768, 10_240
    row_kernels = kernels.RowKernels(STACK)
    weight, residual, normed = empty(width, dtype=np.float32), empty(rows, width, dtype=np.float32), empty(rows, width)
    numbers = empty(rows, dtype=np.int32)
    row_kernels.embed(numbers, empty(97, width), weight, residual, normed)
    row_kernels.add_and_norm(empty(4, rows, width), weight, residual, normed)
    row_kernels.add_and_norm(empty(rows, width), weight, residual, normed, numbers)
    row_kernels.activate(empty(rows, 2 * 2048), empty(rows, 2048))
    skinny = kernels.SkinnyGemm()
    for k_rows in (1, 24, 48):
        x, w, y = empty(k_rows, kernels.MAX_K), empty(kernels.MAX_K, 64), empty(k_rows, 64)
        assert skinny.takes(x, w)
        skinny.multiply(x, w, y)
    step = kernels.StepKernels(EngineSizes(width, width, 12, (5, 11), heads, kv_heads, 64, 32_128), cross_fp8=cross_fp8)
    qkv, cache, out = empty(rows, (heads + 2 * kv_heads) * 64), empty(1, capacity, 2 * kv_heads * 64), empty(rows, width)
    step.self_attention(qkv, cache, numbers, numbers, empty(32, heads, dtype=np.float32), out)
    softmax = empty(rows, heads, 2, dtype=np.float32)
    scales = None
    if cross_fp8:
        caches, scales = empty(2, 1, 2, kv_heads, capacity, 64, dtype=np.uint8), empty(2, kv_heads, dtype=np.float32)
        step.quantize_cross_kv(empty(2, *cache.shape[1:]), empty(2, 2, kv_heads, dtype=np.float32), capacity, caches, 0)
        cache = caches[0]
    inputs = (empty(rows, width), cache, scales, numbers, numbers, numbers, None, numbers)
    step.cross_attention(*inputs, empty(1, dtype=np.float32), softmax, out)
    step.attribution(*inputs, softmax, 0, empty(rows, capacity, dtype=np.float32))
    head = kernels.HeadKernels(width, 32_128, 1)
    head.combine_argmax(empty(rows, width), empty(97, width), weight, head.scratch(rows), numbers, weight)
    lengths = np.array([250, 256])
    kernels.EncoderAttention(STACK, 128, 256)(empty(506, 3 * width), attention_tiles(lengths), 256, weight, empty(506, width))


@pytest.mark.parametrize(("kv_heads", "cross_fp8"), [(12, False), (12, True), (1, False)])
def test_every_kernel_is_launched_with_as_many_arguments_as_it_has(kv_heads: int, cross_fp8: bool, kernels: Any) -> None:
    launch_everything(kernels, kv_heads, cross_fp8=cross_fp8)
    launched = {kernel.name for module in RawModule.modules for kernel in module.kernels.values() if kernel.launches}
    left_out = set() if cross_fp8 else {"quantize_cross_kv"}
    assert launched == {kernel for module in RawModule.modules for kernel in module.kernels} - left_out
    assert len(launched) == 11 + cross_fp8


def test_every_constant_of_a_source_is_declared_or_defined_and_every_define_is_used(kernels: Any) -> None:
    launch_everything(kernels, 1)
    for module in RawModule.modules:
        used = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", module.code))
        declared = set(re.findall(r"\b([A-Z][A-Z0-9_]+)\s*=[^=]", module.code))
        assert used - declared == module.defines, sorted(module.kernels)


def nvrtc() -> tuple[ctypes.CDLL, str]:
    """The compiler's library, and the folder of its headers."""
    folders = (
        [importlib.util.find_spec(f"nvidia.cuda_{name}") for name in ("nvrtc", "runtime")] if importlib.util.find_spec("nvidia") else []
    )
    if not folders or None in folders:
        pytest.skip("nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12 are not installed")
    library, headers = (Path(next(iter(spec.submodule_search_locations or ()))) for spec in folders if spec)
    return ctypes.CDLL(str(library / "lib" / "libnvrtc.so.12")), str(headers / "include")


def compiler_output(source: str, options: tuple[str, ...]) -> str:
    """What NVRTC says of a source that it does not compile; nothing if it does."""
    library, headers = nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"source.cu", 0, None, None)
    # as CuPy calls it
    listed = [option.encode() for option in (*options, f"-I{headers}", "-default-device", "--disable-warnings")]
    failed = library.nvrtcCompileProgram(program, len(listed), (ctypes.c_char_p * len(listed))(*listed))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    said = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, said)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return said.value.decode() or "failed" if failed else ""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_source_compiles(architecture: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_everything(kernels, 1)
    launch_everything(kernels, 12)
    if architecture not in ("sm_80", "sm_86"):
        launch_everything(kernels, 12, cross_fp8=True)
    stream = importlib.import_module("serving.engines.gpu.library.stream_kernels")
    for narrow in (False, True) if architecture not in ("sm_80", "sm_86") else (False,):
        stream.StreamKernels(STACK, narrow=narrow, ordered=narrow)
    if architecture == "sm_90":
        monkeypatch.delitem(sys.modules, "serving.engines.gpu.hopper_attention")
        hopper = importlib.import_module("serving.engines.gpu.hopper_attention")
        for bfloat16, fp8 in ((False, False), (True, False), (False, True)):
            hopper.HopperAttention(STACK, 128, bfloat16=bfloat16, fp8=fp8)
    of_module = {(module.source, module.options): module for module in RawModule.modules}
    for source, options in of_module:
        target = () if any(option.startswith("-arch=") for option in options) else (f"-arch={architecture}",)
        assert compiler_output(source, (*options, *target)) == "", options


def test_fp8_is_in_no_source_of_a_card_that_has_none(kernels: Any) -> None:
    launch_everything(kernels, 12, cross_fp8=True)
    module = next(module for module in RawModule.modules if "-DCROSS_FP8=1" in module.options)
    assert "sm_89" in compiler_output(module.source, (*module.options, "-arch=sm_80"))


@pytest.mark.parametrize("passage_length", [256, 3_008, 3_009, 40_000])
def test_attention_has_the_shared_memory_of_the_longest_passage(passage_length: int, kernels: Any) -> None:
    """The default of 48 KB per block is used up by passages of 3,008 tokens."""
    attend = kernels.EncoderAttention(STACK, 128, passage_length)
    tiles = attention_tiles(np.array([passage_length]))
    attend(empty(1, 1), tiles, passage_length, empty(1), empty(1))
    (used,) = RawModule.modules[-1].kernels["attention"].launches
    assert used >= 4 * (passage_length + 64)  # a float for every distance between a tile's queries and the keys


def test_passages_that_are_too_long_for_the_gpu_are_refused_by_name(kernels: Any) -> None:
    longest = 48_832
    kernels.EncoderAttention(STACK, 128, longest)
    said = r"passage_length: wanted at most 48832, .* 232,448 bytes of shared memory per block, got 48833; export"
    with pytest.raises(EngineError, match=said):
        kernels.EncoderAttention(STACK, 128, longest + 1)
