"""The way of a tensor: down from the door to the implementation without climbing back, checked once on the way.

Entered means: a function of a file is called from another file of the package. Left out are the rooms of helpers, which
any file may ask anything (core/types, core/checks, core/segments, core/dispatch, presets), and ops/operator.py, the
hook through which PyTorch itself calls an operator and its backward.
"""

import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import flowrl_kernels
from flowrl_kernels import LinearFlowRLLoss, flowrl_loss, linear_logprob, logprob, policy_gradient_loss, residual_loss

PACKAGE = Path(flowrl_kernels.__file__).parent
HELPERS = ("core/types", "core/checks", "core/segments", "core/dispatch", "presets/", "ops/operator", "__init__")
IMPLEMENTATIONS = ("chunked/", "reference/")
CHECKS = ("settle", "settled_row", "segments_of", "normalizer_of", "checked_head", "checked_budget", "check_targets")


def traced(run):
    """The files entered between the user's call and the implementation, and how often each check ran."""
    entered, called, stack = [], Counter(), []

    def watch(frame, event, _):
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)):
            return
        name = file.removeprefix(f"{PACKAGE}/").removesuffix(".py")
        if name.startswith(HELPERS):
            return
        if event == "call":
            called[frame.f_code.co_name] += 1
            inside = any(other.startswith(IMPLEMENTATIONS) for other in stack)
            if entered[-1:] != [name] and (not stack or stack[-1] != name) and not inside:
                entered.append(name)
            stack.append(name)
        elif event == "return":
            stack.pop()

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered, called


def batch():
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=make).requires_grad_()
    weight = torch.randn(20, 8, generator=make).requires_grad_()
    target = torch.randint(20, (2, 3), generator=make)
    logp = -torch.rand(2, 3, generator=make)
    return hidden, weight, target, logp, torch.randn(2, generator=make), torch.zeros(2, requires_grad=True)


def linear(**settings):
    hidden, weight, target, logp, reward, log_z = batch()
    mask = torch.ones(2, 3, dtype=torch.bool)
    module = LinearFlowRLLoss(impl="chunked", **settings)
    return lambda: module(hidden, weight, target, logp, reward, log_z, logp_old=logp, mask=mask)


def doors():
    hidden, weight, target, logp, reward, log_z = batch()
    own = logp.clone().requires_grad_()
    logits = torch.randn(6, 20, requires_grad=True)
    one, two = linear(), linear(single_pass=False)
    return {
        "linear_logprob": lambda: linear_logprob(hidden, weight, target, impl="chunked").logp.sum(),
        "logprob": lambda: logprob(logits, target.reshape(-1), impl="chunked").logp.sum(),
        "flowrl_loss": lambda: flowrl_loss(own, logp, reward, log_z, logp_old=logp, impl="chunked").loss,
        "residual_loss": lambda: residual_loss(own, reward, anchor=logp, impl="chunked").loss,
        "policy_gradient_loss": lambda: policy_gradient_loss(own, logp, reward).loss,
        "one pass": lambda: one().loss,
        "two passes": lambda: two().loss,
    }


def down(entered):
    """Without the implementations, and without repeats that stand next to each other."""
    ours = [name for name in entered if not name.startswith(IMPLEMENTATIONS)]
    return [name for name, _ in itertools.groupby(ours)]


DOORS = doors()


@pytest.mark.parametrize("door", DOORS)
def test_no_file_is_entered_twice_between_the_call_and_the_implementation(door):
    DOORS[door]().backward()  # imports what loads on first use
    losses = []
    forward, _ = traced(lambda: losses.append(DOORS[door]()))
    assert any(name.startswith(IMPLEMENTATIONS) for name in forward)
    assert len(down(forward)) == len(set(down(forward))), forward
    backward, _ = traced(lambda: losses[0].backward())
    assert len(down(backward)) == len(set(down(backward))), backward


@pytest.mark.parametrize("door", ["one pass", "two passes"])
def test_checks_run_once_even_where_a_batch_takes_two_passes(door):
    DOORS[door]().backward()
    _, called = traced(DOORS[door])
    assert {name: called[name] for name in CHECKS} == dict.fromkeys(CHECKS, 1)


def test_a_door_that_calls_another_is_seen():
    hidden, weight, target, logp, reward, log_z = batch()

    def climbs():
        own = linear_logprob(hidden, weight, target, impl="chunked").logp
        return flowrl_loss(own, logp, reward, log_z, logp_old=logp, mask=torch.ones(2, 3), impl="chunked").loss

    entered, called = traced(lambda: (climbs(), climbs()))
    assert len(entered) > len(set(entered))
    assert called["settle"] == 2
