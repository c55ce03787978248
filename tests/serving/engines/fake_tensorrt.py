"""As much of TensorRT 8.6, 10 and 11 as the runtime uses, each with the attributes of its version only.

A plan is JSON: the names and types of its tensors, and the bytes of its activations.
test_tensorrt.py compares version 11 with the real package.
"""

from __future__ import annotations

import enum
import json
import types
from typing import Any

VERSIONS = ("8.6.0", "10.13.0", "11.4.0")
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}  # as TensorRT calls them


def plan(tensors: list[str], memory: int = 0, **types: str) -> bytes:
    """`types`: of the tensors that are not fp16."""
    return json.dumps({"tensors": tensors, "memory": memory, "types": types}).encode()


class Context:
    """Records its calls."""

    def __init__(self) -> None:
        self.profiles: list[int] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.refuses = ""  # the name of a method that fails

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profiles.append(profile)
        return self.refuses != "set_optimization_profile_async"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return self.refuses != "set_input_shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.refuses != "set_tensor_address"

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        return self.refuses != "execute_async_v3"


class Context8(Context):
    device_memory = 0


class Context10(Context):
    def set_device_memory(self, address: int, size: int) -> None:
        self.device_memory, self.device_memory_size = address, size


class Engine:
    def __init__(self, content: dict[str, Any]):
        self._content = content
        self.contexts: list[Any] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self._content["tensors"])

    def get_tensor_name(self, index: int) -> str:
        return str(self._content["tensors"][index])

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=self._content["types"].get(name, "HALF"))

    def _new(self, context: Context) -> Context:
        self.contexts.append(context)
        return context


class Engine8(Engine):
    @property
    def device_memory_size(self) -> int:
        return int(self._content["memory"])

    def create_execution_context_without_device_memory(self) -> Context:
        return self._new(Context8())


class Engine10(Engine8):
    @property
    def device_memory_size_v2(self) -> int:
        return int(self._content["memory"])

    def create_execution_context_without_device_memory(self) -> Context:
        return self._new(Context10())


class Engine11(Engine):
    @property
    def device_memory_size_v2(self) -> int:
        return int(self._content["memory"])

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy is Strategy.USER_MANAGED
        return self._new(Context10())


class Strategy(enum.Enum):
    STATIC, USER_MANAGED = range(2)


def module(version: str) -> types.ModuleType:
    """What to put into sys.modules as `tensorrt`; `runtimes` and `loggers` list those that were created."""
    trt = types.ModuleType("tensorrt")
    created: dict[str, list[Any]] = {"runtimes": [], "loggers": []}

    class Logger:
        WARNING = "warning"

        def __init__(self, severity: str):
            assert severity == self.WARNING
            created["loggers"].append(self)

    class Runtime:
        def __init__(self, logger: Logger):
            self.engines: list[Engine] = []
            created["runtimes"].append(self)

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            if not content.startswith(b"{"):
                return None
            engine = {"8": Engine8, "10": Engine10, "11": Engine11}[version.split(".")[0]](json.loads(content))
            self.engines.append(engine)
            return engine

    contents: dict[str, Any] = {"__version__": version, "Logger": Logger, "Runtime": Runtime, **created}
    if version.startswith(("10", "11")):
        contents["ExecutionContextAllocationStrategy"] = Strategy
    for name, value in contents.items():
        setattr(trt, name, value)
    return trt
