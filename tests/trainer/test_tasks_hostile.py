"""Whatever a model writes, the built-in verifiers answer 0 or 1, soon, and never raise."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.countdown import Countdown, countdown_reward
from flowrl_kernels.trainer.tasks.dataset import exact_reward
from flowrl_kernels.trainer.tasks.expressions import parse
from flowrl_kernels.trainer.tasks.sums import Sums

WANTED = {"numbers": [2, 3, 6], "target": 15}
ASKED = Problem(0, "", WANTED)
CHAIN, INFIX, SUMS = Countdown(), Countdown(answer="infix"), Sums()


def verdicts(text):
    return [
        CHAIN.verify(ASKED, text),
        INFIX.verify(ASKED, text),
        countdown_reward("", text, WANTED),
        SUMS.verify(Problem(0, "", 7), text),
        exact_reward("", text, "7"),
    ]


HUGE = [
    "1" * 200_000,
    "1+" * 100_000 + "1",
    "2*" * 50_000 + "2",
    "999999999*" * 20_000 + "9",
    "999999999/" * 20_000 + "9",
    "(" * 200_000,
    "(" * 60 + "2*6+3" + ")" * 60,
    "2*6=12," * 50_000,
    "=" * 200_000,
    "<answer>" * 50_000,
    "<answer>" * 50_000 + "</answer>" * 50_000,
    "\\boxed{" * 50_000,
    "2*6+3=" + "9" * 10_000,
    " " * 200_000 + "x",
    "\n" * 200_000,
    "٢*٦+٣",
    "２*６+３",
    "2²+3",
    "\x00\ud800\U0001f600",
    "1_000+1",
    "",
]


@pytest.mark.parametrize("text", HUGE, ids=lambda text: repr(text[:12]))
def test_hostile_texts_are_wrong_and_quick(text):
    start = time.perf_counter()
    assert verdicts(text) == [0.0] * 5
    assert time.perf_counter() - start < 5.0


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="0123456789+-*/=,() \n<answer>\\boxed{}٣²", max_size=200) | st.text(max_size=60))
def test_any_text_gets_a_verdict(text):
    assert all(value in (0.0, 1.0) for value in verdicts(text))


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.integers(0, 99).map(str), lambda e: st.tuples(e, st.sampled_from("+-*/"), e).map(
    lambda t: f"({t[0]}{t[1]}{t[2]})"), max_leaves=12))  # fmt: skip
def test_what_is_parsed_parses_back_to_itself(text):
    found = parse(text)
    if found is not None:
        assert parse(found[0].text)[0] == found[0]
