"""Mutation sites of a module: source text -> the places where one small change can be made, each with its variants.

The changes are cosmic-ray's operators. This module keeps those that a careless programmer would make (`<` for `<=`, `+` for `-`) and drops
those that no test should notice: type annotations, `frozen=True`, `strict=True`. It neither writes files nor runs tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

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
                if not _is_untested(node) and (family != "binary" or node.parent.type in BINARY_EXPRESSIONS):
                    variants.setdefault((line, column, family), []).append(Variant(name, occurrence))
    return [Site(line, column, tuple(found)) for (line, column, _), found in sorted(variants.items())]


def mutated(source: str, variant: Variant) -> str | None:
    """The source with one change, or None if it does not compile or does not differ."""
    changed = mutate_code(source, OperatorProvider()[variant.operator](), variant.occurrence)
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


def _is_untested(node: Any) -> bool:
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
        if parent.type == "decorator" and parent.get_code().strip().startswith(UNTESTED_CODE):
            return True
        child, parent = parent, parent.parent
    return False
