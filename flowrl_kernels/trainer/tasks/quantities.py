"""Rational numbers as people write them, with their units: 1,000, 3 1/2, 2.5e3, 50%, $12, 5 square meters."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from flowrl_kernels.trainer.tasks.notation import BARE, OPEN, plain


@dataclass(frozen=True)
class Answer:
    """kind: choice, word, number, list (any order; sets too), tuple (with its brackets), matrix or expression."""

    kind: str
    text: str
    value: Any = None  # letter, Fraction, or the parts
    unit: str = ""
    name: str = ""  # x of "x = 3"
    decimals: int = 0  # digits shown behind the point


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
    if spaced and re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]{2,}){0,3}", word) and not BARE.search(word):
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
