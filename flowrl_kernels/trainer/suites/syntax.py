"""A program's syntax tree without what does not matter: names of one's own, comments, docstrings, hints, imports.

The text is parsed, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

LONGEST = 1 << 16  # characters of a program that are read
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def normal_form(source: str) -> str | None:
    """The same text for programs that differ in names, layout, comments, docstrings, type hints and imports alone.

    Order and shape of statements count. None for what does not parse.
    """
    if len(source) > LONGEST:
        return None
    try:
        tree = ast.parse(source)
        return ast.dump(_Normal(tree).visit(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Normal(ast.NodeTransformer):
    def __init__(self, tree: ast.Module):
        self.scopes: list[dict[str, str]] = []
        self.made = 0
        self._open(tree)

    def _open(self, node: ast.AST) -> None:
        names: dict[str, str] = {}
        outside: set[str] = set()
        for kind, name in _bindings(node):
            if kind == "outside":
                outside.add(name)
            elif name not in names:
                names[name] = kind if kind != "own" else ""
        for name in names:
            if not names[name]:
                names[name] = f"v{self.made}"
                self.made += 1
        self.scopes.append({name: new for name, new in names.items() if name not in outside})

    def _name(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _SCOPES):
            return super().visit(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.name = self._name(node.name)
            node.returns = None
            node.type_comment = None
        self._open(node)
        try:
            return super().visit(node)
        finally:
            self.scopes.pop()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _idle(part)]  # type: ignore[attr-defined]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._name(node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(arg=self._name(node.arg))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self._name(node.name)
        return self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        node.name = node.name and self._name(node.name)
        return self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> ast.AST:
        node.names = [self._name(name) for name in node.names]
        return node

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.AST:
        node.names = [self._name(name) for name in node.names]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.visit(ast.Assign(targets=[node.target], value=node.value))


def _idle(node: ast.AST) -> bool:
    """A statement that does nothing here: an import, a text of its own, pass."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def _bindings(scope: ast.AST) -> Iterator[tuple[str, str]]:
    """(what it becomes, name) of each name that a scope binds: "own" for a name of the program, what was imported
    for an import, "outside" for a global or nonlocal one. Inner scopes are not entered; a class's names, which are
    reached as attributes, keep theirs.
    """
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        a = scope.args
        for arg in (*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])):
            yield "own", arg.arg
    inner: list[ast.AST] = [scope.body] if isinstance(scope, ast.Lambda) else list(ast.iter_child_nodes(scope))
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        inner = [*scope.body]
    waiting = inner[::-1]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield f"{module}{alias.name if alias.asname else name}", name
        elif isinstance(node, ast.Global | ast.Nonlocal):
            for name in node.names:
                yield "outside", name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield "own", node.name
            continue
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            continue  # a hint alone
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield "own", node.id
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield "own", node.name
        if not isinstance(node, _SCOPES):
            waiting += list(ast.iter_child_nodes(node))[::-1]
