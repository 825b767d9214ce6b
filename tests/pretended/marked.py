"""Which lines of ours run: a mark before the statements that are asked for, put there while a module is imported.

(A trace function would be called for every line of every library.)
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Marks(importlib.abc.MetaPathFinder):
    """Put it into sys.meta_path before anything of ours is imported."""

    def __init__(self, wanted: dict[str, set[int]]):
        self.wanted = wanted
        self.ran: dict[str, set[int]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] not in ("vlm_dist", "vlm_kernels"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin and (file := _relative(spec.origin)) in self.wanted:
            spec.loader = _Loader(fullname, spec.origin, file, self)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, file: str, marks: Marks):
        super().__init__(name, path)
        self.file, self.marks = file, marks

    def get_code(self, fullname: str) -> Any:
        tree = _Marker(self.marks.wanted[self.file]).visit(ast.parse(Path(self.path).read_bytes()))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

    def exec_module(self, module: Any) -> None:
        module.__dict__["__ran__"] = self.marks.ran.setdefault(self.file, set()).add
        super().exec_module(module)


class _Marker(ast.NodeTransformer):
    def __init__(self, wanted: set[int]):
        self.wanted = wanted

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and not isinstance(node, (ast.Module, ast.ClassDef)):
                setattr(node, field, [one for statement in statements for one in (*self._marks(statement), statement)])
        return node

    def _marks(self, statement: Any) -> list[ast.stmt]:
        """One for each wanted line of a simple statement, or of the head of a compound one."""
        inner = getattr(statement, "body", None)
        last = inner[0].lineno - 1 if isinstance(inner, list) and inner else statement.end_lineno
        lines = sorted(self.wanted & set(range(statement.lineno, max(last, statement.lineno) + 1)))
        return [ast.copy_location(ast.parse(f"__ran__({line})").body[0], statement) for line in lines]


def _relative(path: str) -> str:
    file = Path(path)
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else ""


def listen(wanted: dict[str, set[int]]) -> Marks:
    """Mark these lines of modules that are imported from now on.

    Raises:
        RuntimeError: ours are imported already.
    """
    if any(name.partition(".")[0] in ("vlm_dist", "vlm_kernels") for name in sys.modules):
        raise RuntimeError("modules of ours are imported already")
    marks = Marks(wanted)
    sys.meta_path.insert(0, marks)
    return marks
