"""The bounded backward in Triton on a GPU: 16-bit inputs, whole tiles, the lists of the compiled library too."""

import pytest
import torch
from gpu_waits import host_waits

from flowrl_kernels import linear_logprob
from flowrl_kernels.chunked import routing
from flowrl_kernels.testing import assert_grad_close, rl_like_inputs

pytestmark = pytest.mark.gpu


def dropped_share(plan, columns, hidden, weight, target, grad):
    """Relative L1 norm of the entries of dlogits that a plan over tiles of `columns` dropped, in float64."""
    p = torch.softmax(hidden.double() @ weight.double().T, -1)
    entries = grad.double().abs()[:, None] * p.scatter(1, target[:, None], 0.0)
    active = plan.active.repeat_interleave(columns, 1)[:, : weight.shape[0]]
    return float(entries.masked_fill(active, 0.0).sum() / (2.0 * entries.sum()))


def batch(dtype, n=4096, h=1024, v=40000, **settings):
    hidden, weight, target, grad = rl_like_inputs(n, h, v, zipf=1.2, dtype=dtype, device="cuda", **settings)
    return hidden, weight, target, grad * 64  # float16 gradients stay in range


def gradients(hidden, weight, target, grad, epsilon=0.01, **settings):
    report = torch.zeros(3, device="cuda")
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_logprob(x, w, target, epsilon=epsilon, report=report, impl="triton", **settings).logp.backward(grad)
    return report, x.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bound_holds_on_what_was_dropped_and_the_gradients_are_close_to_exact(dtype, monkeypatch):
    from flowrl_kernels.triton import bounded

    plans, make_plan = [], bounded.make_plan
    monkeypatch.setattr(bounded, "make_plan", lambda *a: plans.append(make_plan(*a)) or plans[-1])
    data = batch(dtype)
    report, dx, dw = gradients(*data)
    bound, share, fell_back = report.tolist()
    assert fell_back == 0.0
    assert 0.0 < share < 0.5
    assert 0.005 <= bound <= 0.01
    assert dropped_share(plans[0], bounded.COLUMNS, *data) <= bound
    exact = gradients(*data, epsilon=0.0)
    rel = 1.5e-3 if dtype == torch.float32 else 4e-3  # two roundings of dz and of the output
    assert_grad_close(dx, exact[1], rel=rel, row=0.2)
    assert_grad_close(dw, exact[2], rel=rel, row=0.4)


def test_in_float32_outputs_the_gradients_keep_the_bar():
    hidden, weight, target, grad = batch(torch.bfloat16)
    mains = []
    for epsilon in (0.0, 0.01):
        mains.append(torch.zeros(weight.shape, device="cuda"))
        report, _, _ = gradients(hidden, weight, target, grad, epsilon, main_grad=mains[-1])
    assert report[2] == 0
    assert_grad_close(mains[1], mains[0], rel=2.5e-3, row=0.4)


def test_two_runs_give_the_same_bits_and_the_host_waits_once():
    data = batch(torch.bfloat16)
    first = gradients(*data)
    x, w = data[0].clone().requires_grad_(), data[1].clone().requires_grad_()
    out = linear_logprob(x, w, data[2], epsilon=0.01, impl="triton").logp
    with host_waits() as waits:
        out.backward(data[3])
    assert len(waits) == 1
    assert torch.equal(x.grad, first[1])
    assert torch.equal(w.grad, first[2])


def test_lists_from_torch_and_from_the_compiled_library_give_the_same_gradients(monkeypatch):
    from flowrl_kernels.triton import bounded

    data = batch(torch.bfloat16)
    if bounded.route(data[0].device) is routing:
        pytest.skip("the CUDA library is not built")
    compiled = gradients(*data)
    monkeypatch.setattr(bounded, "route", lambda device: routing)
    for a, b in zip(compiled, gradients(*data)):
        assert torch.equal(a, b)


@pytest.mark.sanitize
@pytest.mark.parametrize("h", [64, 63])
def test_slabs_bias_and_odd_sizes_stay_within_their_memory(h, monkeypatch):
    from flowrl_kernels.triton import bounded

    monkeypatch.setattr(bounded, "SLAB_BYTES", 4 * 128 * (2 * bounded.COLUMNS + 4 * h))
    monkeypatch.setattr(bounded, "FALL_BACK", 1.0)
    hidden, weight, target, grad = batch(torch.bfloat16, 300, h, 3001)
    bias = torch.zeros(3001, device="cuda", requires_grad=True)
    report, dx, dw = gradients(hidden, weight, target, grad, bias=bias)
    assert report[2] == 0
    for gradient in (dx, dw, bias.grad):
        assert gradient.isfinite().all()
