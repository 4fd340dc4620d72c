"""Rollout corrections against loops written from verl's and TRL's definitions, alone and inside the losses."""

import math

import pytest
import torch

from flowrl_kernels import LinearFlowRLLoss, flowrl_loss, policy_gradient_loss, rollout_correction
from flowrl_kernels.core.correction import DEFAULTS
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of

B, T = 7, 8
NAMES = {  # bounds that cut some and leave some, for the gaps of `make`
    "token_truncate": (None, 1.1), "token_mask": (0.8, 1.2), "sequence_truncate": (0.7, 1.3),
    "sequence_mask": (None, 1.3), "geometric_truncate": (0.9, 1.1), "geometric_mask": (0.93, 1.05),
    "token_k1": (0.8, 1.3), "token_k2": 0.02, "token_k3": 0.03, "seq_sum_k1": (0.6, 1.5), "seq_sum_k2": 0.15,
    "seq_sum_k3": 0.12, "seq_mean_k1": (0.93, 1.05), "seq_mean_k2": 0.025, "seq_mean_k3": 0.02, "seq_max_k2": 0.08,
    "seq_max_k3": 0.07,
}  # fmt: skip


def make(seed=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([8, 1, 0, 5, 3, 6, 2])[:, None]
    mask[0, 3] = False  # a tool's token
    near = {n: (logp + 0.3 * torch.randn(B, T, generator=draw, dtype=torch.float64)) for n in ("old", "sampler", "ref")}
    data = {"logp": logp, **near, "advantage": torch.randn(B, generator=draw, dtype=torch.float64)}
    return {k: v.to(dtype) for k, v in data.items()} | {"mask": mask}


def by_hand(data, name, bounds):
    """{(b, t): weight} of the tokens that stay, and how many were cut."""
    low, high = bounds if isinstance(bounds, tuple) else (None, bounds)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    out, cut = {}, 0
    for b in range(B):
        here = [t for t in range(T) if data["mask"][b, t]]
        gaps = [float(data["old"][b, t] - data["sampler"][b, t]) for t in here]
        for t, gap in zip(here, gaps):
            level, how = name.rsplit("_", 1)
            if how in ("truncate", "mask"):
                log = {"token": gap, "sequence": sum(gaps), "geometric": sum(gaps) / len(gaps)}[level]
                ratio = math.exp(log)
                inside = low <= ratio <= high
                out[b, t] = ratio if inside else min(max(ratio, low), high) if how == "truncate" else 0.0
            else:
                estimate = {"k1": lambda g: -g, "k2": lambda g: g * g / 2, "k3": lambda g: math.exp(g) - 1 - g}[how]
                each = [estimate(g) for g in gaps]
                value = {
                    "token": estimate(gap), "seq_sum": sum(each), "seq_mean": sum(each) / len(each),
                    "seq_max": max(each),
                }[level]  # fmt: skip
                inside = math.log(low) <= value <= math.log(high) if how == "k1" else value <= high
                if inside:
                    out[b, t] = 1.0
            cut += not inside
    return out, cut


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_rejections_are_those_of_the_definitions(name):
    data = make()
    wanted, cut = by_hand(data, name, NAMES[name])
    count = int(data["mask"].sum())
    assert 0 < cut < count  # else the bounds test nothing
    lengths = torch.where(data["mask"].any(1), T - data["mask"].flip(1).int().argmax(1), 0)
    inside = torch.arange(T) < lengths[:, None]
    junk = [torch.where(data["mask"], data[n], torch.nan) for n in ("old", "sampler")]
    layouts = (
        (junk, {"mask": data["mask"]}, slice(None)),
        ([x[inside] for x in junk], {"mask": data["mask"][inside], "cu_seqlens": cu_seqlens_of(lengths)}, inside),
    )
    for tensors, place, own in layouts:
        out = rollout_correction(*tensors, name, NAMES[name], **place)
        weight, keep = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.bool)
        for at, value in wanted.items():
            weight[at], keep[at] = value, True
        torch.testing.assert_close(out.weight, weight[own], rtol=1e-12, atol=0)
        assert torch.equal(out.keep, keep[own])
        used = [wanted.get((b, t), 0.0) for b in range(B) for t in range(T) if data["mask"][b, t]]
        gaps = [float(g) for g in (data["old"] - data["sampler"])[data["mask"]]]
        figures = {
            "mismatch_kl": -sum(gaps) / count,
            "mismatch_k3": sum(math.exp(g) - 1 - g for g in gaps) / count,
            "mismatch_max": max(map(abs, gaps)),
            "mismatch_ess": sum(used) ** 2 / (count * sum(w * w for w in used)),
            "mismatch_cut": cut / count,
        }
        assert {n: float(v) for n, v in out.metrics.items()} == pytest.approx(figures, rel=1e-12)


def test_a_weight_and_a_rejection_go_together_with_bounds_as_verl_writes_them():
    data = make()
    out = rollout_correction(
        data["old"], data["sampler"], "token_truncate+seq_mean_k1", "1.1,0.93_1.05", mask=data["mask"]
    )
    weights, _ = by_hand(data, "token_truncate", (None, 1.1))
    stays, _ = by_hand(data, "seq_mean_k1", (0.93, 1.05))
    for b in range(B):
        for t in range(T):
            assert bool(out.keep[b, t]) == ((b, t) in stays)
            assert float(out.weight[b, t]) == pytest.approx(weights.get((b, t), 0.0) if (b, t) in stays else 0.0)
    same = rollout_correction(data["old"], data["sampler"], "seq_mean_k1", 2.0, mask=data["mask"])
    pair = rollout_correction(data["old"], data["sampler"], "seq_mean_k1", (0.5, 2.0), mask=data["mask"])
    assert torch.equal(same.keep, pair.keep)


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("name", ["token_truncate", "sequence_mask", "token_k2", "seq_mean_k3"])
def test_the_policy_loss_is_weighted_and_the_penalty_is_not(name, aggregate):
    data = make()
    wanted, _ = by_hand(data, name, NAMES[name])
    logp = data["logp"].clone().requires_grad_()
    rows = []
    for b in range(B):
        losses, penalties = [], []
        for t in (t for t in range(T) if (b, t) in wanted):
            rho, a = (logp[b, t] - data["old"][b, t]).exp(), float(data["advantage"][b])
            losses.append(wanted[b, t] * torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.2)))
            x = data["ref"][b, t] - logp[b, t]
            penalties.append(x.exp() - x - 1)
        rows.append([x + 0.3 * y for x, y in zip(losses, penalties)])
    total = sum(sum(row) / (len(row) if aggregate == "seq-mean-token-mean" else 1) for row in rows if row)
    total = total / (len(wanted) if aggregate == "token-mean" else B)
    (gradient,) = torch.autograd.grad(total, logp)
    mine = data["logp"].clone().requires_grad_()
    out = policy_gradient_loss(
        mine, data["old"], data["advantage"], mask=data["mask"], kl=0.3, logp_ref=data["ref"], aggregate=aggregate,
        logp_sampler=data["sampler"], correction=name, correction_cap=NAMES[name],
    )  # fmt: skip
    assert float(out.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    assert_grad_close(torch.autograd.grad(out.loss, mine)[0], gradient, rel=1e-12)
    assert float(out.metrics["mismatch_cut"]) > 0


@pytest.mark.parametrize("name", ["token_mask", "sequence_truncate", "geometric_mask", "token_k1", "seq_max_k2"])
def test_a_flow_loss_takes_the_mean_weight_of_the_tokens_that_stay(name):
    data, draw = make(), torch.Generator().manual_seed(8)
    wanted, _ = by_hand(data, name, NAMES[name])
    reward, log_z = torch.randn(B, generator=draw).double(), torch.randn(B, generator=draw).double()
    logp = data["logp"].clone().requires_grad_()
    total = 0.0
    for b in range(B):
        here = [t for t in range(T) if (b, t) in wanted]
        if here:
            weight = sum(wanted[b, t] for t in here) / len(here)
            ratio = math.exp(sum(float(data["logp"][b, t] - data["old"][b, t]) for t in here))
            mean = sum(logp[b, t] - data["ref"][b, t] for t in here) / len(here)
            total = total + weight * min(max(ratio, 0.8), 1.2) * (log_z[b] + mean - 2.0 * reward[b]) ** 2 / B
    (gradient,) = torch.autograd.grad(total, logp)
    for impl in ("reference", "chunked"):
        mine = data["logp"].clone().requires_grad_()
        out = flowrl_loss(
            mine, data["ref"], reward, log_z, logp_old=data["old"], logp_sampler=data["sampler"], mask=data["mask"],
            beta=2.0, clip="paper", correction=name, correction_cap=NAMES[name], impl=impl,
        )  # fmt: skip
        assert float(out.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-10)
        assert_grad_close(torch.autograd.grad(out.loss, mine)[0], gradient, rel=1e-10)


@pytest.mark.parametrize("single_pass", [True, False])
def test_from_hidden_states_a_flow_loss_leaves_out_what_is_rejected(single_pass):
    data, draw = make(dtype=torch.float32), torch.Generator().manual_seed(8)
    x, w = torch.randn(B, T, 5, generator=draw), torch.randn(11, 5, generator=draw)
    target = torch.randint(0, 11, (B, T), generator=draw)
    given = {"logp_old": data["old"], "logp_sampler": data["sampler"], "mask": data["mask"]}
    reward, log_z = torch.randn(B, generator=draw), torch.randn(B, generator=draw)
    settings = {"correction": "token_mask+seq_max_k2", "correction_cap": "0.8_1.2,0.08"}
    results = []
    for impl in ("chunked", "reference"):
        hidden = x.clone().requires_grad_()
        loss = LinearFlowRLLoss(single_pass=single_pass, impl=impl, **settings)
        out = loss(hidden, w, target, data["ref"], reward, log_z, **given)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, hidden)[0]))
    keep = rollout_correction(data["old"], data["sampler"], mask=data["mask"], **settings).keep
    assert 0 < int(keep.sum()) < int(data["mask"].sum())
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    assert_grad_close(results[0][1][keep], results[1][1][keep], rel=1e-5)
    assert results[0][1][~keep].eq(0).all()


def test_every_name_has_a_test_and_the_fields_own_bounds():
    assert set(NAMES) == set(DEFAULTS)
    data = make()
    both = rollout_correction(data["old"], data["sampler"], "token_mask", mask=data["mask"])
    told = rollout_correction(data["old"], data["sampler"], "token_mask", "0.5_5.0", mask=data["mask"])
    assert torch.equal(both.weight, told.weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"correction": "token"}, "correction: wanted .*'token_truncate'"),
        ({"correction": 2}, "correction: wanted a name"),
        ({"correction": "token_mask+sequence_mask"}, "correction: wanted one weight, one rejection"),
        ({"correction": "token_k2"}, "correction_cap: wanted a bound for 'token_k2'"),
        ({"correction": "token_k2", "correction_cap": (0.1, 0.2)}, "correction_cap: wanted an upper bound alone"),
        ({"correction": "token_mask", "correction_cap": (2.0, 0.5)}, "correction_cap: wanted numbers with 0 <= low"),
        ({"correction": "token_mask", "correction_cap": "a_b"}, "correction_cap: wanted 'high' or 'low_high'"),
        ({"correction": "token_mask", "correction_cap": float("nan")}, "correction_cap: wanted numbers"),
        ({"correction": "token_mask+token_k2", "correction_cap": (0.5, 2.0)}, "correction_cap: wanted a text"),
        ({"correction_cap": 2.0}, "correction_cap: wanted None without correction"),
    ],
)
def test_what_is_no_correction_is_refused_by_name(settings, said):
    data = make()
    with pytest.raises((TypeError, ValueError), match=said):
        rollout_correction(data["old"], data["sampler"], mask=data["mask"], **settings)
    with pytest.raises((TypeError, ValueError), match=said):
        policy_gradient_loss(
            data["logp"], data["old"], data["advantage"], mask=data["mask"], logp_sampler=data["sampler"], **settings
        )
    with pytest.raises((TypeError, ValueError), match=said):
        LinearFlowRLLoss(**settings)


def test_a_correction_wants_the_engines_log_probs_and_no_second_one_beside_it():
    data, reward = make(), torch.zeros(B, dtype=torch.float64)
    with pytest.raises(ValueError, match="logp_sampler: wanted log-probs of the engine"):
        policy_gradient_loss(
            data["logp"], data["old"], data["advantage"], mask=data["mask"], correction="token_truncate"
        )
    given = {"mask": data["mask"], "correction": "token_truncate"}
    with pytest.raises(ValueError, match="logp_old: wanted log-probs, for correction"):
        flowrl_loss(data["logp"], data["ref"], reward, None, logp_sampler=data["sampler"], **given)
    with pytest.raises(ValueError, match="correction: wanted None beside tis='token'"):
        flowrl_loss(
            data["logp"], data["ref"], reward, reward, logp_old=data["old"], logp_sampler=data["sampler"],
            preset="release_tis_token", **given,
        )  # fmt: skip
