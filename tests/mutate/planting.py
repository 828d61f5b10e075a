"""Puts a fault into a file's text: finds the function that the fault names, and in it the piece of code that it changes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.mutate.faults import Fault

Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class StaleError(Exception):
    """A fault's place is gone: its file, its function, its piece of code, or a file of its tests."""


def file_of(fault: Fault) -> str:
    """The file that a fault is in."""
    return fault.place.partition(":")[0]


def plant(root: Path, fault: Fault) -> str:
    """The text of the fault's file under ``root`` with the fault in it. Raises StaleError when its place is gone."""
    file, _, name = fault.place.partition(":")
    gone = [each for each in (file, *re.findall(r"tests/\S+\.py", fault.tests)) if not (root / each).exists()]
    if gone:
        raise StaleError(f"there is no {gone[0]}")
    text = (root / file).read_text(encoding="utf-8")
    begin, end = _extent(text, name) if name else (0, len(text))
    found = list(_pattern(fault.before).finditer(text, begin, end))
    if len(found) != 1:
        raise StaleError(f"{fault.place} has {fault.before!r} {len(found)} times")
    return text[: found[0].start()] + fault.after + text[found[0].end() :]


def _pattern(before: str) -> re.Pattern[str]:
    """The piece of code as it stands, with any space or line's end where it has a space."""
    return re.compile(r"\s+".join(map(re.escape, before.split())))


def _extent(text: str, name: str) -> tuple[int, int]:
    """Where the function or class of that qualified name begins and ends, in characters."""
    nodes = [node for qualified, node in _named(ast.parse(text)) if qualified == name]
    if len(nodes) != 1:
        raise StaleError(f"there are {len(nodes)} of {name}")
    [node] = nodes
    lines = [f"{line}\n" for line in text.split("\n")]
    return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


def _named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Named]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Named):
            yield prefix + node.name, node
            yield from _named(node, f"{prefix}{node.name}.")
        else:
            yield from _named(node, prefix)
