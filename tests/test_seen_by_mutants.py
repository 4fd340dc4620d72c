"""Faults that `make mutants` put in and that no other test noticed."""

import pytest
import torch

from flowrl_kernels import flowrl_loss
from flowrl_kernels.chunked import tiles


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
