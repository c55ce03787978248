"""Where the demo readers are exported and served from. A user's own readers are in build/engines and model_repository."""

from __future__ import annotations

from pathlib import Path

ENGINES = Path("build/demo/engines")
REPOSITORY = Path("build/demo/model_repository")
READERS = ("fid", "fido")
