"""Which modules are mutated, and which fast tests must notice: module -> test paths, all relative to the repository's root."""

from __future__ import annotations

from pathlib import Path

# A folder stands for the modules and the test files in it. The first prefix that matches a module decides. The tests that are the quickest
# to fail come first.
TESTS_OF_MODULES: dict[str, tuple[str, ...]] = {
    "serving/contract/gemms.py": (
        "tests/serving/contract",
        "tests/serving/engines",
        "tests/export/tensorrt",
        "tests/export/test_repository.py",
    ),
    "serving/contract/profiles.py": ("tests/serving/contract", "tests/serving/engines", "tests/export/tensorrt"),
    "serving/contract/manifest.py": ("tests/serving/contract", "tests/export/test_repository.py", "tests/serving/pipeline/test_prompt.py"),
    "serving/contract/limits.py": ("tests/serving/contract", "tests/export/test_repository.py", "tests/serving/pipeline/test_request.py"),
    "serving/contract": ("tests/serving/contract", "tests/serving/pipeline", "tests/export/test_repository.py"),
    "serving/pipeline": ("tests/serving/pipeline",),
    "export/checkpoint": ("tests/export/checkpoint",),
    "export/tensorrt": ("tests/export/tensorrt",),
    "export/manifest_writer.py": ("tests/export/test_manifest_writer.py", "tests/export/test_repository.py", "tests/export/tensorrt"),
    "export/repository.py": ("tests/export/test_repository.py",),
}


def modules(root: Path, only: tuple[str, ...] = ()) -> list[str]:
    """The mutated modules that exist, by path; `only` keeps those at or below one of these paths."""
    paths = [path for target in TESTS_OF_MODULES for path in _python_files(root, target)]
    wanted = [path for path in dict.fromkeys(paths) if not only or any(_is_within(path, prefix) for prefix in only)]
    return sorted(wanted)


def tests_of(root: Path, module: str) -> tuple[str, ...]:
    """The existing test paths of a mutated module.

    Raises:
        LookupError: no entry of TESTS_OF_MODULES covers the module, or none of its tests exists.
    """
    for target, tests in TESTS_OF_MODULES.items():
        if _is_within(module, target):
            existing = tuple(path for path in tests if (root / path).exists())
            if existing:
                return existing
    raise LookupError(f"{module}: wanted tests in TESTS_OF_MODULES (tests/mutants/targets.py), got none that exist")


def _is_within(path: str, target: str) -> bool:
    return path == target or path.startswith(target.rstrip("/") + "/")


def _python_files(root: Path, target: str) -> list[str]:
    path = root / target
    files = [path] if path.is_file() else path.rglob("*.py")
    return [file.relative_to(root).as_posix() for file in files if file.name != "__init__.py"]
