"""Literals and formulas read without running them: what stands where a scorer would eval a response."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

LONGEST = 2000  # characters
MOST_BITS = 4096.0  # of a number that powers make
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh", "coth",
    "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs",
}  # fmt: skip
_CONSTANTS = {"pi": "pi", "E": "E"}


def literal(text: str) -> Any:
    """The Python literal that `text` is. Raises ValueError for anything else, or one longer than LONGEST."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters; wanted at most {LONGEST}")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"no literal: {error}") from None


def sympy_expression(text: str, local_dict: Mapping[str, Any] | None = None) -> Any:
    """`text` as a sympy expression: + - * / // % **, numbers, names and the usual functions; built node by node.

    Gives what sympy.parse_expr gives for such a text, which hands it to eval. Raises ValueError for whatever else
    stands in it, for more than LONGEST characters and for powers of more than MOST_BITS bits.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters; wanted at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _built(tree.body, dict(local_dict or {}))
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no formula: {error}") from None


def _built(node: ast.expr, names: Mapping[str, Any]) -> Any:
    import sympy

    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return sympy.Float(str(node.value))
    if isinstance(node, ast.Name):
        if node.id in names:
            return names[node.id]
        if node.id in _FUNCTIONS:
            raise ValueError(f"{node.id} without an argument")
        return getattr(sympy, _CONSTANTS[node.id]) if node.id in _CONSTANTS else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _built(node.operand, names)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _built(node.left, names), _built(node.right, names)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
            return left**right
        operations = {
            ast.Add: lambda: left + right, ast.Sub: lambda: left - right, ast.Mult: lambda: left * right,
            ast.Div: lambda: left / right, ast.FloorDiv: lambda: left // right, ast.Mod: lambda: left % right,
        }  # fmt: skip
        if type(node.op) in operations:
            return operations[type(node.op)]()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if len(node.args) in (1, 2) and not node.keywords:
            return getattr(sympy, node.func.id)(*(_built(argument, names) for argument in node.args))
    raise ValueError(f"{type(node).__name__} has no place in a formula")


def _check_power(base: Any, exponent: Any) -> None:
    """Refuses a number too long to be an answer before it is computed."""
    if not exponent.is_number:
        return
    size = abs(float(exponent))
    bits = abs(math.log2(abs(float(base)))) if base.is_number and base != 0 and base.is_finite else 8.0
    if not math.isfinite(size) or size * max(bits, 1.0) > MOST_BITS:
        raise ValueError(f"a power of more than {MOST_BITS:.0f} bits")
