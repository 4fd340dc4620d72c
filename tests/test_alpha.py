"""phi as one dial: L_alpha against decimal arithmetic, and what its gradient is, by enumeration (maths, eq. 21-23)."""

import dataclasses
from decimal import Decimal, localcontext

import pytest
import torch

from flowrl_kernels import FlowRLLoss, LinearFlowRLLoss, flowrl_loss, residual_loss
from flowrl_kernels.chunked.residual import slope
from flowrl_kernels.presets import PENALTIES, PRESETS, Row, row_of
from flowrl_kernels.reference.residual import phi
from flowrl_kernels.testing import assert_grad_close

ALPHAS = [-1.0, 0.0, 0.5, 1.0, 1.0 + 2**-40, 1.0 - 1e-9, 1.001, 1.5, 2.0, 3.0]
RESIDUALS = [0.0, 1e-12, -1e-5, 0.1, -0.49, 0.51, -0.7, 2.0, -5.0, 19.0, -19.0]


def exactly(alpha, d):
    """(L, L') in decimal, by the closed form."""
    with localcontext() as context:
        context.prec = 120
        k, d = Decimal(alpha) - 1, Decimal(d)
        if k == 0:
            return float(d * d / 2), float(d)
        return float(((k * d).exp() - k * d - 1) / (k * k)), float(((k * d).exp() - 1) / k)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_penalty_and_its_slope_keep_their_digits_at_every_alpha(alpha):
    d = torch.tensor(RESIDUALS, dtype=torch.float64, requires_grad=True)
    value = phi(d, alpha)
    wanted, wanted_slope = (torch.tensor(x, dtype=torch.float64) for x in zip(*(exactly(alpha, x) for x in RESIDUALS)))
    torch.testing.assert_close(value, wanted, rtol=2e-14, atol=0)
    by_autograd = torch.autograd.grad(value.sum(), d, create_graph=True)[0]
    torch.testing.assert_close(by_autograd, wanted_slope, rtol=2e-14, atol=0)
    torch.testing.assert_close(slope(d.detach(), alpha), wanted_slope, rtol=2e-14, atol=0)
    curvature = torch.autograd.grad(by_autograd.sum(), d)[0]
    torch.testing.assert_close(curvature, ((alpha - 1.0) * d).exp(), rtol=1e-13, atol=1e-15)


def test_the_names_are_points_of_the_dial():
    d = torch.linspace(-8, 8, 33, dtype=torch.float64)
    closed = {
        "square": d**2,
        "exp": d.exp() - d - 1,
        "exp_half": 4 * (d / 2).exp() - 2 * d - 4,
        "cosh": d.exp() + (-d).exp() - 2,
    }
    assert set(closed) == set(PENALTIES)
    for name, value in closed.items():
        torch.testing.assert_close(phi(d, name), value, rtol=1e-12, atol=1e-15)
    assert torch.equal(phi(d, "square"), d**2)  # to the bit
    assert torch.equal(phi(d, "exp"), phi(d, 2.0))
    assert torch.equal(phi(d, "square"), 2 * phi(d, 1))


@pytest.mark.parametrize("alpha", [0.0, 2.0, 3.0])
def test_the_exponent_is_held_at_60_and_the_penalty_goes_on_straight(alpha):
    sign = 1.0 if alpha > 1 else -1.0
    edge = sign * 60 / abs(alpha - 1)
    d = torch.tensor([edge, edge + sign, edge + 3 * sign], dtype=torch.float64)
    value, steep = phi(d, alpha), torch.tensor(60.0, dtype=torch.float64).exp() / abs(alpha - 1)
    torch.testing.assert_close(value.diff(), torch.stack([steep, 2 * steep]), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope(d, alpha).abs(), steep.expand(3), rtol=1e-12, atol=0)
    flat = slope(-d, alpha).abs()  # on the other side nothing is cut that double precision could tell
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / abs(alpha - 1)), rtol=1e-12, atol=0)
    assert phi(torch.tensor([1e6, -1e6], dtype=torch.float64), 1.0).equal(torch.full((2,), 5e11, dtype=torch.float64))


# ------------------------------------------------------------------ a small distribution, every outcome listed

FREE = 0.5 * torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
GOAL = torch.randn(9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 3, 5, 8, 1, 4, 2, 6])
FEATURES = torch.randn(9, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # two for nine outcomes
POLICIES = {"every distribution": (lambda w: w, FREE), "a line of them": (lambda w: FEATURES @ w, FREE[:2])}


def log_policy(which, weights):
    return torch.log_softmax(POLICIES[which][0](weights), 0)


def expected_gradient(which, alpha, off=0.0, by_length=False, weights=None):
    """Of the loss by the policy's parameters, for samples of the policy: every outcome with its probability."""
    weights = (POLICIES[which][1] if weights is None else weights).clone().requires_grad_()
    logp = log_policy(which, weights)
    target = torch.log_softmax(GOAL, 0) - off
    given = logp.detach().clone().requires_grad_()
    length = LENGTHS if by_length else torch.ones_like(LENGTHS)
    tokens = torch.zeros(9, 8, dtype=torch.float64)
    tokens[:, 0] = given  # the rest of a sequence is certain: its length counts and nothing else
    mask = torch.arange(8) < length[:, None]
    out = residual_loss(
        tokens, target / length, scale=None if by_length else 1.0, mask=mask, phi=alpha, normalizer=1.0, impl="chunked"
    )
    coefficient = torch.autograd.grad(out.loss, given)[0]
    return torch.autograd.grad((logp.detach().exp() * coefficient * logp).sum(), weights)[0]


def divergence(logp, alpha):
    """D_alpha of policy and target by its definition."""
    goal = torch.log_softmax(GOAL, 0)
    if alpha == 1:
        return (logp.exp() * (logp - goal)).sum()
    if alpha == 0:
        return (goal.exp() * (goal - logp)).sum()
    return ((alpha * logp + (1 - alpha) * goal).exp().sum() - 1) / (alpha * (alpha - 1))


def divergence_gradient(which, alpha, weights=None):
    weights = (POLICIES[which][1] if weights is None else weights).clone().requires_grad_()
    return torch.autograd.grad(divergence(log_policy(which, weights), alpha), weights)[0]


@pytest.mark.parametrize("which", POLICIES)
@pytest.mark.parametrize("alpha", [-1, 0, 0.5, 1, 1.5, 2, 3])
def test_the_gradient_is_that_of_the_alpha_divergence_and_a_wrong_log_z_scales_it(which, alpha):
    wanted = divergence_gradient(which, alpha)
    assert wanted.norm() > 0.05
    assert_grad_close(expected_gradient(which, alpha), wanted, rel=1e-10)
    off = expected_gradient(which, alpha, off=0.7)  # log Z as it stands in the residual is .7 too large
    assert_grad_close(off, wanted * torch.tensor((alpha - 1) * 0.7, dtype=torch.float64).exp(), rel=1e-10)


def test_where_the_target_is_out_of_reach_alpha_chooses_what_is_covered():
    goal, reached = torch.log_softmax(GOAL, 0), {}
    for alpha in (0.0, 1.0, 3.0):
        weights = torch.zeros(2, dtype=torch.float64)
        for _ in range(300):
            weights = weights - 0.2 * divergence_gradient("a line of them", alpha, weights=weights)
        assert expected_gradient("a line of them", alpha, weights=weights).norm() < 1e-6, "the loss stands still there"
        reached[alpha] = log_policy("a line of them", weights)
    for alpha in reached:  # each is the best of the three by its own divergence, and by no other
        values = {other: float(divergence(logp, alpha)) for other, logp in reached.items()}
        assert min(values, key=values.get) == alpha, (alpha, values)
        assert sorted(values.values())[1] > values[alpha] * 1.01
    left_out = {alpha: float((goal - logp).max()) for alpha, logp in reached.items()}
    assert left_out[0.0] < left_out[1.0] < left_out[3.0], "a small alpha leaves no likely outcome without probability"


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_under_length_normalisation_alpha_is_a_penalty_and_no_divergence(alpha):
    """Each length has a dial of its own, alpha_n = 1 + (alpha - 1) / n, and log Z is no mere scale (eq. 23)."""
    got = expected_gradient("every distribution", alpha, by_length=True)
    logp = log_policy("every distribution", FREE)
    own, n = 1 + (alpha - 1) / LENGTHS.double(), LENGTHS.double()
    goal = torch.log_softmax(GOAL, 0)
    slope_by_hand = (((own - 1) * (logp - goal)).exp() - 1) / (alpha - 1) / n
    wanted = logp.exp() * (slope_by_hand - (logp.exp() * slope_by_hand).sum())
    assert_grad_close(got, wanted, rel=1e-10)
    cosine = torch.cosine_similarity(got, divergence_gradient("every distribution", alpha), dim=0)
    assert cosine < 0.9
    off = expected_gradient("every distribution", alpha, off=2.0, by_length=True)
    across = off - got * (off @ got) / (got @ got)  # what is no multiple of it; of the sum residual 1e-10 would be much
    assert across.norm() > 0.01 * off.norm()


# ------------------------------------------------------------------------------------------------ the doors


def batch(dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    logp = -torch.rand(5, 6, generator=make, dtype=dtype)
    ref, reward, log_z = logp - 0.3 * torch.rand(5, 6, generator=make), torch.arange(5) / 4 - 0.4, torch.zeros(5)
    return logp, ref.to(dtype), reward.to(dtype), log_z.to(dtype)


@pytest.mark.parametrize("alpha", [0, 0.3, 2.5])
def test_every_door_and_both_passes_take_alpha(alpha):
    logp, ref, reward, log_z = batch()
    x = logp.clone().requires_grad_()
    losses = {
        "reference": flowrl_loss(x, ref, reward, log_z, phi=alpha, impl="reference").loss,
        "chunked": flowrl_loss(x, ref, reward, log_z, phi=alpha, impl="chunked").loss,
        "module": FlowRLLoss(phi=alpha, beta=15.0)(x, ref, reward, log_z).loss,
        "preset": flowrl_loss(x, ref, reward, log_z, preset="paper", phi=alpha).loss,
        "family": residual_loss(x, 15 * reward, anchor=ref, log_z=log_z, phi=alpha).loss,
    }
    d = (logp - ref).mean(1) - 15 * reward
    by_hand = torch.stack([torch.tensor(exactly(alpha, float(v))[0]) for v in d]).mean().double()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-6, atol=0, msg=name)
    grads = [torch.autograd.grad(loss, x)[0] for loss in losses.values()]
    for grad in grads[1:]:
        assert_grad_close(grad, grads[0], rel=1e-9)
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 6, 4, generator=make, dtype=torch.float64)
    weight, target = torch.randn(11, 4, generator=make, dtype=torch.float64), torch.randint(11, (5, 6), generator=make)
    both = []
    for single_pass in (True, False):
        w = weight.clone().requires_grad_()
        out = LinearFlowRLLoss(phi=alpha, beta=0.5, single_pass=single_pass)(hidden, w, target, ref, reward, log_z)
        both.append((out.loss.detach(), torch.autograd.grad(out.loss, w)[0]))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-12, atol=0)
    assert_grad_close(both[0][1], both[1][1], rel=1e-10)


def test_alpha_is_a_dial_of_methods_that_square_and_contradicts_the_others():
    logp, ref, reward, log_z = batch()
    turned = flowrl_loss(logp, ref, reward, log_z, preset="tb", phi=0.5).loss
    assert turned == flowrl_loss(logp, ref, reward, log_z, beta=1.0, length_normalize=False, phi=0.5).loss
    same = flowrl_loss(logp, ref, reward, log_z, preset="phi_exp", phi=2.0).loss
    assert same == flowrl_loss(logp, ref, reward, log_z, preset="phi_exp").loss
    with pytest.raises(ValueError, match=r"phi: wanted 'exp', which preset='phi_exp' sets.*; got 0.5"):
        flowrl_loss(logp, ref, reward, log_z, preset="phi_exp", phi=0.5)
    with pytest.raises(ValueError, match=r"phi: wanted 'exp', which preset='phi_exp'.*'abs'"):
        flowrl_loss(logp, ref, reward, log_z, preset="phi_exp", phi="abs")


@pytest.mark.parametrize("bad", [True, None, float("nan"), float("inf"), "2", torch.ones(2), 1j])
def test_what_is_no_alpha_is_refused_by_name(bad):
    logp, ref, reward, log_z = batch()
    with pytest.raises((TypeError, ValueError), match="phi: wanted"):
        flowrl_loss(logp, ref, reward, log_z, phi=bad)
    with pytest.raises((TypeError, ValueError), match="phi: wanted"):
        residual_loss(logp, reward, phi=bad)


def test_a_row_with_alpha_survives_the_trip_through_an_operator():
    row = dataclasses.replace(PRESETS["tb"], phi=0.25)
    assert dataclasses.replace(row_of(row.codes(), row.packed_numbers().tolist()), source=row.source) == row
    assert isinstance(row, Row)
