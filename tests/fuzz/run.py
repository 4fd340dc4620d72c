"""Runs a door many times under hypothesis, counts how the calls ended and keeps the smallest input of each failure."""

import importlib.util
import re
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from . import advantage_doors, doors, files
from .draws import Draw, describe

DOORS = {**doors.DOORS, **advantage_doors.DOORS, **files.DOORS}
SLOW = {"config: flags": 0.25, "LinearFlowRLLoss": 0.7}  # share of the inputs that the others get
MISSING = {"data: parquet": "pyarrow"}


def warm_up():
    """The first call of an operator imports for seconds: before anything is timed, and where nothing interrupts it."""
    import torch._dynamo

    from flowrl_kernels import LinearFlowRLLoss, linear_logprob, logprob

    x, y, row = torch.ones(1, 2, 3, requires_grad=True), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for single in (True, False):
        loss = LinearFlowRLLoss(single_pass=single)
        loss(x, torch.ones(4, 3), y, torch.ones(1, 2), row, row, mask=mask).loss.backward()
    (linear_logprob(x, torch.ones(4, 3), y).logp.sum() + logprob(x, y).logp.sum()).backward()


def missing(name):
    """The package that a door needs and that is not there."""
    package = MISSING.get(name)
    return package if package and importlib.util.find_spec(package) is None else None


def kind_of(error):
    """What makes two failures the same: type, place in the library, and message without its numbers."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "flowrl_kernels" in Path(f.filename).parts] or frames[-1:]
    message = re.sub(r"/\S+|-?\d[\d.e+-]*|nan|inf", "#", str(error).splitlines()[0] if str(error) else "")
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].name}: {message[:160]}"


def fuzz(name, inputs, first=None):
    """(Counter of "agreed", "refused" and "failed", {kind of failure: (times, smallest call, its error)}).

    first: a seed; None draws the same inputs every time.
    """
    counts, findings = Counter(), {}

    @settings(
        max_examples=inputs, deadline=None, database=None, derandomize=first is None, phases=[Phase.generate],
        verbosity=Verbosity.quiet, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def once(data):
        d = Draw(data)
        try:
            counts[DOORS[name](d)] += 1
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            counts["failed"] += 1
            kind, told = kind_of(error), describe(d.told)
            times, smallest, said = findings.get(kind, (0, None, ""))
            if smallest is None or len(told) < len(smallest):
                smallest, said = told, str(error)[:400]
            findings[kind] = (times + 1, smallest, said)

    (once if first is None else seed(first)(once))()
    return counts, findings


def report(findings):
    return "\n".join(
        f"- {kind} ({times} times)\n  {said}\n  smallest call:\n{told}"
        for kind, (times, told, said) in sorted(findings.items())
    )


def work(job):
    """One door in a process of its own: (name, inputs, counts, findings, seconds)."""
    name, inputs, first = job
    torch.set_num_threads(1)
    warm_up()
    began = time.monotonic()
    return (name, inputs, *fuzz(name, inputs, first), time.monotonic() - began)
