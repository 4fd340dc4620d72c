"""Numbers that name a draw, folded into the key of a counter-based generator: integers of the host alone.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi.org/10.1145/2660193.2660195); `chunked.sampling` has it on tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

GOLDEN = 0x9E3779B97F4A7C15
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # xor with a shift to the right, then multiply
MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """The int64 that has the bits of `value` modulo 2^64."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


def fold(numbers: Iterable[int]) -> int:
    """64 bits, as an int64, that name a sequence of integers."""
    state = GOLDEN
    for number in numbers:
        state = (state ^ (number & MASK)) + GOLDEN & MASK
        for shift, factor in STEPS:
            state = (state ^ state >> shift) * factor & MASK
    return signed(state)
