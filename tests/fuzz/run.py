"""Runs a door many times under hypothesis and counts how the calls ended."""

import importlib.util
import time
import traceback
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from . import doors, files
from .draws import Draw, describe

DOORS = {**doors.DOORS, **files.DOORS}
SLOW = {"config: flags": 0.25, "LinearFlowRLLoss": 0.7}  # share of the inputs that the others get
MISSING = {"data: parquet": "pyarrow"}


def missing(name):
    """The package that a door needs and that is not there."""
    package = MISSING.get(name)
    return package if package and importlib.util.find_spec(package) is None else None


def fuzz(name, inputs, seed=None, shrink=True):
    """Counter of "agreed" and "refused"; raises what the door raised, at its smallest input.

    seed: None draws the same inputs every time.
    """
    counts = Counter()
    phases = [Phase.generate] + ([Phase.shrink] if shrink else [])

    @settings(
        max_examples=inputs, deadline=None, database=None, derandomize=seed is None, phases=phases, print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=True,
    )  # fmt: skip
    @given(st.data())
    def once(data):
        d = Draw(data)
        try:
            counts[DOORS[name](d)] += 1
        except Exception as error:
            error.add_note(f"{name} with\n{describe(d.told)}")
            raise

    if seed is not None:
        from hypothesis import seed as seeded

        once = seeded(seed)(once)
    once()
    return counts


def work(job):
    """One door in a process of its own: (name, inputs, counts, error, seconds)."""
    name, inputs, seed = job
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        counts, error = fuzz(name, inputs, seed), ""
    except BaseException as problem:
        counts, error = {}, "".join(traceback.format_exception(problem))
    return name, inputs, dict(counts), error, time.monotonic() - began
