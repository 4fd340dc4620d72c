"""The Triton linear_logprob under the interpreter."""

import pytest
import torch

from benchmarks import doubts
from flowrl_kernels.core.types import Budget, Head, Needs, Saved, Upstream
from flowrl_kernels.reference.linear_logprob import linear_logprob as reference
from flowrl_kernels.testing import assert_grad_close, oracle, peaked_inputs, poisoned_memory
from flowrl_kernels.triton import linear_logprob as op
from tests import variants

ONE = torch.ones(1)


def forward(hidden, weight, target, bias=None, temperature=ONE, scale=1.0, softcap=None, entropy=False, stats=False):
    return op.linear_logprob_fwd(hidden, target, Head(weight, bias, temperature, scale, softcap), entropy, stats)


def backward(
    grad, hidden, weight, target, saved, grad_entropy=None, bias=None, temperature=ONE, scale=1.0, softcap=None,
    main_grad=None, needs=(True, True, False), epsilon=0.0, report=None,
):  # fmt: skip
    return op.linear_logprob_bwd(
        Upstream(grad, grad_entropy), hidden, target, Head(weight, bias, temperature, scale, softcap), Saved(*saved),
        Needs(*needs), Budget(epsilon, report), main_grad,
    )  # fmt: skip


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "h", "v"), [(37, 72, 2500), (45, 71, 1037), (1, 8, 5), (33, 64, 256)])
def test_peaked_logits_keep_the_precision_of_float32(dtype, n, h, v):
    hidden, weight, target = peaked_inputs(n, h, v, dtype=dtype, peak=40.0)
    logp, entropy, _, _ = oracle(hidden, weight, target)
    eager = torch.log_softmax(hidden.float() @ weight.float().T, -1).gather(1, target[:, None])[:, 0]
    out = forward(hidden, weight, target, entropy=True)
    assert (out[0] - logp).abs().max() <= (eager - logp).abs().max() + 1e-5
    assert (out[2] - entropy).abs().max() < 2e-5
    assert (out[2] >= 0).all()


@pytest.mark.parametrize(("n", "h", "v"), [(37, 72, 2500), (45, 71, 1037)])
def test_gradients_match_float64_on_peaked_logits(dtype, within, n, h, v):
    hidden, weight, target = peaked_inputs(n, h, v, dtype=dtype, peak=30.0)
    grad = normal(n) * 1e-6  # a sequence's share of a mean: below what float16 resolves without a factor
    _, _, dx, dw = oracle(hidden, weight, target, grad)
    if dtype == torch.bfloat16 and v == 2500:
        within *= 2  # few rows carry this gradient: p - onehot rounded to bfloat16 alone is 0.31 % off
    saved = forward(hidden, weight, target)
    with poisoned_memory():
        got_dx, got_dw, got_db = backward(grad, hidden, weight, target, saved, needs=(True, True, True))
    if dtype == torch.float16:  # the outputs themselves are float16: compare what they can hold
        saved = forward(hidden, weight, target)
        got_dx, got_dw, got_db = backward(grad * 2**20, hidden, weight, target, saved, needs=(True, True, True))
        dx, dw, grad = dx * 2**20, dw * 2**20, grad * 2**20
    assert got_dx.dtype == got_dw.dtype == dtype
    assert_grad_close(got_dx, dx, rel=within)
    assert_grad_close(got_dw, dw, rel=within, row=50 * within)
    z = hidden.double() @ weight.double().T
    dz = grad.double()[:, None] * (torch.nn.functional.one_hot(target, v) - torch.softmax(z, -1))
    assert_grad_close(got_db, dz.sum(0), rel=1e-5)


def test_small_coefficients_do_not_underflow(dtype, within):
    hidden, weight, target = peaked_inputs(20, 32, 300, dtype=dtype, peak=20.0)
    grad = normal(20) * 1e-7
    _, _, _, dw = oracle(hidden, weight, target, grad)
    main = torch.zeros(300, 32)
    _, dweight, _ = backward(grad, hidden, weight, target, forward(hidden, weight, target), main_grad=main)
    assert dweight is None
    assert_grad_close(main, dw, rel=min(within, 1.8e-3), row=50 * within)


def test_a_row_keeps_its_bits_under_permutation_padding_and_splitting(dtype):
    hidden, weight, target = peaked_inputs(70, 40, 2300, dtype=dtype)
    whole = forward(hidden, weight, target, entropy=True, stats=True)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    moved = forward(hidden[order], weight, target[order], entropy=True, stats=True)
    for a, b in zip(moved[:4], whole[:4]):
        assert torch.equal(a, b[..., order])
    parts = [forward(hidden[s], weight, target[s]) for s in (slice(0, 1), slice(1, 34), slice(34, 70))]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts], -1), whole[i])
    padded = torch.cat([torch.full_like(hidden[:9], float("nan")), hidden])
    skipped = torch.cat([torch.full((9,), -1), target])
    out = forward(padded, weight, skipped)
    assert torch.equal(out[1][:, 9:], whole[1])
    assert (out[0][:9] == 0).all()
    assert (out[1][:, :9] == 0).all()


def test_flags_do_not_change_the_bits(dtype):
    hidden, weight, target = peaked_inputs(20, 24, 600, dtype=dtype)
    plain = forward(hidden, weight, target)
    for entropy, stats in ((True, False), (False, True), (True, True)):
        out = forward(hidden, weight, target, entropy=entropy, stats=stats)
        assert torch.equal(out[0], plain[0])
        assert torch.equal(out[1], plain[1])


def test_bias_scale_softcap_temperature_and_both_gradients_follow_the_formula(dtype, within):
    n, h, v = 21, 24, 517
    hidden, weight, target = peaked_inputs(n, h, v, dtype=dtype)
    bias, temperature = normal(v), normal(n, seed=2).abs() + 0.5
    g, ge = normal(n, seed=3), normal(n, seed=4)
    for softcap in (None, 15.0):
        leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
        exact = reference(leaves[0], leaves[1], target, leaves[2], temperature.double(), 0.7, softcap, -1, True)
        dx, dw, db = torch.autograd.grad((exact.logp, exact.entropy), leaves, (g.double(), ge.double()))
        settings = {"bias": bias, "temperature": temperature, "scale": 0.7, "softcap": softcap}
        out = forward(hidden, weight, target, entropy=True, **settings)
        assert (out[0] - exact.logp).abs().max() < 2e-5
        assert (out[2] - exact.entropy).abs().max() < 2e-5
        got = backward(g, hidden, weight, target, out, grad_entropy=ge, needs=(True, True, True), **settings)
        assert_grad_close(got[0], dx, rel=2 * within)  # of 21 rows few count
        assert_grad_close(got[1], dw, rel=2 * within, row=50 * within)
        assert_grad_close(got[2], db, rel=1e-5)


def test_banned_tokens_give_minus_infinity_and_never_nan(dtype):
    hidden, weight, target = peaked_inputs(12, 16, 700, dtype=dtype)
    bias = torch.zeros(700)
    bias[:300] = -torch.inf  # two whole tiles of 128 and a part
    target[:6], target[6:] = 3, 500
    out = forward(hidden, weight, target, bias=bias, entropy=True, stats=True)
    assert (out[0][:6] == -torch.inf).all()
    assert out[0][6:].isfinite().all()
    assert out[1].isfinite().all()
    assert out[2].isfinite().all()
    assert (out[3][:2] == -torch.inf).all()
    grads = backward(
        torch.ones(12), hidden, weight, target, out, grad_entropy=torch.ones(12), bias=bias, needs=(True, True, True)
    )
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][4:300] == 0).all()
    every = forward(hidden, weight, target, bias=torch.full((700,), -torch.inf))
    assert (every[1] == -torch.inf).all()


def test_logits_far_below_zero_do_not_underflow(dtype):
    hidden, weight, target = torch.ones(4, 8, dtype=dtype), torch.full((300, 8), -100.0, dtype=dtype), torch.arange(4)
    out = forward(hidden, weight, target, entropy=True)
    assert torch.allclose(out[0], torch.full((4,), 300.0).log().neg(), atol=2e-4)
    assert torch.allclose(out[2], torch.full((4,), 300.0).log(), atol=2e-4)


def test_nan_is_not_hidden(dtype):
    hidden, weight, target = peaked_inputs(5, 8, 200, dtype=dtype)
    hidden[2, 3] = float("nan")
    out = forward(hidden, weight, target, entropy=True)
    assert out[1].isnan().any(0).tolist() == [False, False, True, False, False]
    assert out[2].isnan().tolist() == [False, False, True, False, False]


def test_skipped_rows_and_rows_without_a_target(dtype, within):
    hidden, weight, target = peaked_inputs(100, 16, 300, dtype=dtype)
    logp, _, _, _ = oracle(hidden, weight, target)
    skipped = target.clone()
    skipped[10:90] = -1
    skipped[5] = 300  # no target here: the log-sum-exp counts, the logit is another rank's
    lse = torch.logsumexp(hidden.double() @ weight.double().T, -1)
    hidden[10:90] = float("nan")
    out = forward(hidden, weight, skipped, entropy=True, stats=True)
    live = (skipped >= 0) & (skipped < 300)
    assert (out[0] - logp)[live].abs().max() < 2e-5
    assert out[0][5] == -torch.inf  # no target here
    assert abs(out[1][:, 5].sum() - lse[5]) < 2e-5
    for t in out[:4]:
        assert (t[..., 10:90] == 0).all()
    grad = torch.where(skipped < 0, 0.0, 1.0)
    dx, dw, _ = backward(grad, hidden, weight, skipped, out)
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert (dx[10:90] == 0).all()
    p = torch.softmax(hidden[5].double() @ weight.double().T, -1)
    assert_grad_close(dx[5:6], -(p @ weight.double())[None], rel=2 * within)  # 16 elements


def test_zero_and_strided_gradients(dtype):
    hidden, weight, target = peaked_inputs(40, 16, 300, dtype=dtype)
    saved = forward(hidden, weight, target)
    wide = normal(40, 3)
    a = backward(wide[:, 1], hidden, weight, target, saved)
    b = backward(wide[:, 1].clone(), hidden, weight, target, saved)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    one = backward(torch.ones(()).expand(40), hidden, weight, target, saved)
    assert torch.equal(one[0], backward(torch.ones(40), hidden, weight, target, saved)[0])
    none = backward(torch.zeros(40), hidden, weight, target, saved, needs=(True, True, True))
    assert all((g == 0).all() for g in none)


def test_frozen_parts_run_no_product(monkeypatch, dtype):
    hidden, weight, target = peaked_inputs(10, 16, 300, dtype=dtype)
    saved = forward(hidden, weight, target)
    calls = []
    product = op.matmul_into
    monkeypatch.setattr(op, "matmul_into", lambda out, *a, **k: calls.append(tuple(out.shape)) or product(out, *a, **k))
    both = backward(torch.ones(10), hidden, weight, target, saved)
    assert calls == [(10, 16), (300, 16)]
    calls.clear()
    dx, dw, _ = backward(torch.ones(10), hidden, weight, target, saved, needs=(True, False, False))
    assert calls == [(10, 16)]
    assert dw is None
    assert torch.equal(dx, both[0])
    calls.clear()
    dx, dw, _ = backward(torch.ones(10), hidden, weight, target, saved, needs=(False, True, False))
    assert calls == [(300, 16)]
    assert dx is None
    assert torch.equal(dw, both[1])


def test_main_grad_is_added_to_in_float32(dtype, within):
    hidden, weight, target = peaked_inputs(40, 16, 300, dtype=dtype)
    grad = normal(40)
    saved = forward(hidden, weight, target)
    main = torch.full((300, 16), 3.0)
    _, dw, _ = backward(grad, hidden, weight, target, saved, main_grad=main)
    assert dw is None
    assert_grad_close(main - 3.0, oracle(hidden, weight, target, grad)[3], rel=min(within, 1.8e-3), row=50 * within)


def test_slabs_and_row_blocks_add_up(monkeypatch, dtype, within):
    hidden, weight, target = peaked_inputs(75, 32, 900, dtype=dtype, peak=20.0)
    grad, target[30] = normal(75), -1
    grad[30] = 0.0
    saved = forward(hidden, weight, target)
    monkeypatch.setattr(op, "SLAB_ROWS", 32)
    monkeypatch.setattr(op, "SLAB_COLUMNS", 256)
    dx, dw, db = backward(grad, hidden, weight, target, saved, needs=(True, True, True))
    main = torch.ones(900, 32)
    backward(grad, hidden, weight, target, saved, main_grad=main, needs=(False, True, False))
    _, _, exact_dx, exact_dw = oracle(hidden, weight, target.where(target >= 0, 0), grad)
    assert_grad_close(dx, exact_dx, rel=1.5 * within)  # of 75 rows few count
    assert_grad_close(dw, exact_dw, rel=1.5 * within)
    assert_grad_close(main - 1.0, exact_dw, rel=min(within, 1.8e-3), row=50 * within)
    assert db.abs().sum() > 0


def test_tile_statistics_bound_the_mass_from_above_within_one_float16_step(dtype):
    hidden, weight, target = peaked_inputs(40, 32, 1037, dtype=dtype, peak=40.0)
    stats = forward(hidden, weight, target, stats=True)[3].double()  # [9, 40]
    z = hidden.double() @ weight.double().T
    exact = torch.stack([torch.logsumexp(part, -1) for part in z.split(128, dim=1)])
    assert stats.shape == exact.shape == (9, 40)
    assert (stats >= exact).all()
    step = 2.0 ** (exact.abs().clamp_min(2.0**-14).log2().floor() - 10)
    assert (stats - exact <= step * 1.01 + 1e-4).all()


def test_two_runs_give_the_same_bits(dtype):
    hidden, weight, target = peaked_inputs(50, 32, 700, dtype=dtype)
    grad = normal(50)
    runs = [backward(grad, hidden, weight, target, forward(hidden, weight, target)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_exact_backward_reports_itself(dtype):
    hidden, weight, target = peaked_inputs(4, 8, 130, dtype=dtype)
    saved = forward(hidden, weight, target)
    report = torch.full((3,), float("nan"))
    backward(torch.ones(4), hidden, weight, target, saved, report=report)
    assert report.tolist() == [0.0, 1.0, 0.0]


def test_no_rows_at_all(dtype):
    hidden, weight = torch.empty(0, 8, dtype=dtype), torch.randn(130, 8).to(dtype)
    target = torch.empty(0, dtype=torch.int64)
    out = forward(hidden, weight, target, entropy=True, stats=True)
    assert [tuple(t.shape) for t in out[:4]] == [(0,), (2, 0), (0,), (2, 0)]
    dx, dw, db = backward(torch.empty(0), hidden, weight, target, out, needs=(True, True, True))
    assert dx.shape == (0, 8)
    assert (dw == 0).all()
    assert (db == 0).all()


def test_a_weight_that_is_a_slice_of_a_wider_one(dtype):
    hidden, weight, target = peaked_inputs(9, 16, 200, dtype=dtype)
    wide = torch.randn(200, 48).to(dtype)
    wide[:, 16:32] = weight
    assert torch.equal(forward(hidden, wide[:, 16:32], target)[1], forward(hidden, weight, target)[1])
    shifted = torch.randn(200, 17).to(dtype)
    shifted[:, 1:] = weight  # rows off the 16-byte grid: the path without descriptors
    assert torch.equal(forward(hidden, shifted[:, 1:], target)[1], forward(hidden, weight, target)[1])


def test_a_row_keeps_its_bits_whatever_the_weights_address(dtype):
    hidden, weight, target = peaked_inputs(20, 32, 1100, dtype=dtype)
    buffer = torch.empty(1 + weight.numel(), dtype=dtype)
    apart = buffer[1:].view(weight.shape).copy_(weight)
    assert apart.data_ptr() % 16
    for aligned, shifted in zip(*(forward(hidden, w, target, entropy=True)[:4] for w in (weight, apart))):
        assert torch.equal(aligned, shifted)
    assert op._tile(hidden, apart) == op._tile(hidden, weight)
    saved = forward(hidden, weight, target)
    for a, b in zip(*(backward(normal(20), hidden, w, target, saved)[:2] for w in (weight, apart))):
        assert torch.equal(a, b)


def test_junk_temperatures_of_skipped_rows_reach_nothing(dtype):
    hidden, weight, target = peaked_inputs(20, 16, 300, dtype=dtype)
    target[3:9] = -1
    degrees = torch.ones(20)
    clean = forward(hidden, weight, target, temperature=degrees)
    grad = normal(20).masked_fill(target < 0, 0.0)
    expected = backward(grad, hidden, weight, target, clean, temperature=degrees)
    degrees[3:9], hidden[3:9] = float("nan"), float("nan")
    got = backward(
        grad, hidden, weight, target, forward(hidden, weight, target, temperature=degrees), temperature=degrees
    )
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2]))
    assert got[1].isfinite().all()


def test_flattened_loops_give_the_bits_of_three_nested_ones(dtype, tmp_path, monkeypatch):
    hidden, weight, target = peaked_inputs(70, 40, 2700, dtype=dtype)
    monkeypatch.setattr(op.tiles, "splits", lambda *_: (3, 4))  # 11 tiles: the last split has one less
    flat = forward(hidden, weight, target, entropy=True, stats=True)
    nested = variants.kernels(variants.three_loops, tmp_path)
    monkeypatch.setattr(op, "forward_kernel", nested.forward_kernel)
    for a, b in zip(forward(hidden, weight, target, entropy=True, stats=True)[:4], flat[:4]):
        assert torch.equal(a, b)
    logp, entropy, _, _ = oracle(hidden, weight, target)
    assert (flat[0] - logp).abs().max() < 2e-5
    assert (flat[2] - entropy).abs().max() < 2e-5


@pytest.mark.parametrize("per_split", [1, 2, 5, 16])
def test_splits_of_any_length_agree_within_rounding(dtype, per_split, monkeypatch):
    hidden, weight, target = peaked_inputs(40, 24, 1300, dtype=dtype)  # 6 tiles
    logp, entropy, _, _ = oracle(hidden, weight, target)
    monkeypatch.setattr(op.tiles, "splits", lambda *_: (-(-6 // per_split), per_split))
    out = forward(hidden, weight, target, entropy=True, stats=True)
    assert (out[0] - logp).abs().max() < 2e-5
    assert (out[2] - entropy).abs().max() < 2e-5
    assert (out[3].double() >= torch.stack([
        torch.logsumexp(z, -1) for z in (hidden.double() @ weight.double().T).split(128, 1)
    ])).all()  # fmt: skip


def test_what_a_gpu_is_asked_first_is_right_here():
    asked = doubts.one_loop("cpu", 40, 32, 700)
    assert asked["right"]
    assert asked["logp_error"] > 0
