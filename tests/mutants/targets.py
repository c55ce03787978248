"""What is mutated: the modules, the fast tests that must notice, and the places of a module where one small change can be made.

The changes are cosmic-ray's operators. This module keeps those that a careless programmer would make (`<` for `<=`, `+` for `-`) and drops
those that no test should notice: type annotations, `frozen=True`, `strict=True`, numbers that only decide speed. It neither writes files
nor runs tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

# A folder stands for the modules and the test files in it. The first prefix that matches a module decides. The tests that are the quickest
# to fail come first.
TESTS_OF_MODULES: dict[str, tuple[str, ...]] = {
    "serving/contract/gemms.py": (
        "tests/serving/contract",
        "tests/serving/engines/test_gpu_runtime.py",
        "tests/export/tensorrt/test_compiler.py",
        "tests/export/test_repository.py",
    ),
    "serving/contract/profiles.py": ("tests/serving/contract", "tests/serving/engines/test_tensorrt.py"),
    "serving/contract/manifest.py": (
        "tests/serving/contract",
        "tests/serving/pipeline/test_request.py",
        "tests/export/test_manifest_writer.py",
        "tests/export/test_repository.py",
        "tests/serving/engines/test_device.py",
    ),
    "serving/contract/limits.py": (
        "tests/serving/contract",
        "tests/serving/pipeline/test_request.py",
        "tests/export/test_repository.py",
        "tests/export/test_readers.py",
    ),
    "serving/contract/library_kernels.py": ("tests/serving/contract", "tests/export/library"),
    "serving/contract/kv_memory.py": ("tests/serving/contract", "tests/serving/engines/test_gpu_runtime.py"),
    "serving/contract/call_sizes.py": (
        "tests/serving/contract",
        "tests/serving/engines/test_gpu_runtime.py",
        "tests/export/test_repository.py",
    ),
    "serving/contract": (
        "tests/serving/contract",
        "tests/serving/pipeline/test_request.py",
        "tests/serving/pipeline/test_request.py",
        "tests/serving/triton/test_models.py",
        "tests/export/test_repository.py",
        "tests/serving/pipeline/test_in_flight.py",
    ),
    "serving/pipeline/scheduler.py": ("tests/serving/pipeline/test_scheduler.py", "tests/serving/pipeline/test_in_flight.py"),
    "serving/pipeline/request.py": ("tests/serving/pipeline/test_request.py", "tests/serving/triton/test_models.py"),
    "serving/pipeline/prompt.py": (
        "tests/serving/pipeline/test_request.py",
        "tests/serving/pipeline/test_truncation.py",
        "tests/serving/pipeline/test_in_flight.py",
    ),
    "serving/pipeline/answer_cache.py": ("tests/serving/pipeline/test_answer_cache.py",),
    "serving/pipeline/beam_search.py": ("tests/serving/pipeline/test_beam_search.py",),
    "serving/pipeline/elimination.py": ("tests/serving/pipeline/test_elimination.py",),
    "serving/pipeline/encoder_cache.py": ("tests/serving/pipeline/test_encoder_cache.py",),
    "serving/pipeline/in_process.py": ("tests/serving/pipeline/test_in_flight.py",),
    "serving/pipeline": ("tests/serving/pipeline/test_request.py", "tests/serving/pipeline/test_truncation.py"),
    "export/checkpoint": (
        "tests/export/checkpoint",
        "tests/export/model/test_parity.py",
        "tests/field/test_b_checkpoints.py",
        "tests/export/test_command_line.py",
        "tests/field/test_b_damaged_checkpoints.py",
    ),
    "export/tensorrt": ("tests/export/tensorrt",),
    "export/manifest_writer.py": (
        "tests/export/test_manifest_writer.py",
        "tests/export/test_repository.py",
        "tests/export/tensorrt/test_compiler.py",
    ),
    "export/repository.py": ("tests/export/test_repository.py",),
}
# Survivors that no test can or need notice: (module, line before, line after) -> `equivalent: ...` or `accepted: ...`. They count as
# survivors: the score says how many changes the tests notice, not how many somebody has excused.
ACCEPTED: dict[tuple[str, str, str], str] = {}


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


BINARY_EXPRESSIONS = ("arith_expr", "term", "power", "expr", "and_expr", "xor_expr", "shift_expr")
NEAR_BINARY = {
    "Add": ("Sub",),
    "Sub": ("Add",),
    "Mul": ("FloorDiv", "Add"),
    "Div": ("Mul",),
    "FloorDiv": ("Mul",),
    "Mod": ("FloorDiv",),
    "Pow": ("Mul",),
    "RShift": ("LShift",),
    "LShift": ("RShift",),
    "BitOr": ("BitAnd",),
    "BitAnd": ("BitOr",),
    "BitXor": ("BitOr",),
}
NEAR_COMPARISONS = {
    "Eq": ("NotEq",),
    "NotEq": ("Eq",),
    "Lt": ("LtE", "GtE"),
    "LtE": ("Lt", "Gt"),
    "Gt": ("GtE", "LtE"),
    "GtE": ("Gt", "Lt"),
    "Is": ("IsNot",),
    "IsNot": ("Is",),
}
OTHER_OPERATORS = (
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_USub_UAdd",
)
# Promises to the reader of the code, or to a type checker: their absence changes nothing that a caller sees.
UNTESTED_ARGUMENTS = ("frozen", "slots", "strict", "kw_only")
# Constants that decide how fast an answer comes or how much memory it takes, and never what it is. One more or less of them is no fault.
TUNING = (
    *("BOUNDARY_SEARCH", "CACHED_PER_STEP", "CHARACTERS_PER_TOKEN", "EOS_FORBIDDEN", "FIRST_MARGIN", "GROWTH", "MAX_CACHE_BYTES"),
    *("MAX_CHARACTERS", "MAX_TOKENIZERS", "MAX_WORDS", "NAME_BYTES", "PASSAGES_PER_CHUNK", "PASSAGES_PER_STEP", "PASSAGES_PER_TASK"),
    *("TIMINGS", "WAITING_CHECKED"),
)
UNTESTED_CODE = ("TYPE_CHECKING", "@abc.abstractmethod", "@functools.cache", "@functools.lru_cache", "@overload")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One change at a site: the cosmic-ray operator and how many of its mutations come before it in the module."""

    operator: str
    occurrence: int


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a module.

    Attributes:
        line: Of the source, from 1.
        column: From 0.
        variants: At least one.
    """

    line: int
    column: int
    variants: tuple[Variant, ...]


def mutation_sites(source: str) -> list[Site]:
    """All sites of a module's source, in the order of the text."""
    variants: dict[tuple[int, int, str], list[Variant]] = {}
    counts: dict[str, int] = {}
    operators = [(name, family, OperatorProvider()[name]()) for name, family in _operator_names()]
    for node in ast_nodes(get_ast(source)):
        for name, family, operator in operators:
            for (line, column), _ in operator.mutation_positions(node):
                occurrence = counts[name] = counts.get(name, -1) + 1
                if not _is_untested(node, name) and (family != "binary" or node.parent.type in BINARY_EXPRESSIONS):
                    variants.setdefault((line, column, family), []).append(Variant(name, occurrence))
    return [Site(line, column, tuple(found)) for (line, column, _), found in sorted(variants.items())]


def mutated(source: str, variant: Variant) -> str | None:
    """The source with one change, or None if it does not compile or does not differ."""
    try:
        changed = mutate_code(source, OperatorProvider()[variant.operator](), variant.occurrence)
    except AttributeError:  # cosmic-ray's ExceptionReplacer knows no exception with a dot in its name
        return None
    if changed is None or changed == source:
        return None
    try:
        compile(changed, "mutant", "exec")
    except SyntaxError:
        return None
    return changed


def _operator_names() -> Iterator[tuple[str, str]]:
    """Each cosmic-ray operator in use, and its family: operators of one family at one place are variants of one site."""
    for family, prefix, table in (
        ("binary", "ReplaceBinaryOperator", NEAR_BINARY),
        ("comparison", "ReplaceComparisonOperator", NEAR_COMPARISONS),
    ):
        for before, near in table.items():
            yield from ((f"{prefix}_{before}_{after}", family) for after in near)
    for name in OTHER_OPERATORS:
        yield name, name


def _is_untested(node: Any, operator: str) -> bool:
    if node.get_code().strip().startswith(UNTESTED_CODE) and node.type in ("decorator", "decorated"):
        return True
    if node.type == "if_stmt" and "TYPE_CHECKING" in node.children[1].get_code():
        return True
    child, parent = node, node.parent
    while parent is not None:
        if parent.type in ("tfpdef", "annassign") and child is parent.children[1 if parent.type == "annassign" else 2]:
            return True
        if parent.type == "param" and parent.annotation is child:
            return True
        if parent.type == "funcdef" and parent.annotation is child:
            return True
        if parent.type == "argument" and parent.children[0].get_code().strip() in UNTESTED_ARGUMENTS:
            return True
        if operator.endswith("NumberReplacer") and parent.type == "expr_stmt" and parent.children[0].get_code().strip() in TUNING:
            return True
        if parent.type == "decorator" and parent.get_code().strip().startswith(UNTESTED_CODE):
            return True
        child, parent = parent, parent.parent
    return False
