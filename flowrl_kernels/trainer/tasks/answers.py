"""Is a response's final answer the wanted one? Mathematics by math-verify, the ways people write it down by this file.

Read here: choices, words, numbers with units, lists, sets, tuples, intervals, unions, matrices and `x =`; what is left
is an expression, which math-verify (https://github.com/huggingface/Math-Verify) parses and compares. Two readings:

- A unit may be left out, and 50% is 0.5 and, where the other side has no unit, 50. Two units must agree (5 m = 500 cm).
- A decimal stands for the number it rounds only where it shows six decimals or more: 0.333333 is 1/3, 0.33 is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

LONGEST = 500  # characters of a final answer that are read; a longer one is wrong
DEEPEST = 12  # nested brackets of a list or tuple, twice that of a formula: parsers slow down exponentially
MANY = 64  # elements of a list compared in any order


@dataclass(frozen=True)
class Answer:
    """kind: choice, word, number, list (any order; sets too), tuple (with its brackets), matrix or expression."""

    kind: str
    text: str
    value: Any = None  # letter, Fraction, or the parts
    unit: str = ""
    name: str = ""  # x of "x = 3"
    decimals: int = 0  # digits shown behind the point


# ------------------------------------------------------------------------------------------------ where it stands

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(
    r"(?:[\s$,;&~]|\\[,;: ]|\\?\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b|[A-Za-z]\w?\s*=|\\\]|\\\[)*"
)


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, inside) of every \\boxed{...} with matching braces, by where it starts."""
    stack: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        token = match.group()
        if token[0] == "\\" and token[-1] == "{" and len(token) > 2:
            stack.append((match.start(), match.end()))
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack and (opened := stack.pop()) is not None:
            found.append((opened[0], match.end(), text[opened[1] : match.start()]))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} with matching braces; None where there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def after_marks(text: str) -> str | None:
    """What follows the last "####" on its line, as GSM8K's answers end; None where there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark and rest.strip() else None


_STATED = re.compile(r"\banswer\s*(?:is|:|=|\*\*:?)+\s*:?\s*", re.IGNORECASE)


def final_answer(response: str) -> str | None:
    """The one place of a response that is read: the last box (or the last boxes in a row), what follows "####", what
    follows the last "answer is", or the whole of a short response. None: none of these.
    """
    found = boxes(response)
    if found:
        run = [found[-1]]
        for box in reversed(found[:-1]):
            if box[1] > run[0][0] or not _BETWEEN.fullmatch(response[box[1] : run[0][0]][:200]):
                break
            run.insert(0, box)
        return ", ".join(inside for _, _, inside in run)
    if (marked := after_marks(response)) is not None:
        return marked
    tail = response[-LONGEST:]
    stated = list(_STATED.finditer(tail))
    if stated:
        line = tail[stated[-1].end() :].strip().partition("\n")[0]
        return re.split(r"\.\s|,? because |,? since ", line)[0]
    whole = response.strip()
    return whole if len(whole) <= 200 and "\n" not in whole else None


# ------------------------------------------------------------------------------------------------ one way to write it

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-", "＋": "+", "（": "(", "）": ")",
        "，": ",", "。": ".", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ",
        "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "²": "^2", "³": "^3", "∅": r"\emptyset ", "％": "%", "＝": "=",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}",
        "’": "'", "\u200b": "", "\ufeff": "",
    }
)  # fmt: skip
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|bf|rm|operatorname)\s*\{([^{}]*)\}"
)
_BARE = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)(?![A-Za-z])")
ROW = "\x03"  # a matrix's row ends
OPEN, CLOSE = "\x01", "\x02"  # around what stood in \text{}


def tidy(text: str) -> str:
    """The same answer in one notation: no dollars, spacing commands, \\left, \\dfrac; \\text{} in marks of its own."""
    text = text.translate(_SIGNS).replace("\\\\", ROW).strip()
    for _ in range(4):
        before = text
        for left, right in _WRAPS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1:
                inside = text[len(left) : -len(right)]
                text = inside.strip() if left not in inside else text
        if (box := re.fullmatch(r"\\boxed\s*\{(.*)\}", text, re.DOTALL)) and balanced(box.group(1)):
            text = box.group(1).strip()
        text = re.sub(r"(?<!\\)[.;:,]+$", "", text).strip()
        if text == before:
            break
    text = re.sub(
        r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|displaystyle|limits)(?![A-Za-z])\s*\.?", "", text
    )
    text = text.replace(r"\!", "").replace("{,}", ",")
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\([lr])brace", lambda m: r"\{" if m.group(1) == "l" else r"\}", text)
    text = re.sub(r"\\(?:lparen|langle)", "(", re.sub(r"\\(?:rparen|rangle)", ")", text))
    text = text.replace(r"\infin ", r"\infty ").replace(r"\lt", "<").replace(r"\gt", ">")
    text = _TEXT.sub(lambda m: f" {OPEN}{m.group(1).strip()}{CLOSE} ", text)
    text = re.sub(r"^(?:\\approx|approximately|about)\s*", "", text.strip())
    return re.sub(r"\s+", " ", text).strip()


def balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    return depth == 0


def plain(text: str) -> str:
    """Without the marks of \\text{}."""
    return re.sub(r"\s+", " ", text.replace(OPEN, "").replace(CLOSE, "")).strip()


def split(text: str, cut: re.Pattern[str]) -> list[str]:
    """Parts of `text` between matches of `cut` outside all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        match = cut.match(text, at) if depth == 0 else None
        if match and match.end() > at:
            parts.append(text[start:at].strip())
            start = at = match.end()
            continue
        if text[at] == "\\" and text[at + 1 : at + 2] in ("{", "}"):
            at += 1
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        depth = max(depth, 0)
        at += 1
    return [*parts, text[start:].strip()]


# ------------------------------------------------------------------------------------------------ numbers and units

# name -> (dimension, size in its base unit)
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _base, _rows in {
    "m": {"mm": "1/1000", "cm": "1/100", "m": "1", "km": "1000", "millimeter": "1/1000", "centimeter": "1/100",
          "meter": "1", "kilometer": "1000", "millimetre": "1/1000", "centimetre": "1/100", "metre": "1",
          "kilometre": "1000"},
    "foot": {"in": "1/12", "inch": "1/12", "inche": "1/12", "ft": "1", "foot": "1", "feet": "1", "yd": "3", "yard": "3",
             "mi": "5280", "mile": "5280"},
    "g": {"mg": "1/1000", "g": "1", "gram": "1", "kg": "1000", "kilogram": "1000"},
    "lb": {"oz": "1/16", "ounce": "1/16", "lb": "1", "pound": "1"},
    "s": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600", "hour": "3600",
          "day": "86400", "week": "604800"},
    "year": {"year": "1", "yr": "1"}, "month": {"month": "1"},
    "l": {"ml": "1/1000", "milliliter": "1/1000", "l": "1", "liter": "1", "litre": "1"},
    "$": {"$": "1", "dollar": "1", "usd": "1", "cent": "1/100", "¢": "1/100"},
    "€": {"€": "1", "euro": "1", "eur": "1"}, "£": {"£": "1", "gbp": "1"},
    "%": {"%": "1", "percent": "1"},
    "°": {"°": "1", "degree": "1", "deg": "1"}, "rad": {"rad": "1", "radian": "1"},
    "mph": {"mph": "1", "miles per hour": "1"},
    "km/h": {"km/h": "1", "kmh": "1", "kph": "1", "kilometers per hour": "1"},
    "m/s": {"m/s": "1", "meters per second": "1"},
}.items():  # fmt: skip
    _UNITS |= {name: (_base, Fraction(size)) for name, size in _rows.items()}

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]{1,200})"
_DECIMAL = rf"(?:{_DIGITS}?\.[0-9]{{1,200}}|{_DIGITS}\.?)"
_POWER = r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([+-]?[0-9]{1,3}))"
_RATIO = (
    r"\\frac\s*(?:\{\s*(-?[0-9,]{1,60})\s*\}|([0-9]))\s*(?:\{\s*([0-9,]{1,60})\s*\}|([0-9]))"
    r"|([0-9]{1,60})\s*/\s*([0-9]{1,60})"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<money>\\\$|\$|US\$|USD|€|£)?\s*(?P<sign2>[+-]?)\s*"
    rf"(?:(?P<whole>{_DIGITS})\s+(?P<mixed_n>[0-9]{{1,20}})\s*/\s*(?P<mixed_d>[0-9]{{1,20}})"
    rf"|(?P<wholef>{_DIGITS})?\s*(?P<ratio>{_RATIO})"
    rf"|(?P<decimal>{_DECIMAL})(?:(?P<power>{_POWER})|[eE](?P<e>[+-]?[0-9]{{1,3}})(?![0-9]))?"
    rf"|10\s*\^\s*(?:\{{\s*(?P<ten>[+-]?[0-9]{{1,3}})\s*\}}|(?P<ten2>[0-9]{{1,3}})))"
    rf"(?P<rest>.*)",
    re.DOTALL,
)


def _whole(text: str) -> int:
    return int(re.sub("[, ]", "", text))


def number(text: str) -> Answer | None:
    """A rational number as it is written, with its unit; None for anything else."""
    match = _NUMBER.fullmatch(plain(text) if text.startswith(OPEN) else text)
    if match is None:
        return None
    got = match.groupdict()
    unit = unit_of(got["rest"], bool(got["money"]))
    if unit is None or (got["sign"] and got["sign2"]):
        return None
    decimals = 0
    try:
        if got["whole"]:
            value = _whole(got["whole"]) + Fraction(int(got["mixed_n"]), int(got["mixed_d"]))
        elif got["ratio"]:
            parts = [p for p in re.fullmatch(_RATIO, got["ratio"]).groups() if p]  # type: ignore[union-attr]
            value = Fraction(_whole(parts[0]), _whole(parts[1]))
            if got["wholef"]:
                if parts[0].startswith("-") or got["ratio"][0] != "\\":
                    return None
                value += _whole(got["wholef"])
        elif got["decimal"]:
            digits = re.sub("[, ]", "", got["decimal"])
            value = Fraction(digits if digits[-1] != "." else digits[:-1])
            exponent = got["e"] or next((p for p in re.findall(r"[+-]?[0-9]+", (got["power"] or "")[4:])[1:]), "0")
            decimals = len(digits.partition(".")[2])
            if int(exponent):
                value, decimals = value * Fraction(10) ** int(exponent), 0
        else:
            value = Fraction(10) ** int(got["ten"] or got["ten2"])
    except (ZeroDivisionError, ValueError):
        return None
    if "-" in (got["sign"], got["sign2"]):
        value = -value
    currency = {"€": "€", "£": "£"}.get(got["money"] or "", "$") if got["money"] else ""
    return Answer("number", text, value, currency or unit, decimals=decimals)


def unit_of(rest: str, money: bool) -> str | None:
    """The unit behind a number, "" for none; None where it is no unit but goes on as an expression."""
    marked = OPEN in rest
    spaced = rest[:1] == " "
    word = plain(rest).replace("\\", "").strip(" .")
    if not word:
        return ""
    word = re.sub(r"\^\s*\{?\s*circ\s*\}?", "°", word)
    word = re.sub(r"^(?:square|sq\.?)\s+(\w+)|^(\w+) squared", lambda m: f"{m[1] or m[2]}^2", word)
    word = re.sub(r"^cubic\s+(\w+)", lambda m: f"{m[1]}^3", word)
    power = re.fullmatch(r"(.+?)\s*\^\s*\{?\s*([23])\s*\}?", word)
    base, exponent = (power.group(1), int(power.group(2))) if power else (word, 1)
    single = _one_unit(base)
    if single in _UNITS:
        if len(base) == 1 and base.isalpha() and not (marked or spaced):
            return None  # 5m may be an expression
        if _UNITS[single][0] == "$" and money and single != "$" and single not in ("dollar", "usd"):
            return None
        return single if exponent == 1 else f"{single}^{exponent}"
    if marked and re.fullmatch(r"[A-Za-z][A-Za-z /'-]*", word):
        return _one_unit(word)
    if spaced and re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]{2,}){0,3}", word) and not _BARE.search(word):
        return _one_unit(word)
    return None


def _one_unit(word: str) -> str:
    word = word.strip().lower()
    return word if word in _UNITS or len(word) < 4 else word.removesuffix("s")


def same_number(a: Answer, b: Answer) -> bool:
    (dim_a, size_a), (dim_b, size_b) = (_dimension(x.unit) for x in (a, b))
    if a.unit and b.unit:
        if dim_a is None or dim_b is None:  # nouns such as "apples": only a real unit contradicts one
            return (dim_a is None) == (dim_b is None) and same_value(a, b)
        return dim_a == dim_b and same_value(replace(a, value=a.value * size_a), replace(b, value=b.value * size_b))
    if same_value(a, b):
        return True
    shares = [replace(x, value=x.value / 100, decimals=0) if x.unit == "%" or dim == "%" else x
              for x, dim in ((a, dim_a), (b, dim_b))]  # fmt: skip
    return shares != [a, b] and same_value(*shares)


def _dimension(unit: str) -> tuple[str | None, Fraction]:
    base, _, power = unit.partition("^")
    if base not in _UNITS:
        return None, Fraction(1)
    dimension, size = _UNITS[base]
    return (f"{dimension}^{power}", size ** int(power)) if power else (dimension, size)


def same_value(a: Answer, b: Answer) -> bool:
    """Equal, or one a decimal of at least six shown places to which the other, which is none, rounds."""
    if a.value == b.value:
        return True
    for short, other in ((a, b), (b, a)):
        if short.decimals >= 6 and other.decimals == 0 and short.value != 0:
            digits = len(str(abs(short.value.numerator * 10**short.decimals // short.value.denominator)))
            if digits >= 6 and round(other.value, short.decimals) == short.value:
                return True
    return False


# ------------------------------------------------------------------------------------------------ reading and comparing

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
    long = any(len(part) >= 4 and not _BARE.fullmatch(part) for part in re.split("[ -]", bare))
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
    text = _BARE.sub(lambda m: "\\" + m[1] + " ", plain(text).replace(ROW, "\\\\"))
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
