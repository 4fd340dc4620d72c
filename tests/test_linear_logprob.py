"""linear_logprob: the numerics contract, on peaked logits, for every implementation that runs here."""

import pytest
import torch

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import assert_grad_close, oracle, peaked_inputs, poisoned_memory, relative_error

IMPLS = ["reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu)]
BITWISE = ["chunked", pytest.param("triton", marks=pytest.mark.gpu)]
SIZES = [(37, 67, 1037), (1, 8, 5), (130, 96, 2049)]


def device_of(impl):
    return "cuda" if impl == "triton" else "cpu"


def inputs(impl, n, h, v, **settings):
    return [t.to(device_of(impl)) for t in peaked_inputs(n, h, v, **settings)]


def run(hidden, weight, target, grad, impl, **settings):
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = linear_logprob(x, w, target, impl=impl, **settings)
    dx, dw = torch.autograd.grad(out.logp, (x, w), grad)
    return out, dx, dw


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "h", "v"), SIZES)
def test_float32_matches_the_float64_oracle_on_peaked_logits(impl, n, h, v):
    hidden, weight, target = inputs(impl, n, h, v, peak=40.0)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    logp, entropy, dx, dw = oracle(hidden, weight, target, grad)
    out, got_dx, got_dw = run(hidden, weight, target, grad, impl, entropy=True)
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    assert out.logp.dtype == torch.float32
    assert_grad_close(got_dx, dx, rel=1e-4)
    assert_grad_close(got_dw, dw, rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_logits_keep_float32_precision(impl):
    hidden, weight, target = inputs(impl, 200, 128, 3001, dtype=torch.bfloat16, peak=40.0)
    logp, _, _, _ = oracle(hidden, weight, target)
    largest = (hidden.double() @ weight.double().T).abs().amax(1)
    rows = (largest > 16) & (largest < 48)
    assert rows.sum() > 50
    eager = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None])[:, 0].double()
    got = linear_logprob(hidden, weight, target, impl=impl).logp
    ours, theirs = (got - logp).abs()[rows], (eager - logp).abs()[rows]
    assert ours.max() * 100 < theirs.max()
    assert ours.mean() * 100 < theirs.mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_one_rounding_from_exact(impl, dtype):
    hidden, weight, target = inputs(impl, 150, 64, 1500, dtype=dtype, peak=20.0)
    grad = torch.randn(150, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    _, _, dx, dw = oracle(hidden, weight, target, grad)
    _, got_dx, got_dw = run(hidden, weight, target, grad, impl)
    assert got_dx.dtype == got_dw.dtype == dtype
    assert_grad_close(got_dx, dx, rel=2.5e-3)
    assert_grad_close(got_dw, dw, rel=2.5e-3, row=5e-2)


@pytest.mark.parametrize("impl", BITWISE)
def test_a_row_keeps_its_bits_whatever_the_batch(impl):
    hidden, weight, target = inputs(impl, 300, 48, 1111)
    whole = linear_logprob(hidden, weight, target, entropy=True, impl=impl)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3)).to(hidden.device)
    moved = linear_logprob(hidden[order], weight, target[order], entropy=True, impl=impl)
    assert torch.equal(moved.logp, whole.logp[order])
    assert torch.equal(moved.entropy, whole.entropy[order])
    halves = [linear_logprob(hidden[s], weight, target[s], impl=impl).logp for s in (slice(0, 113), slice(113, 300))]
    assert torch.equal(torch.cat(halves), whole.logp)
    for n in range(1, 41):
        assert torch.equal(linear_logprob(hidden[:n], weight, target[:n], impl=impl).logp, whole.logp[:n]), n


@pytest.mark.parametrize("impl", BITWISE)
def test_flags_leave_the_bits_of_logp_alone(impl):
    hidden, weight, target = inputs(impl, 70, 40, 900)
    plain = linear_logprob(hidden, weight, target, impl=impl).logp
    with_entropy = linear_logprob(hidden, weight, target, entropy=True, impl=impl).logp
    with_grad = linear_logprob(hidden.clone().requires_grad_(), weight, target, impl=impl).logp
    ignored = torch.where(torch.arange(70, device=target.device) % 3 == 0, -100, target)
    some = linear_logprob(hidden, weight, ignored, impl=impl).logp
    assert torch.equal(with_entropy, plain)
    assert torch.equal(with_grad, plain)
    assert torch.equal(some[ignored >= 0], plain[ignored >= 0])
    assert (some[ignored < 0] == 0).all()
    bounded = linear_logprob(hidden.clone().requires_grad_(), weight, target, epsilon=0.01, impl=impl).logp
    assert torch.equal(bounded, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_the_same_bits(impl):
    hidden, weight, target = inputs(impl, 90, 64, 3000, dtype=torch.bfloat16)
    grad = torch.randn(90).to(hidden.device)
    first, second = (run(hidden, weight, target, grad, impl) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_scale_softcap_and_token_temperature_follow_the_formula(impl):
    hidden, weight, target = inputs(impl, 33, 24, 517)
    make = torch.Generator().manual_seed(5)
    bias = torch.randn(517, generator=make).to(hidden.device)
    temperature = (0.5 + torch.rand(33, generator=make)).to(hidden.device)
    settings = {"bias": bias, "temperature": temperature, "logit_scale": 0.7, "softcap": 15.0}
    grad = torch.randn(33, generator=make).to(hidden.device)
    logp, entropy, dx, dw = oracle(hidden, weight, target, grad, **settings)
    b = bias.clone().requires_grad_()
    out, got_dx, got_dw = run(hidden, weight, target, grad, impl, entropy=True, **{**settings, "bias": b})
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    assert_grad_close(got_dx, dx, rel=1e-4)
    assert_grad_close(got_dw, dw, rel=1e-4)
    b64 = bias.double().requires_grad_()
    exact = linear_logprob(
        hidden.double(), weight.double(), target, impl="reference",
        **{**settings, "bias": b64, "temperature": temperature.double()},
    )  # fmt: skip
    expected = torch.autograd.grad(exact.logp, b64, grad.double())[0]
    b.grad = None
    got = torch.autograd.grad(
        linear_logprob(hidden, weight, target, impl=impl, **{**settings, "bias": b}).logp, b, grad
    )
    assert_grad_close(got[0], expected, rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 12.0])
def test_the_entropy_gradient_is_right(impl, softcap):
    hidden, weight, target = inputs(impl, 20, 16, 300, peak=6.0)
    x64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    make = torch.Generator().manual_seed(2)
    g, ge = (torch.randn(20, generator=make).to(hidden.device) for _ in range(2))
    out = linear_logprob(x64, w64, target, entropy=True, softcap=softcap, impl="reference")
    expected = torch.autograd.grad((out.logp, out.entropy), (x64, w64), (g.double(), ge.double()))
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprob(x, w, target, entropy=True, softcap=softcap, impl=impl)
    got = torch.autograd.grad((out.logp, out.entropy), (x, w), (g, ge), retain_graph=True)
    assert_grad_close(got[0], expected[0], rel=1e-4)
    assert_grad_close(got[1], expected[1], rel=1e-4)
    alone = torch.autograd.grad(out.entropy.sum(), x)[0]
    out64 = linear_logprob(x64, w64, target, entropy=True, softcap=softcap, impl="reference")
    assert_grad_close(alone, torch.autograd.grad(out64.entropy.sum(), x64)[0], rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_banned_tokens_give_minus_infinity_and_never_nan(impl):
    hidden, weight, target = inputs(impl, 12, 16, 300)
    bias = torch.zeros(300, device=hidden.device)
    bias[:150] = -torch.inf
    target[:6], target[6:] = 3, 200
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprob(x, w, target, bias=bias, entropy=True, impl=impl)
    assert (out.logp[:6] == -torch.inf).all()
    assert out.logp[6:].isfinite().all()
    assert out.entropy.isfinite().all()
    dx, dw = torch.autograd.grad((out.logp[6:].sum(), out.entropy.sum()), (x, w))
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert (dw[:3] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_shapes_and_strange_strides_are_taken(impl):
    hidden, weight, target = inputs(impl, 24, 16, 300)
    flat = linear_logprob(hidden, weight, target, impl=impl).logp
    shaped = linear_logprob(hidden.view(2, 3, 4, 16), weight, target.view(2, 3, 4), entropy=True, impl=impl)
    assert shaped.logp.shape == shaped.entropy.shape == (2, 3, 4)
    assert torch.equal(shaped.logp.flatten(), flat)
    apart = hidden.T.contiguous().T
    assert torch.equal(linear_logprob(apart, weight.T.contiguous().T, target, impl=impl).logp, flat)
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, impl=impl).logp
    one = torch.autograd.grad(out, x, torch.ones((), device=x.device).expand(24), retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(out, x, torch.ones(24, device=x.device))[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_only_ignored_rows_give_zero_gradients(impl):
    hidden, weight, target = inputs(impl, 6, 8, 200)
    for x, y in ((hidden[:0], target[:0]), (hidden, torch.full_like(target, -100))):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(a, w, y, entropy=True, impl=impl)
        assert out.logp.shape == y.shape
        assert (out.logp == 0).all()
        (out.logp.sum() + out.entropy.sum()).backward()
        assert (a.grad == 0).all()
        assert (w.grad == 0).all()


def test_frozen_parts_cost_no_gradient(monkeypatch):
    hidden, weight, target = peaked_inputs(16, 8, 300)
    from flowrl_kernels.chunked import linear_logprob as room

    asked = []
    whole = room.linear_logprob_bwd
    monkeypatch.setattr(room, "linear_logprob_bwd", lambda *a: asked.append(a[5]) or whole(*a))
    linear_logprob(hidden.requires_grad_(), weight, target).logp.sum().backward()
    linear_logprob(hidden.detach(), weight.requires_grad_(), target).logp.sum().backward()
    assert asked == [(True, False, False), (False, True, False)]


@pytest.mark.parametrize("impl", BITWISE)
def test_main_grad_takes_the_weight_gradient_in_float32(impl):
    hidden, weight, target = inputs(impl, 64, 32, 700, dtype=torch.bfloat16)
    grad = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    _, _, _, dw = oracle(hidden, weight, target, grad)
    main = torch.ones(700, 32, device=hidden.device)
    w = weight.clone().requires_grad_()
    out = linear_logprob(hidden.clone().requires_grad_(), w, target, main_grad=main, impl=impl)
    out.logp.backward(grad)
    assert w.grad is None
    assert_grad_close(main - 1.0, dw, rel=1.8e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_graph_can_be_used_twice(impl):
    hidden, weight, target = inputs(impl, 10, 8, 150)
    x = hidden.requires_grad_()
    out = linear_logprob(x, weight, target, impl=impl).logp
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), x)[0])


def test_autocast_casts_as_a_linear_layer_would():
    hidden, weight, target = peaked_inputs(10, 16, 200)
    x = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_logprob(x, weight, target)
    cast = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(out.logp, cast.logp)
    out.logp.sum().backward()
    assert x.grad.dtype == torch.float32


def test_float64_is_exact():
    hidden, weight, target = peaked_inputs(9, 7, 140, dtype=torch.float64)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    bias = torch.randn(140, dtype=torch.float64, requires_grad=True)

    def both(a, b, c):
        out = linear_logprob(a, b, target, bias=c, temperature=0.7, softcap=20.0, entropy=True, impl="chunked")
        return out.logp, out.entropy

    assert torch.autograd.gradcheck(both, (x, w, bias))

    def specification(a, b, c):
        out = linear_logprob(a, b, target, bias=c, temperature=0.7, softcap=20.0, entropy=True, impl="reference")
        return out.logp, out.entropy

    assert torch.autograd.gradcheck(specification, (x, w, bias))


def test_a_common_offset_of_the_logits_changes_nothing():
    hidden, weight, target = peaked_inputs(9, 16, 300)
    for offset in (-200.0, 200.0):
        moved = linear_logprob(hidden, weight, target, bias=torch.full((300,), offset)).logp
        assert (moved - linear_logprob(hidden, weight, target).logp).abs().max() < 1e-4


def test_no_result_reads_memory_that_was_never_written():
    hidden, weight, target = peaked_inputs(70, 24, 1100)
    target[::5] = -100
    grad = torch.randn(70)
    clean = run(hidden, weight, target, grad, "chunked", entropy=True)
    with poisoned_memory():
        poisoned = run(hidden, weight, target, grad, "chunked", entropy=True)
    for a, b in zip(
        (clean[0].logp, clean[0].entropy, *clean[1:]), (poisoned[0].logp, poisoned[0].entropy, *poisoned[1:])
    ):
        assert torch.equal(a, b)


def test_nan_inputs_are_not_hidden():
    hidden, weight, target = peaked_inputs(5, 8, 150)
    hidden[2, 3] = float("nan")
    logp = linear_logprob(hidden, weight, target).logp
    assert logp[2].isnan()
    assert logp[[0, 1, 3, 4]].isfinite().all()


def test_the_error_check_refuses_what_is_two_percent_off():
    right = torch.randn(10, 4)
    with pytest.raises(AssertionError):
        assert_grad_close(right * 1.02, right, rel=1e-2)
    with pytest.raises(AssertionError):
        assert_grad_close(torch.zeros_like(right), right, rel=1e-2)
    assert relative_error(right, right) == (0.0, 0.0)


def test_float32_products_stay_exact_where_the_process_allows_others_by_torchs_newer_switches():
    rooms = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    hidden, weight, target = torch.randn(40, 64), torch.randn(300, 64), torch.randint(300, (40,))
    expected = linear_logprob(hidden, weight, target, impl="chunked").logp
    before = [room.fp32_precision for room in rooms]
    try:
        rooms[0].fp32_precision, rooms[1].fp32_precision = "tf32", "bf16"
        got = linear_logprob(hidden, weight, target, impl="chunked").logp
        assert [room.fp32_precision for room in rooms] == ["tf32", "bf16"]
    finally:
        for room, precision in zip(rooms, before):
            room.fp32_precision = precision
    assert torch.equal(got, expected)
