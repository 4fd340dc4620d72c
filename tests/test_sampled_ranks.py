"""The sampled backward on two gloo ranks: the pairs and the factors of one rank, and its gradients."""

from unittest import mock

import torch
import torch.distributed as dist
from ranks import on_ranks

from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.chunked import sampled as room
from flowrl_kernels.testing import assert_grad_close, rl_like_inputs

N, V = 40, 1500


def batch(idle):
    """hidden, weight, target, grad, and the rows' ids; with `idle` the second half has no gradient."""
    hidden, weight, target, grad = rl_like_inputs(N, 16, V, zipf=1.0)
    if idle:
        grad = torch.where(torch.arange(N) < 28, grad, 0.0)
    return hidden, weight, target, grad, torch.arange(N) * (1 << 32) + 5


def backward(part, data, group=None):
    """Gradients of hidden and weight, the report, and the plan that they were made by."""
    hidden, weight, target, grad, ids = (data[0][part], data[1], *(t[part] for t in data[2:]))
    x, w, report, plans = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), torch.zeros(4), []
    make = room.make_plan

    def seen(*arguments):
        plans.append(make(*arguments))
        return plans[-1]

    with mock.patch.object(room, "make_plan", seen):
        linear_logprob(x, w, target, sampled=Sampled(0.1, (3, 1), ids, group=group), report=report).logp.backward(grad)
    return x.grad, w.grad, report, plans[0]


def worker(rank, world):
    for idle in (False, True):
        data = batch(idle)
        mine = (slice(0, 28), slice(28, N))[rank]
        live = data[3] != 0
        dhidden, dweight, _, plan = backward(slice(0, N), data)
        own_dhidden, own_dweight, own_report, own_plan = backward(mine, data, dist.group.WORLD)
        rows = live.cumsum(0)[mine][live[mine]] - 1  # of the plan, which has rows with a gradient alone
        assert torch.equal(own_plan.tau, plan.tau)
        assert torch.equal(own_plan.factor, plan.factor[rows])
        assert torch.equal(own_plan.mass, plan.mass[rows])
        torch.testing.assert_close(own_dhidden, dhidden[mine], rtol=1e-5, atol=1e-8)
        dist.all_reduce(own_dweight)
        assert_grad_close(own_dweight, dweight, rel=1e-6)
        assert own_report.isnan().tolist() == [True, False, False, False]
        if 0 < len(rows) < live.sum():  # a rank by itself draws by another tau
            assert not torch.equal(backward(mine, data)[3].factor, plan.factor[rows])


def test_two_ranks_draw_the_pairs_of_one_also_where_a_rank_has_no_gradient():
    on_ranks(worker, 2)
