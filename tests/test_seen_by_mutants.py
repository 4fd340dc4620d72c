"""Faults that `make mutants` put in and that no other test noticed."""

import pytest
import torch

from flowrl_kernels import LinearFlowRLLoss, flowrl_loss, linear_logprob
from flowrl_kernels.chunked import tiles
from flowrl_kernels.ops.linear_residual import halved


def test_tokens_before_the_first_boundary_are_refused():
    flat, row = torch.zeros(12), torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens: .*from 0 to 12"):
        flowrl_loss(flat, flat, row, row, cu_seqlens=torch.tensor([1, 4, 4, 12]))


def test_tile_statistics_are_never_below_what_they_bound_and_at_most_one_step_above():
    value = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 20, torch.tensor([0.0, 1.0])])
    half = tiles.round_up_to_half(value)
    assert (half.float() >= value).all()
    below = torch.nextafter(half, torch.full_like(half, -torch.inf))
    assert (below.float() < value).all()


def test_each_row_of_a_waiting_float16_gradient_keeps_eleven_bits():
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1.0], [1e3], [1e9]])
    half, inverse = halved(rows.clone())
    assert half.dtype == torch.float16
    error = (half.float() * inverse[:, None] - rows).abs().amax(1)
    assert (error <= 2**-11 * rows.abs().amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_later_backward_of_a_single_pass_leaves_the_first_gradient_alone(dtype):
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 8, generator=make).to(dtype).requires_grad_()
    weight, target = torch.randn(20, 8, generator=make).to(dtype), torch.randint(20, (2, 3), generator=make)
    loss = LinearFlowRLLoss()(hidden, weight, target, torch.full((2, 3), -3.0), torch.ones(2), torch.zeros(2)).loss
    (first,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    before = first.clone()
    (second,) = torch.autograd.grad(6 * loss, hidden)
    assert torch.equal(first, before)
    assert before.abs().max() > 0
    torch.testing.assert_close(second, 3 * before, rtol=2e-3, atol=1e-6)


def test_a_narrow_id_that_wraps_onto_the_ignored_one_keeps_its_temperature():
    make = torch.Generator().manual_seed(0)
    hidden, weight, own = torch.randn(1, 4, generator=make), torch.randn(200, 4, generator=make), torch.tensor([2.5])
    narrow, wide = (linear_logprob(hidden, weight, torch.tensor([156], dtype=d), temperature=own).logp
                    for d in (torch.uint8, torch.int64))  # fmt: skip
    assert torch.equal(narrow, wide)
