"""Values that may cross a sandbox's wall: built-in types only, as JSON, so that reading them runs nobody's code.

Frames are a length (4 bytes, big-endian) and JSON in UTF-8. JSON has no tuple, set or huge integer: those are
objects of one key, the kind. Both sides of the wall use this file; it imports the standard library only.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 100
MAX_FRAME = 16 << 20
_EXACT = 2**53  # larger integers travel as hexadecimal: linear to read, and JSON readers keep them


def frame(message: Any) -> bytes:
    """The bytes of one message. Raises ValueError above MAX_FRAME."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes is above {MAX_FRAME}")
    return len(body).to_bytes(4, "big") + body


def encode(value: Any, other: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """`value` as JSON data. What is no plain value goes through `other`.

    Raises TypeError where that is None, ValueError for nesting deeper than MAX_DEPTH (a cycle, say).
    """
    if value is None or value is True or value is False:
        return value
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested deeper than {MAX_DEPTH}")

    def inner(items: Any) -> list[Any]:
        return [encode(item, other, depth + 1) for item in items]

    if type(value).__module__ == "numpy":
        if getattr(value, "ndim", None) == 0:
            return encode(value.item(), other, depth + 1)
        if type(value).__name__ == "ndarray":
            return {"array": inner(value.tolist())}
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        number = int(value)
        return number if -_EXACT < number < _EXACT else {"int": hex(number)}
    if isinstance(value, float):
        real = float(value)
        return real if math.isfinite(real) else {"float": str(real)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return inner(value)
    for kind, cls in (("tuple", tuple), ("set", set), ("frozenset", frozenset), ("deque", deque)):
        if isinstance(value, cls):
            return {kind: inner(value)}
    if isinstance(value, dict):
        return {"dict": [inner(pair) for pair in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, bytearray):
        return {"bytearray": value.hex()}
    if isinstance(value, complex):
        return {"complex": inner((value.real, value.imag))}
    if isinstance(value, range):
        return {"range": inner((value.start, value.stop, value.step))}
    if isinstance(value, Fraction):
        return {"Fraction": inner((value.numerator, value.denominator))}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    if other is None:
        raise TypeError(f"only plain values can be passed, not a {type(value).__name__}")
    return other(value)


def _array(items: list[Any]) -> Any:
    try:
        import numpy
    except ImportError:
        return items
    return numpy.array(items)


_DECODE: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "dict": dict,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "Fraction": lambda parts: Fraction(*parts),
    "Decimal": Decimal,
    "array": _array,
}


def decode(data: Any, handle: Callable[[int], Any] | None = None, depth: int = 0) -> Any:
    """The value of `encode`'s data; {"object": n} goes through `handle`.

    Raises ValueError or TypeError for anything else, whoever wrote it.
    """
    if depth > 3 * MAX_DEPTH:
        raise ValueError("a value is nested too deeply")
    if isinstance(data, list):
        return [decode(item, handle, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("a value has more than one kind")
    ((kind, content),) = data.items()
    if kind == "object" and handle is not None and type(content) is int:
        return handle(content)
    if kind not in _DECODE:
        raise ValueError(f"unknown kind of value {kind!r:.40}")
    return _DECODE[kind](decode(content, handle, depth + 1) if isinstance(content, list) else content)
