"""Is a response's final answer the wanted one? Mathematics by math-verify, the ways people write it down by this file,
`notation` and `quantities`.

Read here: choices, words, numbers with units, lists, sets, tuples, intervals, unions, matrices and `x =`; what is left
is an expression, which math-verify (https://github.com/huggingface/Math-Verify) parses and compares. Two readings:

- A unit may be left out, and 50% is 0.5 and, where the other side has no unit, 50. Two units must agree (5 m = 500 cm).
- A decimal stands for the number it rounds only where it shows six decimals or more: 0.333333 is 1/3, 0.33 is not.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flowrl_kernels.trainer.tasks.notation import (
    BARE,
    CLOSE,
    LONGEST,
    OPEN,
    ROW,
    after_marks,
    balanced,
    final_answer,
    last_boxed,
    plain,
    split,
    tidy,
)
from flowrl_kernels.trainer.tasks.quantities import Answer, number, same_number

DEEPEST = 12  # nested brackets of a list or tuple, twice that of a formula: parsers slow down exponentially
MANY = 64  # elements of a list compared in any order


_LIST = re.compile(r"[,;]|\s?\x01\s*(?:and|or)\s*\x02\s?|\s+(?:and|or)\s+|(?<=[,;])\s*(?:and|or)\s+")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\s+U\s+|(?<=[)\]])\s*U\s*(?=[(\[])")
_NAME = r"(?:[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z, ]+\))?|\\[A-Za-z]+|[A-Za-z]{2,}(?: [A-Za-z]+){0,3}|\x01[^\x02]*\x02)"
_EQUATION = re.compile(rf"({_NAME})\s*=\s*([^=<>]+(?:=[^=<>]+)*)")
_MEMBER = re.compile(rf"{_NAME}\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
_MATRIX = re.compile(
    r"\\begin\{([pbBvV]?|small)(?:matrix|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\1(?:matrix|array)\}", re.DOTALL
)
_CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?\s*[.:]?")
_STARTS_CHOICE = re.compile(
    r"(?:option |choice |answer )?(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])(?=\s*(?:[.:)]|$)))\s*[.:)]?\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
WORDS = {"yes", "no", "true", "false", "none", "even", "odd", "neither", "both", "never", "always", "undefined", "dne"}


def read(text: str, depth: int = 0) -> Answer | None:
    """What a tidied answer says; None for an empty one, or one too long or too deep to be read."""
    text = text.strip()
    if not text or len(text) > LONGEST or depth > DEEPEST:
        return None
    bare = plain(text)
    if _CHOICE.fullmatch(bare) and (bare[0] == "(" or len(bare) <= 2):
        return Answer("choice", text, _CHOICE.fullmatch(bare).group(1))  # type: ignore[union-attr]
    if (found := number(text)) is not None:
        return found
    if is_words(text):
        return Answer("word", text, _word(bare))
    if (matrix := _MATRIX.fullmatch(text)) is not None:
        kind = {"v": "v", "V": "V"}.get(matrix.group(1), "")
        cells = [[read(c, depth + 1) for c in row.split("&")] for row in matrix.group(2).split(ROW) if row.strip()]
        if cells and all(c is not None for row in cells for c in row):
            return Answer("matrix", text, cells, unit=kind)
        return Answer("expression", text)
    if member := _MEMBER.fullmatch(text):
        return read(member.group(1), depth + 1)
    if len(parts := split(text, _UNION)) > 1:
        return _several("list", text, parts, depth)
    if len(parts := [p for p in split(text, _LIST) if p]) > 1:
        return _several("list", text, parts, depth)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _several("list", text, [p for p in split(text[2:-2], _LIST) if p], depth)
    if text[0] in "([" and text[-1] in ")]" and closes(text):
        parts = split(text[1:-1], re.compile("[,;]"))
        if len(parts) > 1:
            return _several("tuple", text, parts, depth, text[0] + text[-1])
        if text[0] == "(" and text[-1] == ")":
            return read(text[1:-1], depth + 1)
    if text.count(r"\pm") == 1:
        return _several("list", text, [text.replace(r"\pm", sign).strip() for sign in "+-"], depth)
    if equation := _EQUATION.fullmatch(text):
        inner = read(equation.group(2).rpartition("=")[2], depth + 1)
        return inner and replace(inner, name=plain(equation.group(1)))
    return Answer("expression", text)


def _several(kind: str, text: str, parts: list[str], depth: int, brackets: str = "") -> Answer | None:
    inner = [read(part, depth + 1) for part in parts]
    if any(part is None for part in inner):
        return None
    return Answer(kind, text, inner, unit=brackets)


def closes(text: str) -> bool:
    """Whether the first bracket is closed by the last."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return at == len(text) - 1
    return False


def nesting(text: str) -> int:
    """The deepest bracket."""
    depth = deepest = 0
    for c in text:
        depth = max(0, depth + (c in "([{") - (c in ")]}"))
        deepest = max(deepest, depth)
    return deepest


def is_words(text: str) -> bool:
    """Letters that are words and no formula."""
    bare = plain(text)
    if bare.lower() in WORDS:
        return True
    if not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", bare) or len(bare.split()) > 6:
        return False
    marked = text.startswith(OPEN) and text.endswith(CLOSE)
    long = any(len(part) >= 4 and not BARE.fullmatch(part) for part in re.split("[ -]", bare))
    return marked or (long and not re.search(r"sqrt|infty|frac", bare)) or len(bare.split()) > 2


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.casefold()).strip()


def same(gold: Answer, got: Answer) -> bool:
    """Whether two read answers are one; raises what math-verify raises."""
    if gold.name and got.name and len(gold.name) == len(got.name) == 1 and gold.name != got.name:
        return False
    if gold.text == got.text:
        return True
    kinds = {gold.kind, got.kind}
    if kinds == {"number"}:
        return same_number(gold, got)
    if "choice" in kinds or "word" in kinds:
        return (len(kinds) == 1 and gold.value == got.value) or _word(plain(gold.text)) == _word(plain(got.text))
    if "matrix" in kinds and len(kinds) == 1:
        return gold.unit == got.unit and same_parts(
            [cell for row in gold.value for cell in row], [cell for row in got.value for cell in row]
        ) and [len(row) for row in gold.value] == [len(row) for row in got.value]  # fmt: skip
    if kinds == {"tuple"}:
        return gold.unit == got.unit and same_parts(gold.value, got.value)
    if "list" in kinds:
        left, right = (x.value if x.kind == "list" else [x] for x in (gold, got))
        if got.kind == "number" and "," in got.text:  # 3,400 may be two answers
            right = _several("list", got.text, got.text.split(","), 0).value  # type: ignore[union-attr]
        return same_list(left, right)
    if kinds & {"tuple", "matrix"}:
        return False
    return same_expression(gold, got)


def same_parts(a: list[Answer], b: list[Answer]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


def same_list(a: list[Answer], b: list[Answer]) -> bool:
    """The same elements in any order."""
    if len(a) != len(b):
        return False
    if len(a) > MANY:
        return same_parts(a, b)
    left = list(b)
    for x in a:
        found = next((i for i, y in enumerate(left) if same(x, y)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def expression(text: str) -> list[Any]:
    """What math-verify reads in a formula, without the texts it gives back beside it. [] for nothing."""
    from math_verify import parse

    if nesting(text) > 2 * DEEPEST:
        return []
    text = BARE.sub(lambda m: "\\" + m[1] + " ", plain(text).replace(ROW, "\\\\"))
    text = re.sub(r"(?<![\\A-Za-z])(?:inf|infinity|oo)(?![A-Za-z])", r"\\infty", text)
    return [x for x in parse(f"${text}$", parsing_timeout=None) if not isinstance(x, str)]


def same_expression(gold: Answer, got: Answer) -> bool:
    from math_verify import verify

    wanted, found = expression(gold.text), expression(got.text)
    if not wanted or not found:
        return False
    # raise_on_error: a crash in the comparison is a crash, not a wrong answer
    return bool(verify(wanted, found, timeout_seconds=None, raise_on_error=True))


def read_gold(answer: Any) -> Answer | None:
    """The wanted answer; None where no response could be compared with it."""
    if isinstance(answer, bool):
        return Answer("word", str(answer), str(answer).lower())
    if isinstance(answer, float):
        answer = repr(int(answer)) if answer.is_integer() else repr(answer)
    text = str(answer)
    inside = last_boxed(text)
    text = inside if inside is not None else after_marks(text) or text
    gold = read(tidy(text))
    return gold if gold is not None and readable(gold) else None


def readable(gold: Answer) -> bool:
    if gold.kind in ("list", "tuple"):
        return bool(gold.value) and all(map(readable, gold.value))
    if gold.kind == "matrix":
        return all(readable(cell) for row in gold.value for cell in row)
    if gold.kind == "expression":
        if len(re.findall(r"(?<!\\)\b[A-Za-z]{2,}\b", gold.text)) > 4:
            return False  # a sentence, which math-verify would read as a product of letters
        return balanced(gold.text.replace(r"\{", "").replace(r"\}", "")) and bool(expression(gold.text))
    return True


def equal(gold: Answer, response: str) -> bool:
    """Whether a response's final answer is `gold`."""
    text = final_answer(response)
    if text is not None and len(text) > LONGEST:
        return False
    if text is None:
        if gold.kind not in ("number", "expression"):
            return False
        from math_verify import parse, verify

        found = parse(response[-LONGEST:], parsing_timeout=None)
        return bool(verify(expression(gold.text), found, timeout_seconds=None, raise_on_error=True))
    text = tidy(text)
    if gold.kind == "choice":
        return _chosen(plain(text)) == gold.value
    if gold.kind == "word" and gold.value in ("yes", "no", "true", "false"):
        first = re.match(r"(yes|no|true|false)\b(?!\s+(?:or|and)\b|\s*/)", plain(text), re.IGNORECASE)
        return first is not None and first.group(1).lower() == gold.value
    got = read(text)
    if got is None:
        return False
    if "=" in text and "=" not in gold.text and got.kind == "expression":  # 2 + 3 = 5: the end is the answer
        got = read(text.rpartition("=")[2]) or got
    return same(gold, got)


def _chosen(text: str) -> str | None:
    """The one letter a response chooses: "(B)", "B.", "B: 42", "option b"; None for none or several."""
    match = _STARTS_CHOICE.fullmatch(text)
    if match is None:
        return None
    rest = match.group(3)
    if re.match(r"(?:(?:or|and|,|/|&)\s*)?\(?[A-J]\)?(?![A-Za-z])\s*[.:)]?\s*(?:$|or|and|,)", rest, re.IGNORECASE):
        return None
    return (match.group(1) or match.group(2)).upper()
