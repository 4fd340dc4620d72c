"""The bounded backward in Triton under the interpreter: the properties of tests/test_bounded.py, and its lists."""

import pytest
import torch

from flowrl_kernels import linear_logprob
from flowrl_kernels.chunked import bounded as definition
from flowrl_kernels.chunked import routing
from flowrl_kernels.chunked.bounded import make_plan
from flowrl_kernels.core.types import TILE
from flowrl_kernels.testing import assert_grad_close, oracle, poisoned_memory, relative_error, rl_like_inputs
from flowrl_kernels.triton import bounded
from tests.test_bounded import NAMES, adversarial
from tests.test_bounded_gpu import dropped_share

BLOCK = 32  # rows of a block in the interpreter
WIDE = bounded.COLUMNS


def gradients(hidden, weight, target, grad, epsilon=0.01, impl="triton", report=None, needs=(True, True), **settings):
    x, w = (t.clone().requires_grad_(need) for t, need in zip((hidden, weight), needs))
    with poisoned_memory():
        logp = linear_logprob(x, w, target, epsilon=epsilon, report=report, impl=impl, **settings).logp
        logp.backward(grad)
    return x.grad, w.grad


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Small vocabularies: tiles of 256 columns, so that there are some to drop."""
    monkeypatch.setattr(bounded, "COLUMNS", 256)


@pytest.fixture
def plans(monkeypatch):
    seen = []
    monkeypatch.setattr(bounded, "make_plan", lambda *a: seen.append(make_plan(*a)) or seen[-1])
    return seen


@pytest.fixture
def any_share(monkeypatch):
    """Few rows fill no blocks: take the bounded path all the same."""
    monkeypatch.setattr(bounded, "FALL_BACK", 1.0)


@pytest.mark.parametrize(
    ("name", "epsilon"),
    [
        pytest.param(name, epsilon, marks=() if (i + j) % 3 == 0 else pytest.mark.nightly)
        for i, name in enumerate(NAMES)
        for j, epsilon in enumerate((1e-3, 3e-2))
    ],
)
def test_the_true_error_stays_under_the_bound_and_the_bound_under_epsilon(plans, name, epsilon):
    hidden, weight, target, grad = adversarial(name, n=80, h=24, v=2000)
    report = torch.zeros(3)
    got = gradients(hidden, weight, target, grad, epsilon, report=report)
    bound, share, fell_back = report.tolist()
    assert bound <= epsilon
    if fell_back:
        assert (bound, share) == (0.0, 1.0)
    else:
        assert dropped_share(plans[0], bounded.COLUMNS, hidden, weight, target, grad) <= bound * (1 + 1e-6)
    _, _, *expected = oracle(hidden, weight, target, grad)
    for g, e in zip(got, expected):
        assert g.isfinite().all()
        assert relative_error(g, e)[0] < max(5 * epsilon, 1e-3)


def test_on_an_rl_like_batch_it_drops_much_and_loses_little(plans, dtype, within):
    hidden, weight, target, grad = rl_like_inputs(192, 96, 5000, zipf=1.2, dtype=dtype)
    grad = grad * 64 if dtype == torch.float16 else grad  # the outputs are float16: keep them in its range
    report = torch.zeros(3)
    got = gradients(hidden, weight, target, grad, report=report)
    bound, share, fell_back = report.tolist()
    assert fell_back == 0.0
    assert 0.0 < share < 0.5
    assert 0.005 <= bound <= 0.01
    assert dropped_share(plans[0], bounded.COLUMNS, hidden, weight, target, grad) <= bound
    _, _, *expected = oracle(hidden, weight, target, grad)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        assert_grad_close(g, e, rel=max(within, 1.5e-3), row=0.2)


@pytest.mark.parametrize("columns", [TILE, WIDE])
def test_it_drops_the_pairs_of_the_definition_in_torch_and_gives_its_gradients(any_share, plans, monkeypatch, columns):
    seen = []

    def spy(*arguments):  # the two forwards round differently: a pair on the edge may fall either way
        seen.append(make_plan(*arguments))
        return seen[-1]._replace(active=plans[0].active[grad != 0])

    monkeypatch.setattr(definition, "make_plan", spy)
    monkeypatch.setattr(definition, "FALL_BACK", 1.0)
    for room in (bounded, definition):
        monkeypatch.setattr(room, "COLUMNS", columns)
    hidden, weight, target, grad = rl_like_inputs(90, 40, 2900, zipf=1.2)
    grad[3] = 0.0
    reports = torch.zeros(2, 3)
    got = gradients(hidden, weight, target, grad, report=reports[0])
    expected = gradients(hidden, weight, target, grad, impl="chunked", report=reports[1])
    assert reports[0, 2] == reports[1, 2] == 0
    assert 0 < reports[0, 1] < 1
    assert (plans[0].active[grad != 0] != seen[0].active).sum() <= 2
    assert torch.allclose(reports[0], reports[1], rtol=0.05)
    assert not plans[0].active[3].any()
    for g, e in zip(got, expected):
        assert_grad_close(g, e, rel=2e-5)


@pytest.mark.parametrize("tile_runs", [1, 2, WIDE // TILE])
def test_costs_are_those_of_the_definition(tile_runs):
    make = torch.Generator().manual_seed(0)
    tile_lse = (3.0 * torch.randn(21, 75, generator=make) - 5.0).half()
    lse = torch.logsumexp(tile_lse.float(), 0)
    target = torch.randint(2600, (75,), generator=make)
    target[::7] = 2600
    logp = (-torch.rand(75, generator=make)).where(target < 2600, -torch.inf)
    gradient = torch.rand(75, generator=make)
    gradient[::5] = 0.0
    arguments = (tile_lse, lse, target, logp, gradient, tile_runs)
    for got, expected in zip(bounded.tile_costs(*arguments), routing.tile_costs(*arguments)):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-12)


def test_rows_of_dlogits_still_sum_to_zero(any_share):
    hidden, weight, target, grad = rl_like_inputs(100, 32, 2500, zipf=1.2)
    report = torch.zeros(3)
    padded = torch.cat([hidden, torch.zeros(100, 1)], 1)
    dx, _ = gradients(padded, torch.cat([weight, torch.ones(2500, 1)], 1), target, grad, report=report)
    assert report[2] == 0
    assert report[1] < 1
    assert dx[:, -1].abs().max() < 1e-6


def test_bias_main_grad_scale_and_a_temperature_per_token_take_the_same_path(any_share, dtype):
    n, h, v = 70, 40, 1900
    hidden, weight, target, grad = rl_like_inputs(n, h, v, zipf=1.2, dtype=dtype)
    grad = grad * 64
    make = torch.Generator().manual_seed(0)
    temperature = 0.8 + 0.4 * torch.rand(n, generator=make)
    results = []
    for epsilon in (0.0, 0.003):
        report, main = torch.zeros(3), torch.ones(v, h)
        bias = (0.1 * torch.randn(v, generator=torch.Generator().manual_seed(1))).requires_grad_()
        settings = {"bias": bias, "main_grad": main, "temperature": temperature, "logit_scale": 1.1}
        dx, dw = gradients(hidden, weight, target, grad, epsilon, report=report, **settings)
        assert dw is None
        results.append((dx, main - 1.0, bias.grad))
    assert report[2] == 0
    assert 0 < report[1] < 1
    for got, expected in zip(results[1], results[0]):
        # each is rounded by itself
        assert_grad_close(got, expected, rel=4e-3 if dtype == torch.bfloat16 else 2e-3, row=0.2)


def test_slabs_frozen_parts_and_a_pointer_path_change_nothing_that_matters(any_share, monkeypatch):
    hidden, weight, target, grad = rl_like_inputs(90, 40, 2000, zipf=1.2)
    target[5] = -100
    report = torch.zeros(3)
    whole = gradients(hidden, weight, target, grad, report=report)
    assert report[2] == 0
    assert torch.equal(gradients(hidden, weight, target, grad, needs=(True, False))[0], whole[0])
    assert torch.equal(gradients(hidden, weight, target, grad, needs=(False, True))[1], whole[1])
    slabs, slab = [], bounded.slab
    monkeypatch.setattr(bounded, "slab", lambda *a: slabs.append(a[3:5]) or slab(*a))
    monkeypatch.setattr(bounded, "SLAB_BYTES", 4 * BLOCK * 4 * (256 + 40))
    parts = gradients(hidden, weight, target, grad)
    assert len(slabs) > 1
    assert torch.equal(parts[1], whole[1])
    assert_grad_close(parts[0], whole[0], rel=1e-6)
    wide = torch.zeros(2000, 41)
    wide[:, 1:] = weight  # rows off the 16-byte grid: no descriptors
    x, w = hidden.clone().requires_grad_(), wide[:, 1:].requires_grad_()
    dx, dw = torch.autograd.grad(linear_logprob(x, w, target, epsilon=0.01, impl="triton").logp, (x, w), grad)
    assert_grad_close(dx, whole[0], rel=1e-6)
    assert_grad_close(dw, whole[1], rel=1e-6)


def test_rows_that_take_no_part_may_hold_anything_and_get_no_gradient(any_share, dtype, within):
    hidden, weight, target, grad = rl_like_inputs(90, 40, 2000, zipf=1.2, dtype=dtype)
    grad[10:50], target[60] = 0.0, -100
    keep = (grad != 0) & (target >= 0)
    alone = torch.zeros(3)
    dx, dw = gradients(hidden[keep], weight, target[keep], grad[keep], report=alone)
    assert alone[2] == 0
    hidden[60] = torch.nan
    report = torch.zeros(3)
    got = gradients(hidden, weight, target, grad, report=report)
    assert torch.equal(report, alone)
    assert (got[0][~keep] == 0).all()
    assert_grad_close(got[0][keep], dx, rel=within / 10)
    assert_grad_close(got[1], dw, rel=within / 10)


def test_softcap_an_entropy_gradient_and_what_does_not_pay_take_the_exact_path(dtype):
    hidden, weight, target, grad = rl_like_inputs(40, 16, 1500, zipf=1.2, dtype=dtype)
    for settings in ({"softcap": 30.0}, {"entropy": True}):
        report, x = torch.full((3,), 9.0), hidden.clone().requires_grad_()
        out = linear_logprob(x, weight, target, epsilon=0.01, report=report, impl="triton", **settings)
        ((out.logp * grad).sum() + (out.entropy.sum() if out.entropy is not None else 0.0)).backward()
        assert report.tolist() == [0.0, 1.0, 1.0]
    flat, report = 1e-3 * hidden, torch.full((3,), 9.0)
    got = gradients(flat, weight, target, grad, report=report)
    assert report.tolist() == [0.0, 1.0, 1.0]
    for g, e in zip(got, gradients(flat, weight, target, grad, 0.0)):
        assert torch.equal(g, e)
    broken = hidden.clone()
    broken[3, 3] = torch.nan
    got = gradients(broken, weight, target, grad, report=report)
    assert report.tolist() == [0.0, 1.0, 1.0]
    assert got[0].isnan().any()


def test_no_row_at_all_and_no_live_row_give_zeros(dtype):
    hidden, weight, target, _ = rl_like_inputs(40, 16, 1500, zipf=1.2, dtype=dtype)
    for rows in (0, 40):
        report = torch.full((3,), 9.0)
        dx, dw = gradients(hidden[:rows], weight, target[:rows], torch.zeros(rows), report=report)
        assert (dx == 0).all()
        assert (dw == 0).all()
    assert report.tolist() == [0.0, 0.0, 0.0]


def test_two_bounded_runs_give_the_same_bits(any_share, dtype):
    hidden, weight, target, grad = rl_like_inputs(70, 48, 2000, zipf=1.2, dtype=dtype)
    report = torch.zeros(3)
    first, second = (gradients(hidden, weight, target, 64 * grad, report=report) for _ in range(2))
    assert report[2] == 0
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
