"""Bad input gets a message with the argument's name, what was wanted and what came."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import peaked_inputs


def call(**changes):
    hidden, weight, target = peaked_inputs(6, 8, 20)
    arguments = {"hidden": hidden, "weight": weight, "target": target, **changes}
    return linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments)


CASES = {
    "hidden of the wrong width": ({"hidden": torch.zeros(6, 9)}, ValueError, r"hidden: .*H = 8.*\(6, 9\)"),
    "hidden of integers": ({"hidden": torch.zeros(6, 8, dtype=torch.int64)}, TypeError, "hidden: .*int64"),
    "hidden as a list": ({"hidden": [[0.0] * 8]}, TypeError, "hidden: .*list"),
    "weight of three dimensions": ({"weight": torch.zeros(2, 10, 8)}, ValueError, "weight: wanted 2 dimensions"),
    "weight of another dtype": ({"weight": torch.zeros(20, 8).half()}, TypeError, "weight: .*float32.*float16"),
    "an empty weight": ({"weight": torch.zeros(0, 8)}, ValueError, "weight: .*ZeRO-3"),
    "what ZeRO-3 leaves of a weight": ({"weight": torch.zeros(0)}, ValueError, r"weight: .*ZeRO-3.*Gathered.*\(0,\)"),
    "a layer for its weight": (
        {"weight": torch.nn.Linear(8, 20)},
        TypeError,
        "weight: wanted a torch.Tensor; got Linear",
    ),
    "a mesh for its group": (
        {"vocab_parallel": "tp"},
        TypeError,
        r"vocab_parallel: .*ProcessGroup.*get_group.*got str",
    ),
    "targets of another length": (
        {"target": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        r"target: .*\(6,\).*\(5,\)",
    ),
    "float targets": ({"target": torch.zeros(6)}, TypeError, "target: wanted an integer tensor; got torch.float32"),
    "a target too large": ({"target": torch.full((6,), 20)}, ValueError, r"target: .*\[0, 20\).*20"),
    "a negative target": ({"target": torch.full((6,), -1)}, ValueError, "target: .*-1"),
    "a bias too short": ({"bias": torch.zeros(19)}, ValueError, "bias: "),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature: .*above 0"),
    "a negative token temperature": ({"temperature": -torch.ones(6)}, ValueError, "temperature: .*above 0"),
    "temperatures of another shape": ({"temperature": torch.ones(5)}, ValueError, "temperature: "),
    "a trained temperature": ({"temperature": torch.ones(6, requires_grad=True)}, ValueError, "temperature: "),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap: "),
    "epsilon 1": ({"epsilon": 1.0}, ValueError, "epsilon: "),
    "a 16-bit main_grad": ({"main_grad": torch.zeros(20, 8).half()}, TypeError, "main_grad: "),
    "a report of another size": ({"report": torch.zeros(2)}, ValueError, "report: "),
}


@pytest.mark.parametrize("name", CASES)
def test_linear_logprob_refuses(name):
    changes, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(**changes)


def test_logprob_refuses_the_same_mistakes():
    logits, target = torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64)
    for arguments, error, message in [
        ((logits, target[:3]), ValueError, "target: "),
        ((logits, target + 9), ValueError, "target: "),
        ((logits.long(), target), TypeError, "logits: "),
        ((torch.zeros(4, 0), target), ValueError, "logits: "),
    ]:
        with pytest.raises(error, match=message):
            logprob(*arguments)
    with pytest.raises(ValueError, match="logits: .*contiguous"):
        logprob(torch.zeros(9, 4).T, target, inplace_backward=True)


def test_a_dtensor_is_refused_with_what_to_do():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="weight: .*DTensor.*full_tensor"):
        call(weight=torch.zeros(20, 8).as_subclass(DTensor))


def test_a_wrong_target_is_nan_where_looking_would_cost_a_sync():
    from flowrl_kernels.ops.linear_logprob import linear_logprob as op

    hidden, weight, target = peaked_inputs(6, 8, 20)
    target[2], target[3] = 20, -7
    logp, *_ = op(hidden, weight, target, None, torch.ones(1), 1.0, None, -100, False, 0.0, None, None, "chunked")
    assert logp[2:4].isnan().all()
    assert logp[[0, 1, 4, 5]].isfinite().all()
