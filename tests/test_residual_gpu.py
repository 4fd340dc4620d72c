"""The Triton residual on a GPU: every row of the family against plain torch in float64, at its own block sizes."""

import pytest
import torch
from gpu_waits import host_waits
from residual_runs import agree, pack, run

from flowrl_kernels import flowrl_loss
from flowrl_kernels.chunked import residual as plain
from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.testing import poisoned_memory, ragged_mask

pytestmark = pytest.mark.gpu
B, T = 37, 2500  # several blocks of tokens


def batch():
    """Ratios on both sides of every clip, an empty sequence, holes, groups of several and of one."""
    make = torch.Generator().manual_seed(0)
    mask = ragged_mask(B, T)
    logp = -3.0 * torch.rand(B, T, generator=make)
    ref, old, sampler = (logp + 0.01 * torch.randn(B, T, generator=make) for _ in range(3))
    old[0] += 0.01
    old[1] -= 0.02
    made = {"logp": logp, "ref": ref, "old": old, "sampler": sampler, "mask": mask}
    made["reward"], made["log_z"] = torch.randn(2, B, generator=make)
    made["groups"] = torch.arange(B) // 8
    return {name: tensor.cuda() for name, tensor in made.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_equals_the_formulas_in_float64_padded_and_packed(preset):
    room, row, data = launchers("residual", "triton"), PRESETS[preset], batch()
    with poisoned_memory():
        got = run(room, row, data)
    agree(got, run(plain, row, data), 1e-5)
    assert all(torch.equal(value, got[name]) for name, value in run(room, row, data).items())
    packed, cu_seqlens, inside = pack(data)
    flat = run(room, row, packed, cu_seqlens)
    assert torch.equal(flat.pop("dlogp"), got["dlogp"][inside])
    assert all(torch.equal(value, got[name]) for name, value in flat.items())


def test_the_loss_and_its_gradient_never_make_the_host_wait():
    data = batch()
    logp, log_z = data["logp"].requires_grad_(), data["log_z"].requires_grad_()

    def step():
        out = flowrl_loss(logp, data["ref"], data["reward"], log_z, logp_old=data["old"], mask=data["mask"])
        return torch.autograd.grad(out.loss, (logp, log_z))

    step()  # compiles
    with host_waits() as waits:
        step()
    assert waits == []
