"""The GPU modules of serving/engines, imported on stand-ins for CuPy, TensorRT and the kernels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serving.engines import fake_cupy


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a module of serving.engines.gpu afresh, on the stand-ins."""
    package = importlib.import_module("serving.engines.gpu")
    before = {name for name in sys.modules if name.startswith("serving.engines.gpu.")}
    for name, module in fake_cupy.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    yield lambda name: importlib.import_module(f"serving.engines.gpu.{name}")
    for name in [name for name in sys.modules if name.startswith("serving.engines.gpu.")]:
        del sys.modules[name]
        vars(package).pop(name.removeprefix("serving.engines.gpu."), None)
