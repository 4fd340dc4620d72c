"""One table: which method of the squared-residual family sets what, and where that is written.

`PRESETS` is the whole of it: `METHODS`, which people use, then `RELEASED`, what the authors' code was at some commit.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from flowrl_kernels.core import checks
from flowrl_kernels.presets.methods import METHODS
from flowrl_kernels.presets.released import RELEASED
from flowrl_kernels.presets.row import CHOICES, CLIPS, PENALTIES, Row, penalty_of, phi_of, row_of

__all__ = [
    "CHOICES", "CLIPS", "METHODS", "PENALTIES", "PRESETS", "RELEASED", "Row", "named", "penalty_of", "phi_of",
    "row_of", "settle",
]  # fmt: skip

PRESETS: dict[str, Row] = METHODS | RELEASED


def named(preset: str) -> Row:
    """The row called `preset`.

    Raises:
        ValueError: no such row; the message names the nearest.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=3) or sorted(PRESETS)
        checks.fail(
            "preset", f"one of {', '.join(map(repr, near))} (all: flowrl_kernels.presets.PRESETS)", repr(preset)
        )
    return PRESETS[preset]


def settle(preset: str | None, default: Row, explicit: dict[str, Any]) -> Row:
    """The row of `preset`, or `default` with the explicit arguments set; both must not contradict each other."""
    row = default if preset is None else named(preset)
    explicit = dict(explicit)
    normalize = explicit.pop("length_normalize", None)
    if normalize and row.scale is not None:
        checks.fail("length_normalize", f"False: preset={preset!r} sets the scale {row.scale}", True)
    if normalize is False and row.scale is None:
        row = dataclasses.replace(row, scale=1.0)
    if preset is None:
        return dataclasses.replace(row, **explicit)
    for name, value in explicit.items():
        added = name == "tis" and row.tis is None  # a correction for the rollout engine goes with every row
        # alpha is one, of a method that squares its residual
        added |= name == "phi" and not isinstance(value, str) and row.phi == "square"
        if name in ("beta", "scale", "length_power", "tis_cap") or added:  # a method's own dials, not its shape
            row = dataclasses.replace(row, **{name: value})
        elif name == "phi" and "abs" not in (row.phi, value) and penalty_of(row.phi) == penalty_of(value):
            continue  # by its name or by its number
        elif getattr(row, name) != value:
            checks.fail(name, f"{getattr(row, name)!r}, which preset={preset!r} sets (or no preset)", repr(value))
    return row
