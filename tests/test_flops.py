"""Products counted by torch against docs/maths.md: 8NHV in two passes, 6NHV in one, 2NHV + s 6NHV bounded."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowrl_kernels.chunked import bounded, linear_logprob, linear_residual
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Budget, Chunks, Head, Needs, Saved, Sequences, Upstream
from flowrl_kernels.presets import named
from flowrl_kernels.testing import rl_like_inputs

N, H, V = 512, 64, 16384
NHV = N * H * V
ONE = torch.ones(1)


def _addmm(into, a, b, *_, **__):
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: _addmm}  # torch counts the product that does not write into its first operand


@pytest.fixture(scope="module")
def data():
    return rl_like_inputs(N, H, V, zipf=1.2)


def counted(run):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        made = run()
    return counter.get_total_flops() / NHV, made


def forward(op, data, stats):
    hidden, weight, target, _ = data
    return op.linear_logprob_fwd(hidden, target, Head(weight, None, ONE), False, stats)


def backward(op, data, kept, epsilon=0.0, report=None, needs=(True, True)):
    hidden, weight, target, grad = data
    need, budget = Needs(*needs, False), Budget(epsilon, report)
    return op.linear_logprob_bwd(Upstream(grad), hidden, target, Head(weight, None, ONE), Saved(*kept), need, budget)


def check_two_passes(op, data, count):
    ahead, kept = count(lambda: forward(op, data, False))
    back, _ = count(lambda: backward(op, data, kept))
    assert ahead == pytest.approx(2, rel=0.05)
    assert ahead + back == pytest.approx(8, rel=0.05)
    for needs in ((True, False), (False, True)):
        frozen, _ = count(lambda needs=needs: backward(op, data, kept, needs=needs))
        assert ahead + frozen == pytest.approx(6, rel=0.05)


def test_two_passes_do_eight_and_a_frozen_part_six(data):
    check_two_passes(linear_logprob, data, counted)


@pytest.mark.parametrize("epsilon", [0.001, 0.01])
def test_a_bounded_backward_does_six_times_the_share_it_reports(data, epsilon):
    report = torch.zeros(3)
    ahead, kept = counted(lambda: forward(linear_logprob, data, True))
    back, _ = counted(lambda: backward(linear_logprob, data, kept, epsilon, report))
    _, share, fell_back = report.tolist()
    assert fell_back == 0
    assert 0 < share < 0.6
    assert bounded.FALL_BACK >= 0.6
    assert ahead + back == pytest.approx(2 + 6 * share, rel=0.05)


@pytest.mark.parametrize(("needs", "expected"), [((True, True), 6), ((True, False), 4), ((False, True), 4)])
def test_one_pass_does_six_and_four_for_a_frozen_head(data, needs, expected):
    hidden, weight, target, _ = data
    logp, each = torch.zeros(N), torch.ones(4)
    edges = torch.arange(0, N + 1, N // 4)
    done, _ = counted(
        lambda: linear_residual.linear_residual_fwd(
            named("paper"), hidden, target, Head(weight, None, ONE), Anchors(logp, logp, None),
            Sequences(each, each, None, torch.full((), 4.0)), Segments(torch.ones(N, dtype=torch.bool), edges),
            Chunks(N, [0, N // 2, N], [0, 2, 4]), Needs(*needs, False),
        )
    )  # fmt: skip
    assert done == pytest.approx(expected, rel=0.05)
