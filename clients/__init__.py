"""Alias of the package fido_client, for one release: import fido_client instead.

The client is a distribution of its own (pip install ./clients). In a checkout this module loads it from clients/fido_client/, installed
or not, so that fido_client can be imported after it.
"""

import importlib
import importlib.util
import pathlib
import sys


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
