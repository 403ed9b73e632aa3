"""Whoever calls a public function with arrays finds in its docstring, or its class's, which shapes they have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pocketmoe"
ARRAYS = {"ndarray", "NDArray", "Floats", "Doubles", "Bytes", "torch.Tensor"}  # types that hold arrays
SHAPE = re.compile(r"\[(?:[^\[\]`]|\.\.\.)+\]")  # [tokens, hidden], [N, K / block], [..., n], [1]


def names_in(annotation: ast.expr | None) -> set[str]:
    """Every name in a type, those in quoted ones included."""
    if annotation is None:
        return set()
    found: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= names_in(ast.parse(node.value, mode="eval").body) if node.value.isidentifier() else set()
    return found


def takes_arrays(function: ast.FunctionDef) -> bool:
    """Whether a parameter or the result is an array, or a collection of them; a callable is told of by its alias."""
    arguments = function.args
    annotated = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return any(names_in(part) & ARRAYS and "Callable" not in names_in(part) for part in (*annotated, function.returns))


def unshaped(tree: ast.Module) -> Iterator[str]:
    """Public functions and methods with arrays for which neither they nor their class give a shape."""

    def visit(body: list[ast.stmt], prefix: str, said_by_class: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{node.name}.", ast.get_docstring(node) or "")
            elif isinstance(node, ast.FunctionDef) and takes_arrays(node):
                if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
                    continue
                said = f"{ast.get_docstring(node) or ''} {said_by_class}"
                if not SHAPE.search(said):
                    yield f"{prefix}{node.name}"

    yield from visit(tree.body, "", "")


def test_docstrings_give_shapes() -> None:
    silent = [
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in unshaped(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_what_has_no_shape_is_found() -> None:
    """A parameter, a result, a tuple of arrays, a method; not what is private, takes none, or is told of."""
    source = '''
import numpy as np
def takes(x: np.ndarray) -> int: ...
def gives(n: int) -> tuple[np.ndarray, int]:
    """An array."""
def told(x: np.ndarray) -> int:
    """x: float32 [rows, width]."""
def _private(x: np.ndarray) -> None: ...
def none(items: list[int]) -> int: ...
class Told:
    """x: [n]."""
    def told(self, x: np.ndarray) -> None: ...
class Silent:
    def method(self, x: "Floats") -> None: ...
    def __init__(self, x: np.ndarray) -> None: ...
'''
    assert list(unshaped(ast.parse(source))) == ["takes", "gives", "Silent.method", "Silent.__init__"]
