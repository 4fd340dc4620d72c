"""The Triton residual on a GPU: every row of the family against plain torch in float64, at its own block sizes."""

import warnings

import pytest
import torch

from flowrl_kernels import flowrl_loss
from flowrl_kernels.chunked import residual as plain
from flowrl_kernels.dispatch import launchers
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, poisoned_memory, ragged_mask

pytestmark = pytest.mark.gpu
B, T = 37, 2500  # several blocks of tokens
NAMES = ("loss", "residual", "weight", "metrics", "dlogp", "dlog_z")


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


def run(launcher, row, data, cu_seqlens=None):
    data = {k: v.double() if launcher is plain and v.is_floating_point() else v for k, v in data.items()}
    anchor = {"ref": data["ref"], "old": data["old"], None: None}[row.anchor]
    log_z = data["log_z"] if row.log_z == "learned" else None
    out = launcher.residual_fwd(
        row, data["logp"], anchor, data["old"], data["sampler"], data["reward"], log_z, data["mask"], cu_seqlens,
        data["groups"], None,
    )  # fmt: skip
    return dict(zip(NAMES, out))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_equals_the_formulas_in_float64_padded_and_packed(preset):
    room, row, data = launchers("residual", "triton"), PRESETS[preset], batch()
    with poisoned_memory():
        got = run(room, row, data)
    want = run(plain, row, data)
    for name in ("loss", "residual", "weight", "metrics"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("dlogp", "dlog_z"):
        if want[name].norm() > 0:
            assert_grad_close(got[name], want[name], rel=1e-5)
        else:
            assert not got[name].any()
    assert all(torch.equal(value, got[name]) for name, value in run(room, row, data).items())
    lengths = torch.where(data["mask"].any(1), T - data["mask"].flip(1).int().argmax(1), 0)
    inside = torch.arange(T, device="cuda") < lengths[:, None]
    packed = {k: v[inside] if v.shape == inside.shape else v for k, v in data.items()}
    flat = run(room, row, packed, cu_seqlens_of(lengths).long())
    assert torch.equal(flat.pop("dlogp"), got["dlogp"][inside])
    assert all(torch.equal(value, got[name]) for name, value in flat.items())


def test_the_loss_and_its_gradient_never_make_the_host_wait():
    data = batch()
    logp, log_z = data["logp"].requires_grad_(), data["log_z"].requires_grad_()

    def step():
        out = flowrl_loss(logp, data["ref"], data["reward"], log_z, logp_old=data["old"], mask=data["mask"])
        return torch.autograd.grad(out.loss, (logp, log_z))

    step()  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
