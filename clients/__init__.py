"""Alias of the package fido_client, for one release: import fido_client instead.

The client is a distribution of its own (pip install ./clients). In a checkout this module loads it from clients/fido_client/, installed
or not, so that fido_client can be imported after it. `clients.reader_client` is
the module fido_client.reader_client itself, imported at its first use; likewise the others.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from collections.abc import Sequence

_MODULES = ("answer", "async_reader_client", "errors", "evaluation", "data.examples", "metrics", "reader_client", "request")
ALIASES = {f"{__name__}.{name.split('.')[-1]}": f"fido_client.{name}" for name in _MODULES}


class _Aliases(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `clients.NAME`, and puts the module `fido_client.NAME` in its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in ALIASES else None

    def exec_module(self, module: types.ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(ALIASES[module.__name__])


def _load_fido_client() -> None:
    """Make fido_client importable, from the checkout if this is one; nothing to do if it is loaded already."""
    if "fido_client" in sys.modules:
        return
    folder = pathlib.Path(__file__).parent / "fido_client"
    spec = importlib.util.spec_from_file_location("fido_client", folder / "__init__.py", submodule_search_locations=[str(folder)])
    if not folder.is_dir() or spec is None or spec.loader is None:
        importlib.import_module("fido_client")
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["fido_client"] = module
    spec.loader.exec_module(module)


_load_fido_client()
sys.meta_path.append(_Aliases())
