"""Arithmetic over a few numbers: a parser, a canonical form, and every way to reach a value.

Two expressions are the same solution when they differ only by commutativity, associativity and the signs or
inversions these move: 2+3+1 and 3+(1+2), 6/(3/2) and 6*2/3, 5-(2-1) and 1+5-2. `Expression` holds such a
class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

OPERATORS = "+-*/"
MAX_DEPTH = 50  # nested parentheses; an answer to a handful of numbers needs fewer
MAX_TOKENS = 1000  # numbers, operators and brackets; the canonical form costs the square of them
_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")


@dataclass(frozen=True)
class Expression:
    """A value and how it is made: kind "n" a number, "s" a sum, "p" a product.

    plus, minus: sorted texts of what is added and subtracted (or multiplied and divided by); sums and
    products are flattened, so equal solutions are equal objects.
    """

    value: Fraction
    kind: str
    plus: tuple[str, ...]
    minus: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The canonical text, itself a valid expression."""
        join, take = ("+", "-") if self.kind == "s" else ("*", "/")
        return join.join(self.plus) + "".join(take + part for part in self.minus)


def number(value: int) -> Expression:
    """The expression that is one number."""
    return Expression(Fraction(value), "n", (str(value),))


def _parts(e: Expression, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if e.kind == kind:
        return e.plus, e.minus
    return ((f"({e.text})" if kind == "p" and e.kind == "s" else e.text),), ()


def combine(a: Expression, operator: str, b: Expression, whole: bool = False) -> Expression | None:
    """`a operator b`; None for a division by zero, and with `whole` for a negative or fractional value."""
    if operator == "+":
        value = a.value + b.value
    elif operator == "-":
        value = a.value - b.value
    elif operator == "*":
        value = a.value * b.value
    elif b.value == 0:
        return None
    else:
        value = a.value / b.value
    if whole and (value < 0 or value.denominator != 1):
        return None
    kind = "s" if operator in "+-" else "p"
    (a_plus, a_minus), (b_plus, b_minus) = _parts(a, kind), _parts(b, kind)
    if operator in "-/":
        b_plus, b_minus = b_minus, b_plus
    return Expression(value, kind, tuple(sorted(a_plus + b_plus)), tuple(sorted(a_minus + b_minus)))


def parse(text: str) -> tuple[Expression, list[int]] | None:
    """Read an infix expression: its canonical form and its numbers in the order written.

    Grammar: sums of products of numbers and parentheses, usual precedence, no signs. Exact rational values.
    None for anything that is not such an expression, divides by zero, nests deeper than MAX_DEPTH or is
    longer than MAX_TOKENS.
    """
    tokens: list[str] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or len(tokens) == MAX_TOKENS:
            return None
        tokens.append(match.group(1))
        at = match.end()
    try:
        expression, end, numbers = _sum(tokens, 0, 0)
    except _Malformed:
        return None
    return (expression, numbers) if end == len(tokens) else None


class _Malformed(Exception):
    pass


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Expression, int, list[int]]:
    if depth > MAX_DEPTH:
        raise _Malformed
    return _chain(tokens, at, depth, "+-", lambda i: _chain(tokens, i, depth, "*/", lambda j: _atom(tokens, j, depth)))


def _chain(tokens, at, depth, operators, operand):
    left, at, numbers = operand(at)
    while at < len(tokens) and tokens[at] in operators:
        operator = tokens[at]
        right, at, more = operand(at + 1)
        combined = combine(left, operator, right)
        if combined is None:
            raise _Malformed
        left, numbers = combined, numbers + more
    return left, at, numbers


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Expression, int, list[int]]:
    if at >= len(tokens):
        raise _Malformed
    if tokens[at] == "(":
        inside, at, numbers = _sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise _Malformed
        return inside, at + 1, numbers
    if not tokens[at].isdigit():
        raise _Malformed
    value = int(tokens[at])
    return number(value), at + 1, [value]


@lru_cache(maxsize=100_000)
def expressions(numbers: tuple[int, ...], whole: bool) -> frozenset[Expression]:
    """Every different solution that uses each of the sorted `numbers` once, whatever its value.

    whole: every intermediate value is a non-negative integer.
    """
    if len(numbers) == 1:
        return frozenset([number(numbers[0])])
    found = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)
        for a in expressions(left, whole):
            for b in expressions(right, whole):
                for operator in OPERATORS:
                    if (operator in "-/" or (left, a.text) <= (right, b.text)) and (
                        e := combine(a, operator, b, whole)
                    ):
                        found.add(e)
    return frozenset(found)


def chains(numbers: Sequence[int]) -> Iterator[str]:
    """Every way to write `numbers` down as steps `a*b=c,c+d=e`, whole values throughout; some come twice."""
    yield from _chains(tuple(sorted(numbers)), "")


def _chains(values: tuple[int, ...], text: str) -> Iterator[str]:
    if len(values) == 1:
        yield text[1:]
        return
    seen = set()  # equal values give equal steps
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i == j or (a, b) in seen:
                continue
            seen.add((a, b))
            rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
            for operator, result in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a // b if b else -1)):
                if result >= 0 and (operator != "/" or result * b == a):
                    yield from _chains((*rest, result), f"{text},{a}{operator}{b}={result}")


_STEP = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})")


def read_chain(text: str, numbers: Sequence[int]) -> Expression | None:
    """Follow steps `a*b=c,c+d=e`: every step true, its operands still unused, everything used once at the
    end.

    A value that is both a number and a result is read as the result. None for anything else.
    """
    values = [number(n) for n in numbers]
    for step in text.split(","):
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        operands = []
        for wanted in (match.group(1), match.group(3)):
            at = next((i for i in reversed(range(len(values))) if str(values[i].value) == wanted), None)
            if at is None:
                return None
            operands.append(values.pop(at))
        result = combine(operands[0], match.group(2), operands[1], whole=True)
        if result is None or str(result.value) != match.group(4):
            return None
        values.append(result)
    return values[0] if len(values) == 1 else None


def written(numbers: Sequence[int]) -> Iterator[tuple[str, Expression]]:
    """Infix texts with no needless parentheses, at least one for every solution; rational values."""
    yield from _written(tuple((str(n), number(n)) for n in numbers))


def _written(values: tuple[tuple[str, Expression], ...]) -> Iterator[tuple[str, Expression]]:
    if len(values) == 1:
        yield values[0]
        return
    for i, (a_text, a) in enumerate(values):
        for j, (b_text, b) in enumerate(values):
            if i == j:
                continue
            rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
            for operator in OPERATORS:
                result = combine(a, operator, b)
                if result is None:
                    continue
                left = f"({a_text})" if operator in "*/" and a.kind == "s" else a_text
                tight = (operator in "*/" and b.kind == "s") or (operator == "-" and b.kind == "s")
                tight = tight or (operator == "/" and b.kind == "p")
                right = f"({b_text})" if tight else b_text
                yield from _written((*rest, (f"{left}{operator}{right}", result)))
