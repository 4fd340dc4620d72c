"""The Triton logprob from logits under the interpreter."""

import pytest
import torch

from flowrl_kernels.reference.logprob import logprob as reference
from flowrl_kernels.testing import assert_grad_close
from flowrl_kernels.triton import logprob as op

ONE = torch.ones(1)


def peaked(n, v, dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    logits = (torch.randn(n, v, generator=make) * 9.0).to(dtype)
    return logits, torch.where(torch.rand(n, generator=make) < 0.5, logits.argmax(1), torch.arange(n) % v)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("v", [5, 4096, 9001])
def test_values_and_both_gradients_match_float64(dtype, within, softcap, v):
    n = 5
    logits, target = peaked(n, v, dtype)
    temperature = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.5
    g, ge = torch.randn(2, n, generator=torch.Generator().manual_seed(2))
    leaf = logits.double().requires_grad_()
    exact = reference(leaf, target, temperature.double(), softcap, -1, True)
    (expected,) = torch.autograd.grad((exact.logp, exact.entropy), leaf, (g.double(), ge.double()))
    out = op.logprob_fwd(logits, target, temperature, softcap, True)
    assert (out[0] - exact.logp).abs().max() < 2e-5
    assert (out[2] - exact.entropy).abs().max() < 2e-5
    before = logits.clone()
    got = op.logprob_bwd(g, ge, logits, target, temperature, softcap, *out, False)
    assert torch.equal(logits, before)
    assert got.dtype == dtype
    # five logits a row are few: one rounding to bfloat16 may be all of the error
    assert_grad_close(got, expected, rel=within if v > 5 else 2 * within)
    same = op.logprob_bwd(g, ge, logits, target, temperature, softcap, *out, True)
    assert same.data_ptr() == logits.data_ptr()
    assert torch.equal(same, got)


def test_a_row_keeps_its_bits_and_the_entropy_flag_changes_none(dtype):
    logits, target = peaked(9, 5000, dtype)
    whole = op.logprob_fwd(logits, target, ONE, None, True)
    plain = op.logprob_fwd(logits, target, ONE, None, False)
    assert plain[2].shape == (0,)
    for i in range(2):
        assert torch.equal(whole[i], plain[i])
        rows = [op.logprob_fwd(logits[j : j + 1], target[j : j + 1], ONE, None, False)[i] for j in range(9)]
        assert torch.equal(torch.cat(rows, -1), whole[i])


def test_skipped_rows_are_not_read_and_get_zero_gradient(dtype, within):
    logits, target = peaked(4, 300, dtype)
    logits[1] = float("nan")
    target[1], target[2] = -1, 300  # skipped; no target here
    out = op.logprob_fwd(logits, target, ONE, None, True)
    assert all((t[..., 1] == 0).all() for t in out)
    assert out[0][2] == -torch.inf  # no target here
    assert torch.isclose(out[1][:, 2].sum(), torch.logsumexp(logits[2].float(), 0), atol=1e-5)
    g = torch.tensor([1.0, 0.0, 1.0, 0.0])
    d = op.logprob_bwd(g, None, logits, target, ONE, None, *out, False)
    assert (d[1] == 0).all()
    assert (d[3] == 0).all()
    assert_grad_close(d[2:3], -torch.softmax(logits[2:3].double(), -1), rel=within)


def test_banned_tokens_give_minus_infinity_and_never_nan(dtype):
    logits, target = peaked(3, 9000, dtype)
    logits[:, :5000] = -torch.inf
    target[:] = torch.tensor([3, 6000, 7000])
    out = op.logprob_fwd(logits, target, ONE, None, True)
    assert out[0][0] == -torch.inf
    assert out[1].isfinite().all()
    assert out[2].isfinite().all()
    d = op.logprob_bwd(torch.ones(3), torch.ones(3), logits, target, ONE, None, *out, False)
    assert d.isfinite().all()
    assert (d[1:, :5000] == 0).all()


def test_rows_of_a_wider_tensor_and_strided_gradients(dtype):
    logits, target = peaked(6, 400, dtype)
    wide = torch.randn(6, 1000).to(dtype)
    wide[:, 77:477] = logits
    a, b = (op.logprob_fwd(t, target, ONE, None, False) for t in (logits, wide[:, 77:477]))
    assert torch.equal(a[1], b[1])
    g = torch.randn(6, 2)[:, 1]
    first = op.logprob_bwd(g, None, logits, target, ONE, None, *a, False)
    second = op.logprob_bwd(g.clone(), None, wide[:, 77:477], target, ONE, None, *a, True)
    assert torch.equal(first, second)
    assert torch.equal(wide[:, 77:477], first)


def test_no_rows_at_all(dtype):
    logits, target = torch.empty(0, 9, dtype=dtype), torch.empty(0, dtype=torch.int64)
    out = op.logprob_fwd(logits, target, ONE, None, True)
    assert op.logprob_bwd(out[0], None, logits, target, ONE, None, *out, False).shape == (0, 9)
