"""Odd and bad input at every door, a few fixed draws each; `make fuzz` draws ten thousand."""

import pytest
from fuzz.run import DOORS, SLOW, fuzz, missing, report, warm_up

INPUTS = 16
FILES = 4  # times as many of what is cheap and mostly refused


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warm_up()


@pytest.mark.parametrize("door", DOORS)
def test_a_call_agrees_with_float64_or_is_refused_by_name(door):
    if missing(door):
        pytest.skip(f"{missing(door)} is not installed: what this proves is unproved here")
    counts, findings = fuzz(door, int(INPUTS * SLOW.get(door, FILES if door.startswith("data") else 1.0)))
    assert not findings, report(findings)
    assert counts["agreed"] > 0  # refusing everything proves nothing
